"""A table of images: their most probable classes, their MCM score, and whether they are known."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from ueo_fast.finetune.clip.model import ClipClassifier
from ueo_fast.finetune.data.image_list import ImageList
from ueo_fast.finetune.data.names import plural, shown
from ueo_fast.finetune.evaluation.predict import cosine_error
from ueo_fast.finetune.evaluation.results_table import doubts
from ueo_fast.finetune.scoring.score_batches import score_batches
from ueo_fast.finetune.scoring.score_pass import (
    OnProgress,
    check_choice,
    check_images,
    fill_spool,
    ordered_scores,
    spooled_auroc,
)
from ueo_fast.finetune.scoring.score_rows import RowMaker
from ueo_fast.finetune.scoring.score_spool import ScoreSpool
from ueo_fast.finetune.scoring.score_unreadable import UnreadableList
from ueo_fast.finetune.scoring.score_writer import (
    ROWS,
    Scales,
    check_output,
    score_writer,
    unreadable_path,
)
from ueo_fast.finetune.scoring.thresholds import (
    Kind,
    Threshold,
    lowest_known,
    parse_threshold,
    threshold_of_sorted,
)
from ueo_fast.ranges import check_count, check_number


class ThresholdError(ValueError):
    """The scores allow no threshold. The table was written all the same, without verdicts."""


@dataclass(frozen=True)
class ScoreSummary:
    """What :func:`score_images` did.

    Attributes:
        out: the table.
        images: rows in it.
        known: images whose score reaches ``threshold``, to within rounding
            (:func:`~ueo_fast.finetune.scoring.thresholds.lowest_known`).
        unreadable: the first few images that were left out, as (name, reason).
        unreadable_count: all of them.
        unreadable_out: CSV that lists all of them; ``None`` if there are none.
        threshold: from this score on an image counts as known.
        kind: how it was chosen.
        lowest: score.
        highest: score.
        scales: what multiplied the cosines in the probabilities and in the scores.
        warnings: what makes the verdict doubtful, one sentence each.
    """

    out: Path
    images: int
    known: int
    unreadable: tuple[tuple[str, str], ...]
    unreadable_count: int
    unreadable_out: Path | None
    threshold: float
    kind: Kind
    lowest: float
    highest: float
    scales: Scales
    warnings: tuple[str, ...]

    @property
    def unknown(self) -> int:
        """Images below the threshold."""
        return self.images - self.known

    def text(self) -> str:
        """Several lines for a terminal."""
        how = "" if self.kind == "value" else f" ({self.kind})"
        lines = [
            f"{plural(self.images, 'image')} scored: {self.known} known, {self.unknown} unknown",
            f"known: MCM of {self.threshold:.9g}{how} or more; the scores range from "
            f"{self.lowest:.9g} to {self.highest:.9g}",
            f"MCM at scale {self.scales.mcm_scale:g}, probabilities at the model's own scale "
            f"{self.scales.probability_scale:.6g}: the two cannot be compared",
        ]
        if self.unreadable_count:
            lines.append(
                f"{plural(self.unreadable_count, 'image')} left out, all listed in "
                f"{self.unreadable_out}:"
            )
            lines += [f"  {shown(name)}: {reason}" for name, reason in self.unreadable]
            if self.unreadable_count > len(self.unreadable):
                lines.append("  ...")
        lines += [f"warning: {text}" for text in self.warnings]
        lines.append(f"table: {self.out}")
        return "\n".join(lines)


def score_images(
    classifier: ClipClassifier,
    images: ImageList,
    dataset: Dataset[Any] | Tensor,
    *,
    out: str | Path,
    top_k: int = 5,
    threshold: str | float | Threshold = "otsu",
    mcm_scale: float = 1.0,
    labels: Tensor | None = None,
    batch_size: int = 256,
    num_workers: int = 0,
    precision: str = "fp32",
    channels_last: bool = False,
    strict: bool = False,
    overwrite: bool = False,
    progress: OnProgress | None = None,
) -> ScoreSummary:
    """Score images into a CSV or Parquet file.

    The table has one row per image that can be read, in the order of ``images``: ``image`` (name),
    ``path``, ``class_1``, ``probability_1`` ... of the k most probable classes (softmax of the
    model's logits), ``mcm`` (largest softmax of ``mcm_scale`` times the cosines, in double
    precision), ``known`` (whether ``mcm`` reaches the threshold, to within rounding), ``label``
    (with ``labels``: the known class, or what the data says about an unknown one; else empty), and
    in every row what multiplied the cosines in the two kinds of softmax: ``probability_scale`` and
    ``mcm_scale``.

    Memory does not grow with the number of images, but for the names in ``images``: predictions
    wait in a temporary file beside ``out`` (24 + 8 k bytes per image, and 8 for the threshold)
    until the threshold is known, which is exact. ``out`` and the list of unreadable images,
    ``<out>.unreadable.csv``, appear when they are complete. On any error what was there before is
    kept, with one exception: where only the threshold fails the table is written without
    verdicts.

    Args:
        classifier: the model.
        images: N images.
        dataset: the same images un-augmented, preprocessed for the model.
        out: file that ends in ``.csv`` or ``.parquet``; its folder is made.
        top_k: k, cut to the number of classes.
        threshold: a number, ``"otsu"``, ``"gmm"``, ``"tpr95"`` (needs ``labels``), or what
            :func:`validation_threshold` returned.
        mcm_scale: multiplies the cosines; 1 as in the authors' code.
        labels: (N,) int64 position in the classifier's classes, -1 for unknown, as from
            ``match_labels``.
        batch_size: images per forward pass.
        num_workers: worker processes of the loader.
        precision: of the forward pass, as for ``predict_batches``.
        channels_last: memory layout, as for ``predict_batches``.
        strict: fail at the first image that cannot be read.
        overwrite: replace ``out`` and its list of unreadable images if they exist.
        progress: called after each batch with images done and N.

    Raises:
        ThresholdError: see above; the message has the way out.
        ValueError: an argument that is out of range, no image that can be read, or with ``strict``
            one that cannot.
        FileExistsError: ``out`` exists.
        OSError: ``out`` cannot be written, or the disk is full.
        ImportError: the format or the threshold needs a package that is not installed.
    """
    out = Path(out)
    names = tuple(classifier.prompt.class_names)
    choice = parse_threshold(threshold)
    check_count("top_k", top_k, least=1)
    check_number("mcm_scale", mcm_scale, sign="positive")
    check_images(images, dataset)
    check_choice(choice, labels, len(images), len(names))
    check_output(out, overwrite=overwrite)
    out.parent.mkdir(parents=True, exist_ok=True)
    top_k = min(top_k, len(names))
    batches = score_batches(
        classifier,
        dataset,
        top_k=top_k,
        mcm_scale=mcm_scale,
        batch_size=batch_size,
        num_workers=num_workers,
        precision=precision,
        channels_last=channels_last,
    )
    with (
        ScoreSpool(out.parent, top_k) as spool,
        UnreadableList(images, out.parent, strict=strict) as unreadable,
    ):
        fill_spool(spool, unreadable, batches, len(images), progress)
        warnings: list[str] = []
        value: float | None = None
        failure: ValueError | None = None
        try:
            value = threshold_of_sorted(
                choice, ordered_scores(choice, spool, labels), on_warning=warnings.append
            )
        except ValueError as error:  # hours of work are not thrown away for it
            failure = error
        cutoff = None
        if value is not None:
            rounding = cosine_error(precision, classifier.logit_scale.device)
            cutoff = lowest_known(value, mcm_scale, rounding)
        maker = RowMaker(images, names, labels, cutoff)
        scales = Scales(float(classifier.logit_scale), mcm_scale)
        with score_writer(out, names, top_k, scales) as writer:
            for rows in spool.blocks(ROWS):
                writer.write(maker.rows(rows))
            listed = unreadable.save(unreadable_path(out))  # first, so that no table lacks its list
        if listed is None:  # one from an earlier call would tell of other images
            unreadable_path(out).unlink(missing_ok=True)
        if value is None:
            raise ThresholdError(
                f"{failure}. The scores are in {out}, with the column 'known' left empty"
            ) from failure
        if choice.kind == "value" and maker.known in (0, len(spool)):
            warnings.append(
                f"threshold={value:g} makes every image {'known' if maker.known else 'unknown'}: "
                f"with {plural(len(names), 'class')} and mcm_scale={mcm_scale:g} their scores lie "
                f"between {maker.lowest:.6g} and {maker.highest:.6g}"
            )
        warnings += doubts(
            classes=names,
            predicted=maker.predicted,
            images=len(spool),
            auroc=spooled_auroc(spool, labels),
        )
        return ScoreSummary(
            out=out,
            images=len(spool),
            known=maker.known,
            unreadable=tuple(unreadable.shown),
            unreadable_count=unreadable.count,
            unreadable_out=listed,
            threshold=value,
            kind=choice.kind,
            lowest=maker.lowest,
            highest=maker.highest,
            scales=scales,
            warnings=tuple(warnings),
        )


def validation_threshold(
    classifier: ClipClassifier,
    images: ImageList,
    dataset: Dataset[Any] | Tensor,
    labels: Tensor | None,
    *,
    folder: str | Path,
    mcm_scale: float = 1.0,
    batch_size: int = 256,
    num_workers: int = 0,
    precision: str = "fp32",
    channels_last: bool = False,
    progress: OnProgress | None = None,
) -> tuple[Threshold, tuple[str, ...]]:
    """The ``tpr95`` threshold of labelled validation images, for images without labels.

    Args:
        classifier: the model.
        images: M validation images; one that cannot be read is an error.
        dataset: the same images.
        labels: (M,) int64, -1 for unknown, as from ``match_labels``.
        folder: existing folder for temporary files, 32 bytes per image.
        mcm_scale: as for :func:`score_images`, and the same; so are the others.
        batch_size: images per forward pass.
        num_workers: worker processes of the loader.
        precision: of the image tower.
        channels_last: memory format.
        progress: called after each batch with images done and M.

    Returns:
        The threshold, for :func:`score_images`, and what makes it doubtful.

    Raises:
        ValueError: no label of a known image, or an image that cannot be read.
    """
    choice = Threshold("tpr95")
    check_number("mcm_scale", mcm_scale, sign="positive")
    check_images(images, dataset)
    check_choice(choice, labels, len(images), len(classifier.prompt.class_names))
    batches = score_batches(
        classifier,
        dataset,
        top_k=1,
        mcm_scale=mcm_scale,
        batch_size=batch_size,
        num_workers=num_workers,
        precision=precision,
        channels_last=channels_last,
    )
    folder = Path(folder)
    with (
        ScoreSpool(folder, 1) as spool,
        UnreadableList(images, folder, strict=True) as unreadable,
    ):
        fill_spool(spool, unreadable, batches, len(images), progress)
        warnings: list[str] = []
        value = threshold_of_sorted(
            choice, ordered_scores(choice, spool, labels), on_warning=warnings.append
        )
    return Threshold("tpr95", value), tuple(warnings)
