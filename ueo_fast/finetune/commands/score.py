"""`ueo-fast score`: classes, probabilities, and known or unknown for each image."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from tqdm import tqdm

from ueo_fast.finetune.adaptation import views_of
from ueo_fast.finetune.clip.model import ClipClassifier
from ueo_fast.finetune.commands.adapted import open_run
from ueo_fast.finetune.commands.problem import Labelled
from ueo_fast.finetune.data.image_list import ImageList, check_root, read_images
from ueo_fast.finetune.data.loader import loading_errors
from ueo_fast.finetune.data.names import plural
from ueo_fast.finetune.scoring.score import score_images, validation_threshold
from ueo_fast.finetune.scoring.score_writer import check_output
from ueo_fast.finetune.scoring.thresholds import Threshold, parse_threshold


@dataclass(frozen=True)
class ScoreConfig:
    """Choices of ``ueo-fast score``.

    Raises:
        ValueError: a value outside its range.
    """

    run: str = field(metadata={"help": "folder of a run of ueo-fast finetune"})
    data: str = field(
        metadata={"help": "the images: a folder, a list file, a CSV, or one image file"}
    )
    out: str = field(metadata={"help": "the table to write: a file that ends in .csv or .parquet"})
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
    top_k: int = field(default=5, metadata={"help": "classes per image"})
    threshold: str | None = field(
        default=None,
        metadata={
            "help": "from which MCM score on an image counts as known: a number; otsu (splits the "
            "scores into two groups of least spread; needs many images, some of each kind); gmm "
            "(two Gaussians fitted to the scores; the same needs); tpr95 (keeps 95% of the known "
            "images; needs --validation, or labels in --data); default: otsu, with --validation "
            "tpr95"
        },
    )
    validation: str | None = field(
        default=None,
        metadata={
            "help": "labelled images, given like --data, from which the threshold tpr95 is taken; "
            "all must be readable. Best are images that the run was not trained on"
        },
    )
    mcm_scale: float | None = field(
        default=None,
        metadata={"help": "multiplies the cosines in the MCM score; default: the run's"},
    )
    strict: bool = field(default=False, metadata={"help": "fail at an image that cannot be read"})
    overwrite: bool = field(default=False, metadata={"help": "replace --out if it exists"})
    batch_size: int = field(default=192, metadata={"help": "images per step"})
    workers: int = field(default=2, metadata={"help": "processes that load images"})
    precision: Literal["fp32", "bf16", "fp16"] = field(
        default="fp32", metadata={"help": "of the image tower"}
    )
    device: str | None = field(
        default=None, metadata={"help": "cpu, cuda, ...; default: cuda where there is one"}
    )

    def __post_init__(self) -> None:
        for name in ("top_k", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.mcm_scale is not None and not self.mcm_scale > 0:
            raise ValueError(f"mcm_scale must be positive, got {self.mcm_scale}")
        if self.validation is not None and self.choice != Threshold("tpr95"):
            raise ValueError(
                f"threshold={self.threshold!r} has no use for validation={self.validation!r}: give "
                "--threshold tpr95, or leave out one of the two"
            )

    @property
    def choice(self) -> Threshold:
        """``threshold``, or its default."""
        return parse_threshold(self.threshold or ("otsu" if self.validation is None else "tpr95"))


@loading_errors()
def run(config: ScoreConfig) -> None:
    """Score the images, and say how many are known."""
    check_output(Path(config.out), overwrite=config.overwrite)
    check_root(config.data_root, config.data, config.validation)
    images = _read(config, config.data)
    validation = None if config.validation is None else _read(config, config.validation)
    adapted = open_run(config.run, config.device)
    classifier = adapted.classifier()
    labelled = Labelled.of(images, classifier.prompt.class_names)
    scale = config.mcm_scale or adapted.config.mcm_scale
    if labelled.labels is None and not config.choice.needs_labels:
        labelled = Labelled(images, None)  # without a note on what nobody asked for
    for remark in labelled.remarks():
        print(f"note: {remark}")
    threshold = config.choice
    if validation is not None:
        threshold = _threshold(config, classifier, validation, scale)
    with tqdm(total=len(images), desc="score", unit="image", leave=False) as bar:
        summary = score_images(
            classifier,
            images,
            views_of(images, classifier.model, None).plain,
            out=config.out,
            top_k=config.top_k,
            threshold=threshold,
            mcm_scale=scale,
            labels=labelled.labels,
            batch_size=config.batch_size,
            num_workers=config.workers,
            precision=config.precision,
            strict=config.strict,
            overwrite=config.overwrite,
            progress=lambda done, total: bar.update(done - bar.n),
        )
    print(summary.text())


def _read(config: ScoreConfig, source: str) -> ImageList:
    return read_images(source, root=config.data_root, follow_links=config.follow_links)


def _threshold(
    config: ScoreConfig, classifier: ClipClassifier, images: ImageList, mcm_scale: float
) -> Threshold:
    """tpr95 of the validation images; says what makes it doubtful."""
    labelled = Labelled.of(images, classifier.prompt.class_names)
    if labelled.labels is None:
        raise ValueError(
            f"validation={config.validation!r} has no labels to take the threshold from: "
            f"{labelled.note or 'give class folders, or a list or CSV with labels'}"
        )
    for remark in labelled.remarks():
        print(f"note: {remark}")
    folder = Path(config.out).parent
    folder.mkdir(parents=True, exist_ok=True)
    with tqdm(total=len(images), desc="validation", unit="image", leave=False) as bar:
        threshold, warnings = validation_threshold(
            classifier,
            images,
            views_of(images, classifier.model, None).plain,
            labelled.labels,
            folder=folder,
            mcm_scale=mcm_scale,
            batch_size=config.batch_size,
            num_workers=config.workers,
            precision=config.precision,
            progress=lambda done, total: bar.update(done - bar.n),
        )
    known = int((labelled.labels >= 0).sum())
    print(f"threshold from {plural(known, 'validation image')} of known classes")
    for text in warnings:
        print(f"warning: {text}")
    return threshold
