"""`ueo-fast evaluate`: zero-shot next to adapted on labelled images."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ueo_fast.finetune.clip.model import ClipClassifier, make_classifier
from ueo_fast.finetune.commands.adapted import open_run
from ueo_fast.finetune.commands.options import EvaluateConfig
from ueo_fast.finetune.commands.problem import Labelled, reread_problem
from ueo_fast.finetune.commands.results import (
    known_counts,
    measure,
    metrics_table,
    prediction_rows,
    verdict_line,
    warning_lines,
)
from ueo_fast.finetune.data import Decoding
from ueo_fast.finetune.data.copies import temporary_copies
from ueo_fast.finetune.data.image_list import check_root, read_images
from ueo_fast.finetune.data.loader import loading_errors
from ueo_fast.finetune.data.names import plural, shown
from ueo_fast.finetune.data.views import views_of
from ueo_fast.finetune.engine.training_config import ImagePass
from ueo_fast.finetune.evaluation.predict import Predicted, collect, predict_batches, watched
from ueo_fast.finetune.files.run_files import PREDICTION_COLUMNS
from ueo_fast.finetune.files.run_folder import RunFolder

if TYPE_CHECKING:
    from ueo_fast.finetune.data.copies import Copies


@loading_errors()
def run(config: EvaluateConfig) -> None:
    """Measure both classifiers on the same images and print their metrics."""
    adapted = open_run(config.run, config.device, config.model, config.pretrained)
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
        template=adapted.config.model.prompt_template,
        patch=False,
        logit_scale=adapted.config.model.logit_scale,
    )
    decode = config.decode or adapted.config.data.decode
    with temporary_copies("auto", decode) as copies:
        before = _predict(zero_shot, images, decode, copies, config.speed, "zero-shot")
        images = _readable(images, before, strict=config.strict)
        classifier = adapted.classifier()
        after = _predict(classifier, images, decode, copies, config.speed, "adapted")
    scale = config.mcm_scale or adapted.config.method.mcm_scale
    method, seed = adapted.config.method.method, adapted.config.training.seed
    cosines = {"zeroshot": before.cosines, method: after.cosines}
    measured = [
        measure(each, images.labels, scale, method=name, seed=seed)
        for name, each in cosines.items()
    ]
    records = [record for record in measured if record is not None]
    if not records:
        raise ValueError(
            "no image that can be read is of a known class, so there is nothing to measure"
        )
    counts = known_counts(after.cosines, scale)
    names = zero_shot.prompt.class_names
    print(warning_lines(names, after.cosines, records[-1]), end="")
    print(verdict_line(method, records, before.cosines, after.cosines, counts))
    print(
        f"{plural(len(images.images), 'image')}, {records[0].known_images} of known classes and "
        f"{records[0].unknown_images} of others"
    )
    print(metrics_table(records))
    if config.out is not None:
        out = Path(config.out)
        out.parent.mkdir(parents=True, exist_ok=True)
        rows_of = prediction_rows(
            images, names, before.cosines, after.cosines, scale, counts.threshold
        )
        RunFolder(out.parent).write_csv(out.name, PREDICTION_COLUMNS, rows_of)
        print(f"predictions: {out}")


def _predict(
    classifier: ClipClassifier,
    images: Labelled,
    decode: Decoding,
    copies: Copies | None,
    how: ImagePass,
    title: str,
) -> Predicted:
    plain = views_of(images.images, classifier.model, None, decode, copies).plain
    batches = predict_batches(classifier, plain, how)
    return collect(watched(title, len(images.images))(batches))


def _readable(images: Labelled, seen: Predicted, *, strict: bool) -> Labelled:
    if not seen.failures:
        return images
    names = images.images.names
    listed = [f"  {shown(names[place])}: {reason}" for place, reason in seen.failures]
    count = plural(len(listed), "image")
    if strict:
        raise ValueError(
            f"{count} cannot be read, the first is{listed[0][1:]}; leave out --strict to skip them"
        )
    print("\n".join([f"left out: {count} that cannot be read:", *listed]))
    return images.subset(seen.positions)
