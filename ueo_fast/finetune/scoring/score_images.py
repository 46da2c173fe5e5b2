"""Score images: their most probable classes, their MCM score, and whether they are known."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from ueo_fast import mcm_score
from ueo_fast.finetune.clip.model import ClipClassifier
from ueo_fast.finetune.data.image_list import ImageList
from ueo_fast.finetune.data.names import plural, shown
from ueo_fast.finetune.engine.training_config import ImagePass, Precision
from ueo_fast.finetune.evaluation.predict import Failure, cosine_error, predict_batches
from ueo_fast.finetune.evaluation.results_table import doubts
from ueo_fast.finetune.scoring.score_table import (
    Scales,
    ScoreTable,
    check_output,
    prepare_folder,
    row_type,
    write_table,
)
from ueo_fast.finetune.scoring.thresholds import (
    Kind,
    Threshold,
    check_threshold,
    choose_threshold,
    lowest_known,
    parse_threshold,
)
from ueo_fast.ranges import check_count, check_number

SHOWN = 5
"""Unreadable images that a summary names; the file lists all."""

OnProgress = Callable[[int, int], None]
"""Called after each batch with images done and images in all."""


class ThresholdError(ValueError):
    """The scores allow no threshold. The table was written anyway, without verdicts."""


@dataclass(frozen=True)
class ScoreSummary:
    """What :func:`score_images` did.

    Attributes:
        out: the table.
        images: rows in it.
        known: images whose score reaches ``threshold``, to within rounding
            (:func:`~ueo_fast.finetune.scoring.thresholds.lowest_known`).
        unreadable: the first few images that were left out, as (name, reason).
        unreadable_count: the number of images that were left out.
        unreadable_out: the CSV that lists all of them; ``None`` if there are none.
        threshold: from this score on an image counts as known.
        kind: how it was chosen.
        lowest: the lowest score.
        highest: the highest score.
        scales: what multiplied the cosines in the probabilities and in the scores.
        warnings: what makes the verdicts doubtful, one sentence each.
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


class ScoredBatch(NamedTuple):
    """The scores of a batch, B images of which have one.

    Attributes:
        positions: (B,) int64.
        scores: (B,) float64, MCM.
        classes: (B, k) int64, the most probable first.
        probabilities: (B, k) float32, softmax of the logits.
        failures: the other images of the batch.
        cosines: (B, C) float32.
    """

    positions: Tensor
    scores: Tensor
    classes: Tensor
    probabilities: Tensor
    failures: tuple[Failure, ...]
    cosines: Tensor


def score_batches(
    classifier: ClipClassifier,
    images: Dataset[Any] | Tensor,
    *,
    top_k: int,
    mcm_scale: float = 1.0,
    precision: str = "fp32",
    **options: Any,
) -> Iterator[ScoredBatch]:
    """Compute probabilities and MCM scores batch by batch, in the order of ``images``.

    An image whose cosines are not finite is a failure, like one that cannot be read: one such image
    among millions must not stop the others, and its score must not pass for a number.

    Args:
        classifier: the model.
        images: as for ``predict_batches``.
        top_k: k, at most the number of classes.
        mcm_scale: multiplies the cosines in the MCM score.
        precision: of the image tower, as for ``predict_batches``.
        options: the other fields of an ``ImagePass``.
    """
    logit_scale = float(classifier.logit_scale)
    how = ImagePass(precision=cast("Precision", precision), **options)
    predicted = predict_batches(classifier, images, how)
    for positions, cosines, failures, _ in predicted:
        finite = torch.isfinite(cosines).all(dim=1)
        broken = tuple(
            Failure(row, f"the model's answer is not a finite number (precision={precision})")
            for row in positions[~finite].tolist()
        )
        # In double, as in the metrics: at scale 1 the scores differ in their last digits.
        cosines = cosines[finite]
        exact = cosines.double()
        probabilities, classes = (logit_scale * exact).softmax(dim=1).topk(top_k, dim=1)
        yield ScoredBatch(
            positions[finite],
            mcm_score(exact, mcm_scale),
            classes,
            probabilities.float(),
            (*failures, *broken),
            cosines,
        )


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
    precision: str = "fp32",
    strict: bool = False,
    overwrite: bool = False,
    progress: OnProgress | None = None,
    **options: Any,
) -> ScoreSummary:
    """Score images into a CSV or Parquet file.

    The table has one row per image that can be read, in the order of ``images``: ``image`` (name),
    ``path``, ``class_1``, ``probability_1`` ... of the k most probable classes (softmax of the
    model's logits), ``mcm`` (largest softmax of ``mcm_scale`` times the cosines, in double
    precision), ``known`` (whether ``mcm`` reaches the threshold, to within rounding), ``label``
    (with ``labels``: the known class, or what the data calls an unknown one; else empty), and in
    every row what multiplied the cosines in the two kinds of softmax: ``probability_scale`` and
    ``mcm_scale``.

    Scores stay in memory until the last image is scored, because the threshold may depend on all of
    them: 16 + 8 k bytes per image (56 for k = 5), and another 100 for a moment at the end. A
    million images take 0.2 GB, and 2.9 GB with k = 345, besides their names and paths in
    ``images``. An image that cannot be read takes some 300 bytes.

    ``out`` and the list of unreadable images, ``<out>.unreadable.csv``, are written atomically at
    the end. On any error the files that were there before are kept, with one exception: if only the
    threshold fails, the table is written without verdicts.

    Args:
        classifier: the model.
        images: N images.
        dataset: the same images, un-augmented and preprocessed for the model.
        out: a file that ends in ``.csv`` or ``.parquet``; its folder is made.
        top_k: k, cut to the number of classes.
        threshold: a number, ``"otsu"``, ``"gmm"``, ``"tpr95"`` (needs ``labels``), or a result of
            :func:`validation_threshold`.
        mcm_scale: multiplies the cosines; 1 as in the authors' code.
        labels: (N,) int64 position in the classifier's classes, -1 for unknown, as from
            ``match_labels``.
        precision: of the image tower, as for ``predict_batches``.
        strict: fail at the first image that cannot be read.
        overwrite: replace ``out`` and its list of unreadable images if they exist.
        progress: called after each batch with images done and N.
        options: the other fields of an ``ImagePass``.

    Raises:
        ThresholdError: see above; the message has the way out.
        ValueError: an argument is out of range, no image can be read, or with ``strict`` one
            cannot.
        FileExistsError: ``out`` exists.
        OSError: ``out`` cannot be written, or the disk is full.
        MemoryError: the scores cannot fit into memory.
        ImportError: the format or the threshold needs a package that is not installed.
    """
    out = Path(out)
    names = tuple(classifier.prompt.class_names)
    choice = parse_threshold(threshold)
    check_count("top_k", top_k, least=1)
    _check_images(images, dataset, choice, labels, names, mcm_scale)
    check_output(out, overwrite=overwrite)
    prepare_folder(out.parent)
    top_k = min(top_k, len(names))
    batches = score_batches(
        classifier, dataset, top_k=top_k, mcm_scale=mcm_scale, precision=precision, **options
    )
    rows, failures = _collect(batches, images, top_k, strict, progress)
    scores = rows["score"]
    positions = None if labels is None else labels.cpu().numpy()
    is_known = None if positions is None else positions[rows["position"]] >= 0
    warnings: list[str] = []
    failure: ValueError | None = None
    known: NDArray[np.bool_] | None = None
    try:
        value = choose_threshold(choice, scores, is_known, on_warning=warnings.append)
    except ValueError as error:  # write the table anyway: it may be the work of hours
        failure = error
    else:
        rounding = cosine_error(precision, classifier.logit_scale.device)
        known = scores >= lowest_known(value, mcm_scale, rounding)
    scales = Scales(float(classifier.logit_scale), mcm_scale)
    table = ScoreTable(images, names, rows, failures, known, positions, scales)
    listed = write_table(out, table)
    if known is None:
        raise ThresholdError(
            f"{failure}. The scores are in {out}, with the column 'known' left empty"
        ) from failure
    lowest, highest, count = float(scores.min()), float(scores.max()), int(known.sum())
    if choice.kind == "value" and count in (0, len(rows)):
        warnings.append(
            f"threshold={value:g} makes every image {'known' if count else 'unknown'}: with "
            f"{plural(len(names), 'class')} and mcm_scale={mcm_scale:g} their scores lie between "
            f"{lowest:.6g} and {highest:.6g}"
        )
    auroc = None
    if is_known is not None and 0 < is_known.sum() < len(is_known):
        from sklearn.metrics import roc_auc_score  # slow to import, and only needed with labels

        auroc = float(roc_auc_score(is_known, scores))
    predicted = np.unique(rows["classes"][:, 0]).tolist()
    warnings += doubts(classes=names, predicted=predicted, images=len(rows), auroc=auroc)
    return ScoreSummary(
        out=out,
        images=len(rows),
        known=count,
        unreadable=tuple((images.names[i], reason) for i, reason in failures[:SHOWN]),
        unreadable_count=len(failures),
        unreadable_out=listed,
        threshold=value,
        kind=choice.kind,
        lowest=lowest,
        highest=highest,
        scales=scales,
        warnings=tuple(warnings),
    )


def validation_threshold(
    classifier: ClipClassifier,
    images: ImageList,
    dataset: Dataset[Any] | Tensor,
    labels: Tensor | None,
    *,
    mcm_scale: float = 1.0,
    progress: OnProgress | None = None,
    **options: Any,
) -> tuple[Threshold, tuple[str, ...]]:
    """Choose the ``tpr95`` threshold from labelled validation images, for images without labels.

    Args:
        classifier: the model.
        images: M validation images; one that cannot be read is an error.
        dataset: the same images.
        labels: (M,) int64, -1 for unknown, as from ``match_labels``.
        mcm_scale: as in the later call of :func:`score_images`; so are ``options``.
        progress: called after each batch with images done and M.
        options: as for :func:`score_images`.

    Returns:
        The threshold, for :func:`score_images`, and what makes it doubtful.

    Raises:
        ValueError: no label is a known class, or an image cannot be read.
    """
    choice = Threshold("tpr95")
    names = tuple(classifier.prompt.class_names)
    _check_images(images, dataset, choice, labels, names, mcm_scale)
    batches = score_batches(classifier, dataset, top_k=1, mcm_scale=mcm_scale, **options)
    rows, _ = _collect(batches, images, 1, True, progress)
    is_known = None if labels is None else (labels >= 0).cpu().numpy()[rows["position"]]
    warnings: list[str] = []
    value = choose_threshold(choice, rows["score"], is_known, on_warning=warnings.append)
    return Threshold("tpr95", value), tuple(warnings)


def _check_images(
    images: ImageList,
    dataset: Dataset[Any] | Tensor,
    choice: Threshold,
    labels: Tensor | None,
    names: tuple[str, ...],
    mcm_scale: float,
) -> None:
    check_number("mcm_scale", mcm_scale, sign="positive")
    count = len(cast(Sized, dataset))
    if count != len(images):
        raise ValueError(
            f"dataset has {plural(count, 'image')}, but images lists {len(images)}: they must be "
            "the same images in the same order"
        )
    if count == 0:
        raise ValueError("images is empty: there is nothing to score")
    check_threshold(choice, labels, count, len(names))


def _collect(
    batches: Iterator[ScoredBatch],
    images: ImageList,
    top_k: int,
    strict: bool,
    progress: OnProgress | None,
) -> tuple[NDArray[Any], list[Failure]]:
    """All rows of a table, in the order of ``images``, and the images that have none."""
    total, kind = len(images), row_type(top_k)
    try:
        rows = np.empty(total, kind)
    except MemoryError as error:
        raise MemoryError(
            f"the scores of {plural(total, 'image')} with top_k={top_k} take "
            f"{total * kind.itemsize / 1e9:,.1f} GB of memory: choose a smaller top_k (--top-k), "
            "or score the images in parts"
        ) from error
    failures: list[Failure] = []
    count = 0
    for batch in batches:
        if strict and batch.failures:
            position, reason = batch.failures[0]
            raise ValueError(
                f"{shown(images.names[position])}: {reason}; without --strict it is listed and "
                "left out"
            )
        failures += batch.failures
        block = rows[count : count + len(batch.positions)]
        block["position"] = batch.positions.numpy()
        block["score"] = batch.scores.numpy()
        block["classes"] = batch.classes.numpy()
        block["probabilities"] = batch.probabilities.numpy()
        count += len(block)
        if progress is not None:
            progress(count + len(failures), total)
    if not count:
        name, reason = images.names[failures[0].position], failures[0].reason
        raise ValueError(
            f"not one of {plural(total, 'image')} can be scored; {shown(name)}: {reason}; check "
            "the folder, and open one of them in a viewer"
        )
    return rows[:count], failures
