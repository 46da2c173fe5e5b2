"""Recognition of the known classes and detection of the unknown ones.

Conventions, the authors' where they have one:

- All numbers are fractions in 0..1; multiply by 100 to compare with the paper's tables.
- Known images are the *positive* class of AUROC, AUPR and FPR95; the score is MCM, the maximum
  softmax probability (Ming et al., 2022, arXiv 2211.13445). FPR95 is thus the share of unknown
  images taken for known at the highest threshold that keeps at least 95% of the known ones.
- AUPR is average precision, without interpolation.
- Accuracies are over images of known classes only. Per-class accuracy averages over the known
  classes that have test images; the others are left out and listed.
- HM is the harmonic mean of per-class accuracy and AUROC.
- What is not defined is ``None``, never NaN: AUROC, AUPR, FPR95 and HM without unknown images.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ueo_fast import mcm_score

POSITIVE_CLASS = "known"
"""The positive class of AUROC, AUPR and FPR95; said in every report."""


@dataclass(frozen=True)
class Metrics:
    """Fractions in 0..1, known as positive; the module's docstring has the conventions.

    Attributes:
        per_class_accuracy: mean over the known classes that have test images.
        accuracy: share of the known images that are classified correctly.
        auroc: area under the ROC curve of MCM, or ``None`` without unknown images; so are the
            next three.
        aupr: average precision of MCM.
        fpr95: false positive rate at 95% true positive rate of MCM.
        hm: harmonic mean of ``per_class_accuracy`` and ``auroc``.
        class_accuracies: accuracy of each known class; ``None`` for a class without test images.
        missing_classes: indices of the known classes without test images.
        known_images: number of test images of known classes.
        unknown_images: number of test images of unknown classes.
    """

    per_class_accuracy: float
    accuracy: float
    auroc: float | None
    aupr: float | None
    fpr95: float | None
    hm: float | None
    class_accuracies: tuple[float | None, ...]
    missing_classes: tuple[int, ...]
    known_images: int
    unknown_images: int

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers, lists and ``None``, plus ``"positive_class"``: what JSON can hold."""
        values = asdict(self)
        values["class_accuracies"] = list(self.class_accuracies)
        values["missing_classes"] = list(self.missing_classes)
        return values | {"positive_class": POSITIVE_CLASS}


def compute_metrics(cosines: Tensor, labels: Tensor, *, mcm_scale: float = 1.0) -> Metrics:
    """Metrics of a test set.

    Args:
        cosines: (N, C) floating point, cosine similarity of each image with each known class. The
            prediction is the largest of a row.
        labels: (N,) integer. 0..C-1 is the known class; -1, or any label >= C as in the authors'
            code, is an unknown one.
        mcm_scale: multiplies the cosines before the softmax of the MCM score; 1 is the authors'.

    Raises:
        ValueError: shapes that do not match, labels that are not integers or below -1, cosines
            that are not finite, or no image of a known class.
    """
    _check(cosines, labels)
    # In double, so that rounding in the softmax does not order images whose scores are all but
    # equal, as they are at scale 1; on the CPU, because not every device has doubles.
    cosines = cosines.detach().cpu().double()
    labels = labels.cpu().long()
    classes = cosines.shape[1]
    is_known = (labels >= 0) & (labels < classes)
    known_labels = labels[is_known]
    correct = cosines[is_known].argmax(dim=1) == known_labels
    counts = torch.bincount(known_labels, minlength=classes).tolist()
    hits = torch.bincount(known_labels[correct], minlength=classes).tolist()
    class_accuracies = tuple(h / n if n else None for h, n in zip(hits, counts, strict=True))
    present = [value for value in class_accuracies if value is not None]
    per_class_accuracy = sum(present) / len(present)
    unknown_images = len(labels) - sum(counts)
    auroc = aupr = fpr95 = hm = None
    if unknown_images:
        auroc, aupr, fpr95 = detection_metrics(mcm_score(cosines, mcm_scale), is_known)
        hm = harmonic_mean(per_class_accuracy, auroc)
    return Metrics(
        per_class_accuracy=per_class_accuracy,
        accuracy=sum(hits) / sum(counts),
        auroc=auroc,
        aupr=aupr,
        fpr95=fpr95,
        hm=hm,
        class_accuracies=class_accuracies,
        missing_classes=tuple(i for i, n in enumerate(counts) if n == 0),
        known_images=sum(counts),
        unknown_images=unknown_images,
    )


def detection_metrics(scores: Tensor, is_known: Tensor) -> tuple[float, float, float]:
    """AUROC, AUPR and FPR95 of a score that is high for known images, known as positive.

    Args:
        scores: (N,) floating point, any range; equal scores are ties.
        is_known: (N,) bool, with at least one of each.

    Returns:
        AUROC, AUPR (average precision) and FPR95, fractions in 0..1.

    Raises:
        ValueError: shapes that do not match, NaN scores, or only known or only unknown images.
    """
    from sklearn.metrics import auc, average_precision_score, roc_curve  # slow to import

    if scores.ndim != 1 or scores.shape != is_known.shape:
        raise ValueError(
            f"scores has shape {tuple(scores.shape)} and is_known {tuple(is_known.shape)}; "
            "expected (N,) both"
        )
    scores, is_known = scores.detach().cpu(), is_known.cpu()
    if torch.isnan(scores).any():
        raise ValueError(f"scores has {int(torch.isnan(scores).sum())} NaN; none can be ranked")
    positives = int(is_known.sum())
    if not 0 < positives < len(is_known):
        raise ValueError(
            f"is_known marks {positives} of {len(is_known)} images; a detection metric needs known "
            "and unknown ones"
        )
    # Ranks, as only the order matters and scikit-learn refuses infinite scores.
    ranks = torch.unique(scores, return_inverse=True)[1].numpy()
    target = is_known.numpy()
    fpr, tpr, _ = roc_curve(target, ranks, drop_intermediate=False)
    return (
        float(auc(fpr, tpr)),
        float(average_precision_score(target, ranks)),
        float(fpr[tpr >= 0.95].min()),
    )


def harmonic_mean(first: float, second: float) -> float:
    """``2 ab / (a + b)`` of two fractions; 0 where both are 0."""
    return 2 * first * second / (first + second) if first + second else 0.0


def _check(cosines: Tensor, labels: Tensor) -> None:
    if cosines.ndim != 2 or cosines.shape[1] == 0 or labels.shape != cosines.shape[:1]:
        raise ValueError(
            f"cosines has shape {tuple(cosines.shape)} and labels {tuple(labels.shape)}; expected "
            "(N, C) with C >= 1, and (N,)"
        )
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"labels has dtype {labels.dtype}; expected integer class indices")
    labels = labels.long()  # an unsigned type cannot be compared with -1
    if (labels < -1).any():
        raise ValueError(
            f"labels has {int(labels.min())}; expected 0..{cosines.shape[1] - 1} for a known class "
            "and -1 for an unknown one"
        )
    broken = int((~torch.isfinite(cosines)).any(dim=1).sum())
    if broken:
        raise ValueError(
            f"cosines has {broken} of {len(cosines)} rows that are not finite; the model diverged "
            "or its features were not normalised"
        )
    if not ((labels >= 0) & (labels < cosines.shape[1])).any():
        raise ValueError(
            f"none of the {len(labels)} labels is a known class (0..{cosines.shape[1] - 1}), so "
            "accuracy is not defined; test on images of known classes too"
        )
