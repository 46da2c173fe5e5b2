"""`ueo-fast evaluate`: zero-shot beside adapted on labelled images."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from ueo_fast.finetune.adaptation import make_classifier, views_of
from ueo_fast.finetune.clip.model import ClipClassifier
from ueo_fast.finetune.commands.adapted import open_run
from ueo_fast.finetune.commands.evaluation import (
    PREDICTION_COLUMNS,
    measure,
    metrics_table,
    prediction_rows,
)
from ueo_fast.finetune.commands.problem import Labelled, reread_problem
from ueo_fast.finetune.commands.stages import watched
from ueo_fast.finetune.data.image_list import check_root, read_images
from ueo_fast.finetune.data.loader import loading_errors
from ueo_fast.finetune.data.names import plural, shown
from ueo_fast.finetune.evaluation.predict import Readable, collect, predict_batches
from ueo_fast.finetune.files.run_folder import RunFolder
from ueo_fast.finetune.methods.registry import METHODS


@dataclass(frozen=True)
class EvaluateConfig:
    """Choices of ``ueo-fast evaluate``.

    Raises:
        ValueError: a value outside its range.
    """

    run: str = field(metadata={"help": "folder of a run of ueo-fast finetune"})
    data: str | None = field(
        default=None,
        metadata={
            "help": "labelled images: class folders, a list or a CSV with labels; default: those "
            "that the run was measured on"
        },
    )
    data_root: str | None = field(
        default=None,
        metadata={
            "help": "folder that the paths in a list or CSV are relative to; default: the file's "
            "own folder"
        },
    )
    follow_links: bool = field(
        default=False,
        metadata={
            "help": "follow links that lead out of a folder of images; no file is read twice in "
            "any case"
        },
    )
    mcm_scale: float | None = field(
        default=None,
        metadata={"help": "multiplies the cosines in the MCM score; default: the run's"},
    )
    out: str | None = field(
        default=None,
        metadata={"help": "CSV file for class and MCM score of each image, before and after"},
    )
    batch_size: int = field(default=192, metadata={"help": "images per step"})
    workers: int = field(default=2, metadata={"help": "processes that load images"})
    precision: Literal["fp32", "bf16", "fp16"] = field(
        default="fp32", metadata={"help": "of the image tower"}
    )
    device: str | None = field(
        default=None, metadata={"help": "cpu, cuda, ...; default: cuda where there is one"}
    )
    strict: bool = field(default=False, metadata={"help": "fail at an image that cannot be read"})

    def __post_init__(self) -> None:
        if self.mcm_scale is not None and not self.mcm_scale > 0:
            raise ValueError(f"mcm_scale must be positive, got {self.mcm_scale}")
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")
        if self.out is not None:
            _check_out(Path(self.out))


def _check_out(out: Path) -> None:
    """Refuse now what could not be written after the work."""
    if out.suffix.lower() != ".csv":
        raise ValueError(f"out={str(out)!r} must end in .csv, which is what is written")
    if out.exists():
        raise ValueError(f"out={str(out)!r} exists, and nothing is overwritten: choose another")
    for parent in out.parents:
        if parent.exists():
            if not parent.is_dir():
                raise ValueError(f"out={str(out)!r}: {parent} is a file, not a folder")
            return


@loading_errors()
def run(config: EvaluateConfig) -> None:
    """Measure both classifiers on the same images and print their metrics."""
    adapted = open_run(config.run, config.device)
    problem = reread_problem(adapted.folder)
    images = problem.tested
    if config.data is not None:
        check_root(config.data_root, config.data)
        found = read_images(config.data, root=config.data_root, follow_links=config.follow_links)
        images = Labelled.of(found, problem.known)
    if images.labels is None:
        raise ValueError(
            f"data={config.data or config.run!r} has no labels to measure by: "
            f"{images.note or 'give class folders, or a list or CSV with labels'}. To classify "
            "images without labels use ueo-fast score"
        )
    for remark in images.remarks():
        print(f"note: {remark}")
    zero_shot = make_classifier(
        adapted.clip.model,
        adapted.clip.tokenizer,
        problem.known,
        template=adapted.config.prompt_template,
        patch=False,
    )
    before = _predict(config, zero_shot, images, "zero-shot")
    images = _readable(config, images, before)
    after = _predict(config, adapted.classifier(), images, "adapted")
    scale = config.mcm_scale or adapted.config.mcm_scale
    rows = [_row("zeroshot", before.cosines, images.labels, scale)]
    if adapted.config.method != "zeroshot":
        rows.append(_row(adapted.config.method, after.cosines, images.labels, scale))
    print(f"{plural(len(images.images), 'image')}, {problem_line(images)}")
    print(metrics_table(rows))
    if config.out is not None:
        out = Path(config.out)
        out.parent.mkdir(parents=True, exist_ok=True)
        names = zero_shot.prompt.class_names
        rows_of = prediction_rows(images, names, before.cosines, after.cosines, scale)
        RunFolder(out.parent).write_csv(out.name, PREDICTION_COLUMNS, rows_of)
        print(f"predictions: {out}")


def problem_line(images: Labelled) -> str:
    """How many images are of known classes, and how many are not."""
    assert images.labels is not None
    known = int((images.labels >= 0).sum())
    return f"{known} of known classes and {len(images.labels) - known} of others"


def _row(name: str, cosines: Tensor, labels: Tensor | None, scale: float) -> dict[str, Any]:
    metrics = measure(cosines, labels, scale)
    if metrics is None:
        raise ValueError(
            "no image that can be read is of a known class, so there is nothing to measure"
        )
    return {"title": METHODS[name].title, **metrics.as_dict()}


def _predict(
    config: EvaluateConfig, classifier: ClipClassifier, images: Labelled, title: str
) -> Readable:
    batches = predict_batches(
        classifier,
        views_of(images.images, classifier.model, None).plain,
        batch_size=config.batch_size,
        num_workers=config.workers,
        precision=config.precision,
    )
    return collect(watched(title, len(images.images))(batches))


def _readable(config: EvaluateConfig, images: Labelled, seen: Readable) -> Labelled:
    if not seen.failures:
        return images
    names = images.images.names
    listed = [f"  {shown(names[place])}: {reason}" for place, reason in seen.failures]
    count = plural(len(listed), "image")
    if config.strict:
        raise ValueError(
            f"{count} cannot be read, the first is{listed[0][1:]}; leave out --strict to skip them"
        )
    print("\n".join([f"left out: {count} that cannot be read:", *listed]))
    return images.subset(seen.positions)
