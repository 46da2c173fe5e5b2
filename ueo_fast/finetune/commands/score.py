"""`ueo-fast score`: classes, probabilities, and known or unknown for each image."""

from __future__ import annotations

from pathlib import Path

from ueo_fast.finetune.clip.model import ClipClassifier
from ueo_fast.finetune.commands.adapted import open_adapted
from ueo_fast.finetune.commands.options import ScoreConfig
from ueo_fast.finetune.commands.problem import Labelled
from ueo_fast.finetune.data import Decoding
from ueo_fast.finetune.data.image_list import ImageList, check_root, read_images
from ueo_fast.finetune.data.loader import loading_errors
from ueo_fast.finetune.data.names import plural
from ueo_fast.finetune.data.views import views_of
from ueo_fast.finetune.evaluation.predict import image_bar
from ueo_fast.finetune.scoring.score_images import score_images, validation_threshold
from ueo_fast.finetune.scoring.score_table import check_output
from ueo_fast.finetune.scoring.thresholds import Threshold


@loading_errors()
def run(config: ScoreConfig) -> None:
    """Score the images, and say how many are known."""
    check_output(Path(config.out), overwrite=config.overwrite)
    check_root(config.data_root, config.data, config.validation)
    images = _read(config, config.data)
    validation = None if config.validation is None else _read(config, config.validation)
    adapted = open_adapted(config.run, config.device, config.model, config.pretrained)
    classifier, decode = adapted.classifier, config.decode or adapted.decode
    labelled = Labelled.of(images, classifier.prompt.class_names)
    scale = config.mcm_scale or adapted.mcm_scale
    if labelled.labels is None and not config.choice.needs_labels:
        labelled = Labelled(images, None)  # no note about labels that are not needed
    for remark in labelled.remarks():
        print(f"note: {remark}")
    threshold = config.choice
    if validation is not None:
        threshold = _threshold(config, classifier, validation, scale, decode)
    with image_bar("score", len(images)) as advance:
        summary = score_images(
            classifier,
            images,
            views_of(images, classifier.model, None, decode).plain,
            out=config.out,
            top_k=config.top_k,
            threshold=threshold,
            mcm_scale=scale,
            labels=labelled.labels,
            batch_size=config.speed.batch_size,
            num_workers=config.speed.num_workers,
            precision=config.speed.precision,
            strict=config.strict,
            overwrite=config.overwrite,
            progress=advance,
        )
    print(summary.text())


def _read(config: ScoreConfig, source: str) -> ImageList:
    return read_images(source, root=config.data_root, follow_links=config.follow_links)


def _threshold(
    config: ScoreConfig,
    classifier: ClipClassifier,
    images: ImageList,
    mcm_scale: float,
    decode: Decoding,
) -> Threshold:
    """The tpr95 threshold of the validation images; prints what makes it doubtful."""
    labelled = Labelled.of(images, classifier.prompt.class_names)
    if labelled.labels is None:
        raise ValueError(
            f"validation={config.validation!r} has no labels to take the threshold from: "
            f"{labelled.note or 'give class folders, or a list or CSV with labels'}"
        )
    for remark in labelled.remarks():
        print(f"note: {remark}")
    with image_bar("validation", len(images)) as advance:
        threshold, warnings = validation_threshold(
            classifier,
            images,
            views_of(images, classifier.model, None, decode).plain,
            labelled.labels,
            mcm_scale=mcm_scale,
            batch_size=config.speed.batch_size,
            num_workers=config.speed.num_workers,
            precision=config.speed.precision,
            progress=advance,
        )
    known = int((labelled.labels >= 0).sum())
    print(f"threshold from {plural(known, 'validation image')} of known classes")
    for text in warnings:
        print(f"warning: {text}")
    return threshold
