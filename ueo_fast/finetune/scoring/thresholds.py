"""The score from which on an image counts as known: four ways to choose it.

Convention, as in :mod:`ueo_fast.finetune.evaluation.metrics`: known is positive. An image is known
if its score reaches the threshold, to within the rounding of a score (:func:`lowest_known`). All
four look at every score, not at a histogram; only the mixture is fitted to at most
:data:`MIXTURE_POINTS` quantiles.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ueo_fast.finetune.data.names import plural
from ueo_fast.ranges import check_one_of

if TYPE_CHECKING:
    from torch import Tensor

Kind = Literal["value", "otsu", "gmm", "tpr95"]
Scores = NDArray[np.float64]
OnWarning = Callable[[str], None]

MIXTURE_POINTS = 20_000
"""A mixture of more scores than this is fitted to this many evenly spaced quantiles."""

WAY_OUT = "give a number, or tpr95 with labelled images"


@dataclass(frozen=True)
class Threshold:
    """A choice of ``--threshold``.

    Attributes:
        kind: ``"value"``: the number ``value``. ``"otsu"``: split the scores where the variance
            between the two parts is largest; needs only scores, and finds a split even if there is
            none. ``"gmm"``: fit a mixture of two Gaussians, and split where both are equally
            probable; needs only scores. ``"tpr95"``: the highest threshold that keeps at least
            95 % of the known images; needs labels.
        value: the number. For another kind, the threshold that was chosen from other images (a
            validation set); ``None``: choose it from the scores.

    Raises:
        ValueError: unknown ``kind``, or a value that is missing or outside 0..1.
    """

    kind: Kind
    value: float | None = None

    def __post_init__(self) -> None:
        check_one_of("kind", self.kind, get_args(Kind))
        if self.value is None:
            if self.kind == "value":
                raise ValueError("kind='value' needs a value, e.g. Threshold('value', 0.5)")
        elif not 0 <= self.value <= 1:
            raise ValueError(
                f"threshold={self.value} lies outside 0..1, but the MCM score is a probability; "
                "it is at least 1 / (number of classes)"
            )

    @property
    def needs_labels(self) -> bool:
        """Whether scores alone are not enough."""
        return self.kind == "tpr95" and self.value is None


def parse_threshold(text: str | float | Threshold) -> Threshold:
    """Read a number, ``"otsu"``, ``"gmm"`` or ``"tpr95"``, as a user writes it.

    Raises:
        TypeError, ValueError: neither; the message lists the choices.
    """
    if isinstance(text, Threshold):
        return text
    if isinstance(text, bool) or not isinstance(text, str | Real):
        raise TypeError(f"threshold must be {_kinds()}, got {type(text).__name__} {text!r}")
    if isinstance(text, str):
        name = text.strip().lower()
        for kind in get_args(Kind):
            if name == kind and kind != "value":
                return Threshold(kind)
        try:
            text = float(name)
        except ValueError:
            raise ValueError(f"threshold={text!r} is unknown; choose {_kinds()}") from None
    return Threshold("value", float(text))


def check_threshold(choice: Threshold, labels: Tensor | None, count: int, classes: int) -> None:
    """Check what can be checked before the images are scored.

    Args:
        choice: the threshold to choose.
        labels: (N,) position in the classes, -1 for unknown; ``None``: no labels.
        count: N.
        classes: number of classes.

    Raises:
        ValueError: ``labels`` does not fit or is missing, or a split is asked for and there is only
            one class.
        ImportError: ``gmm`` without scikit-learn.
    """
    if choice == Threshold("gmm"):
        require_mixture()
    if labels is not None and (
        labels.shape != (count,) or int(labels.amin()) < -1 or int(labels.amax()) >= classes
    ):
        raise ValueError(
            f"labels has shape {tuple(labels.shape)} and values from {int(labels.amin())} to "
            f"{int(labels.amax())}; expected ({count},) and -1..{classes - 1}, -1 for unknown"
        )
    if choice.needs_labels and labels is None:
        raise ValueError(_needs_labels("the images have no labels that match a class"))
    if choice.needs_labels and labels is not None and not bool((labels >= 0).any()):
        raise ValueError(_needs_labels("no label is a known class"))
    if classes == 1 and choice.kind in ("otsu", "gmm"):
        raise ValueError(
            f"threshold={choice.kind!r} splits the scores in two, but with a single class the MCM "
            "score of every image is 1; list more classes (such as what else may be in the "
            "images), or give a number"
        )


def choose_threshold(
    kind: str | float | Threshold,
    scores: ArrayLike,
    is_known: ArrayLike | None = None,
    *,
    on_warning: OnWarning | None = None,
) -> float:
    """Choose the threshold of some scores.

    Args:
        kind: as for :func:`parse_threshold`.
        scores: (N,), in any order; left unchanged.
        is_known: (N,) bool, true for images of a known class; only ``tpr95`` needs it.
        on_warning: called with a sentence if the threshold means little; default: a Python warning.

    Returns:
        t; an image is known from ``lowest_known(t, ...)`` on.

    Raises:
        ValueError: the scores are NaN, too few or all equal, no known image is labelled where
            labels are needed, or the mixture does not separate; the message has the way out.
    """
    choice = parse_threshold(kind)
    values = np.asarray(scores, dtype=np.float64)
    if values.ndim != 1:
        raise ValueError(f"scores has shape {values.shape}; expected (N,)")
    if choice.value is not None:
        return choice.value
    if choice.needs_labels:
        if is_known is None:
            raise ValueError(_needs_labels("is_known is None"))
        known = np.asarray(is_known)
        if known.dtype != np.bool_ or known.shape != values.shape:
            raise ValueError(
                f"is_known has dtype {known.dtype} and shape {known.shape}; expected bool and "
                f"{values.shape}, as the scores"
            )
        values = values[known]
    if not np.isfinite(values).all():
        raise ValueError("scores has NaN or infinity; none can be ranked")
    warn = on_warning or _warn
    ordered = np.sort(values)
    if choice.kind == "tpr95":
        return _tpr95(ordered, warn)
    if len(ordered) < 2:
        raise ValueError(
            f"threshold={choice.kind!r} splits the scores in two, so it needs at least 2, got "
            f"{len(ordered)}; score more images, or {WAY_OUT}"
        )
    if ordered[0] == ordered[-1]:
        raise ValueError(
            f"threshold={choice.kind!r} splits the scores in two, but all {len(ordered)} are "
            f"{float(ordered[0])!r} (with a single class the MCM score is always 1); {WAY_OUT}"
        )
    return _otsu(ordered) if choice.kind == "otsu" else _mixture(ordered, warn)


def lowest_known(threshold: float, mcm_scale: float, cosine_error: float) -> float:
    """Compute the lowest score that counts as reaching ``threshold``; all verdicts use it.

    Rounding makes an image's cosines, and so its score, depend on the batch size: the very image
    that set a threshold may come out below it. If every cosine is off by at most ``e``, the odds
    ``p / (1 - p)`` of a score change by at most a factor of ``exp(2 * e * mcm_scale)``. A score
    that is lower by no more than that counts as equal.

    Args:
        threshold: of any kind, in 0..1.
        mcm_scale: multiplies the cosines in the score.
        cosine_error: ``e``, from :func:`~ueo_fast.finetune.evaluation.predict.cosine_error`.

    Returns:
        A number in 0..``threshold``; an image is known where ``score >= lowest_known(...)``.
    """
    factor = math.exp(min(2 * cosine_error * mcm_scale, 700.0))  # e^710 overflows
    rest = 1 - threshold + math.ulp(1.0)  # a score is rounded too, to at most 1
    return min(threshold, threshold / (threshold + rest * factor))


def require_mixture() -> Any:
    """Import scikit-learn's ``GaussianMixture``.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    try:
        from sklearn.mixture import GaussianMixture
    except ImportError as error:
        raise ImportError(
            "threshold='gmm' needs scikit-learn: pip install scikit-learn, or choose otsu"
        ) from error
    return GaussianMixture


def _otsu(ordered: Scores) -> float:
    """Between-class variance at every gap between two scores (Otsu, *A Threshold Selection Method
    from Gray-Level Histograms*, 1979, equation 18), with one bin per score.

    With i of n scores below the gap, S their sum and T the sum of all, it is
    ``(n S - i T)^2 / (n^2 i (n - i))``. The threshold is the middle of the best gap, the lowest of
    equally good ones.
    """
    count = len(ordered)
    # At scale 1 scores differ only from the fourth digit on; moved to 0..1, nothing cancels.
    moved = (ordered - ordered[0]) / (ordered[-1] - ordered[0])
    below = np.arange(1, count, dtype=np.float64)
    sums = np.cumsum(moved[:-1])
    variance = (count * sums - below * moved.sum()) ** 2 / (below * (count - below))
    variance[ordered[1:] == ordered[:-1]] = -1  # equal scores cannot be separated
    best = int(np.argmax(variance))
    return _between(float(ordered[best]), float(ordered[best + 1]))


def _mixture(ordered: Scores, warn: OnWarning) -> float:
    """Where the posterior of the upper of two Gaussians is one half, between their means."""
    mixture_class = require_mixture()
    points, count = ordered, len(ordered)
    if count > MIXTURE_POINTS:  # evenly spaced, so that each stands for as many scores
        steps = (np.arange(MIXTURE_POINTS) + 0.5) * (count / MIXTURE_POINTS)
        points = ordered[steps.astype(np.int64)]
    centre, spread = float(points.mean()), float(points.std())
    if not spread > 0:  # fewer than one in MIXTURE_POINTS differs
        raise ValueError(
            f"threshold='gmm': nearly all of the {count} scores are {centre!r}; {WAY_OUT}"
        )
    # In units of the spread, because the fit's floor for variances is absolute. The best of five
    # random starts: starts from k-means often end in the same poor fit.
    mixture = mixture_class(
        2, init_params="random_from_data", n_init=5, tol=1e-6, max_iter=1000, random_state=0
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # our own warnings follow below
        mixture.fit(((points - centre) / spread)[:, None])
    order = np.argsort(mixture.means_[:, 0])
    means, weights = mixture.means_[order, 0], mixture.weights_[order]
    variances = mixture.covariances_[order, 0, 0]
    crossing = _crossing(means, variances, weights)
    if crossing is None:
        raise ValueError(
            "threshold='gmm': the scores do not fall into two groups (one Gaussian lies within "
            f"the other: means {centre + spread * means[0]:.6g} and "
            f"{centre + spread * means[1]:.6g}); choose otsu, a number, or tpr95 with labelled "
            "images"
        )
    # Ashman, Bird and Zepf, Detecting Bimodality in Astronomical Datasets, 1994, equation 1.
    distance = math.sqrt(2) * float(means[1] - means[0]) / math.sqrt(float(variances.sum()))
    if distance < 2:
        warn(
            f"threshold='gmm': the two groups of scores overlap (Ashman's D = {distance:.2f}; from "
            "2 on they are separated), so images near the threshold could be either; tpr95 with "
            "labelled images is more reliable"
        )
    if not mixture.converged_:
        warn("threshold='gmm': the fit did not converge in 1000 steps; otsu needs no fit")
    return centre + spread * crossing


def _crossing(means: Any, variances: Any, weights: Any) -> float | None:
    """The point between the means where both weighted densities are equal; there is at most one."""
    # log(weight * density) of each is -(x - mean)^2 / (2 variance) + constant; their difference is
    # a polynomial of degree 2.
    quadratic = -0.5 / variances
    linear = means / variances
    constant = np.log(weights) - 0.5 * np.log(variances) - 0.5 * means**2 / variances
    roots = np.roots([part[1] - part[0] for part in (quadratic, linear, constant)])
    inside = [x.real for x in roots if abs(x.imag) < 1e-12 and means[0] < x.real < means[1]]
    return float(inside[0]) if inside else None


def _tpr95(ordered: Scores, warn: OnWarning) -> float:
    """The highest score that at least 95 % of the known images reach."""
    count = len(ordered)
    if count == 0:
        raise ValueError(_needs_labels("there is none"))
    if count < 20:
        warn(
            f"threshold='tpr95' rests on {plural(count, 'labelled image')} of known classes: with "
            "fewer than 20 it is the lowest of their scores"
        )
    kept = (19 * count + 19) // 20  # 95 %, rounded up, without rounding errors
    return float(ordered[count - kept])


def _between(low: float, high: float) -> float:
    """The middle of two scores, such that ``low < middle <= high``."""
    middle = low + (high - low) / 2
    return middle if middle > low else high


def _needs_labels(found: str) -> str:
    return (
        f"threshold='tpr95' needs the scores of labelled images of known classes, but {found}; "
        "score images in class folders or a list with labels, take the threshold from labelled "
        "validation images, or choose otsu, gmm or a number"
    )


def _kinds() -> str:
    return "a number between 0 and 1, otsu, gmm or tpr95"


def _warn(text: str) -> None:
    warnings.warn(text, UserWarning, stacklevel=4)
