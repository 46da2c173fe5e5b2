"""From which score on an image counts as known: four ways to choose the threshold.

Convention, as in :mod:`ueo_fast.finetune.evaluation.metrics`: known is positive, and an image is
known where its score reaches the threshold, to within what rounding does to a score
(:func:`lowest_known`). All of them are exact: they look at every score, not at a
histogram (but for the mixture, which sees at most :data:`MIXTURE_POINTS` quantiles). They take the
scores in ascending order, so that a sorted file on disk serves as well as an array, and read them
block by block: memory does not grow with the number of images.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ueo_fast.finetune.data.names import plural

Kind = Literal["value", "otsu", "gmm", "tpr95"]
Scores = NDArray[np.float64]
OnWarning = Callable[[str], None]

BLOCK = 1 << 16
"""Scores that are looked at at once."""

MIXTURE_POINTS = 20_000
"""Evenly spaced quantiles that stand for more scores than that when a mixture is fitted."""

WAY_OUT = "give a number, or tpr95 with labelled images"


@dataclass(frozen=True)
class Threshold:
    """A choice of ``--threshold``.

    Attributes:
        kind: ``"value"``: the number ``value``. ``"otsu"``: splits the scores where the variance
            between the two parts is largest; needs nothing but scores, and finds a split even
            where there is none. ``"gmm"``: a mixture of two Gaussians, split where both are
            equally probable; needs nothing but scores. ``"tpr95"``: the highest threshold that
            keeps at least 95 % of the known images; needs labels.
        value: the number; for another kind, what it came to on other images than those that are
            scored (a validation set), or ``None``: to be chosen from the scores.

    Raises:
        ValueError: unknown ``kind``, or a value that is missing or outside 0..1.
    """

    kind: Kind
    value: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"kind={self.kind!r} is unknown; choose one of {_kinds()}")
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
        """Whether scores alone do not say it."""
        return self.kind == "tpr95" and self.value is None


def parse_threshold(text: str | float | Threshold) -> Threshold:
    """A number or ``"otsu"``, ``"gmm"``, ``"tpr95"``, as a user writes it.

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


def choose_threshold(
    kind: str | float | Threshold,
    scores: ArrayLike,
    is_known: ArrayLike | None = None,
    *,
    on_warning: OnWarning | None = None,
) -> float:
    """The threshold of some scores that fit into memory.

    Args:
        kind: as for :func:`parse_threshold`.
        scores: (N,), any order; not changed.
        is_known: (N,) bool, true for images of a known class; for ``tpr95``.
        on_warning: told in a sentence where the threshold means little; default: a Python warning.

    Returns:
        t; an image is known from ``lowest_known(t, ...)`` on.

    Raises:
        ValueError: scores that are NaN, too few or all equal, no label of a known image where
            they are needed, or a mixture that does not separate; with the way out.
    """
    choice = parse_threshold(kind)
    values = np.asarray(scores, dtype=np.float64)
    if values.ndim != 1:
        raise ValueError(f"scores has shape {values.shape}; expected (N,)")
    if choice.needs_labels:
        if is_known is None:
            raise ValueError(needs_labels_message("is_known is None"))
        known = np.asarray(is_known)
        if known.dtype != np.bool_ or known.shape != values.shape:
            raise ValueError(
                f"is_known has dtype {known.dtype} and shape {known.shape}; expected bool and "
                f"{values.shape}, as the scores"
            )
        values = values[known]
    return threshold_of_sorted(choice, np.sort(values), on_warning=on_warning)


def threshold_of_sorted(
    threshold: Threshold, ordered: Scores, *, on_warning: OnWarning | None = None
) -> float:
    """The threshold of scores in ascending order, which may be a file mapped into memory.

    Args:
        threshold: the choice.
        ordered: (N,) float64, ascending; of the known images only for ``tpr95``. Only read.
        on_warning: as for :func:`choose_threshold`.

    Raises:
        ValueError: as :func:`choose_threshold`.
    """
    if threshold.value is not None:
        return threshold.value
    # NaN sorts to the end, minus infinity to the beginning.
    if len(ordered) and not (math.isfinite(ordered[0]) and math.isfinite(ordered[-1])):
        raise ValueError("scores has NaN or infinity; none can be ranked")
    warn = on_warning or _warn
    if threshold.kind == "tpr95":
        return _tpr95(ordered, warn)
    if len(ordered) < 2:
        raise ValueError(
            f"threshold={threshold.kind!r} splits the scores in two, so it needs at least 2, got "
            f"{len(ordered)}; score more images, or {WAY_OUT}"
        )
    if ordered[0] == ordered[-1]:
        raise ValueError(
            f"threshold={threshold.kind!r} splits the scores in two, but all {len(ordered)} are "
            f"{float(ordered[0])!r} (with a single class the MCM score is always 1); {WAY_OUT}"
        )
    return _otsu(ordered) if threshold.kind == "otsu" else _mixture(ordered, warn)


def lowest_known(threshold: float, mcm_scale: float, cosine_error: float) -> float:
    """The lowest score that counts as reaching ``threshold``; every verdict is taken with it.

    The cosines of one image differ by rounding from one batch size to another, and its score with
    them, so the very image that set a threshold may come out below it. With every cosine off by at
    most ``e`` the odds ``p / (1 - p)`` of a score change by at most a factor of
    ``exp(2 * e * mcm_scale)``; a score that is lower by no more than that counts as equal.

    Args:
        threshold: of any kind, in 0..1.
        mcm_scale: multiplies the cosines in the score.
        cosine_error: ``e``, from :func:`~ueo_fast.finetune.evaluation.predict.cosine_error`.

    Returns:
        A number in 0..``threshold``; an image is known where ``score >= lowest_known(...)``.
    """
    factor = math.exp(min(2 * cosine_error * mcm_scale, 700.0))  # e^710 overflows
    rest = 1 - threshold + math.ulp(1.0)  # the score itself is rounded, to 1 at the most
    return min(threshold, threshold / (threshold + rest * factor))


def needs_labels_message(found: str) -> str:
    """What ``tpr95`` lacks, and where to get it."""
    return (
        f"threshold='tpr95' needs the scores of labelled images of known classes, but {found}; "
        "score images in class folders or a list with labels, take the threshold from labelled "
        "validation images, or choose otsu, gmm or a number"
    )


def require_mixture() -> Any:
    """scikit-learn's ``GaussianMixture``.

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
    low, span = float(ordered[0]), float(ordered[-1] - ordered[0])
    # At scale 1 scores differ in the fourth digit only: moved to 0..1 nothing cancels.
    total = math.fsum(float(np.sum((block - low) / span)) for _, block in _blocks(ordered))
    best, threshold, below = -1.0, low, 0.0
    for start, block in _blocks(ordered[:-1]):
        upper = np.asarray(ordered[start + 1 : start + 1 + len(block)])
        sums = below + np.cumsum((block - low) / span)
        below = float(sums[-1])
        i = np.arange(start + 1, start + 1 + len(block), dtype=np.float64)
        variance = np.where(upper > block, (count * sums - i * total) ** 2 / (i * (count - i)), -1)
        at = int(np.argmax(variance))
        if variance[at] > best:
            best, threshold = float(variance[at]), _between(float(block[at]), float(upper[at]))
    return threshold


def _mixture(ordered: Scores, warn: OnWarning) -> float:
    """Where the posterior of the upper of two Gaussians is one half, between their means."""
    mixture_class = require_mixture()
    points = np.asarray(ordered[_evenly_spaced(len(ordered))])
    centre, spread = float(points.mean()), float(points.std())
    if not spread > 0:  # fewer than one in MIXTURE_POINTS differs
        raise ValueError(
            f"threshold='gmm': nearly all of the {len(ordered)} scores are {centre!r}; {WAY_OUT}"
        )
    # In units of the spread, because the fit's floor for variances is absolute. Of five starts the
    # most probable fit is taken; those from k-means often end in the same poor one.
    mixture = mixture_class(
        2, init_params="random_from_data", n_init=5, tol=1e-6, max_iter=1000, random_state=0
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what there is to say is said below
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
            "labelled images is surer"
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
        raise ValueError(needs_labels_message("there is none"))
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


def _evenly_spaced(count: int) -> Any:
    """Positions of at most MIXTURE_POINTS ordered scores, each standing for as many."""
    if count <= MIXTURE_POINTS:
        return slice(None)
    return ((np.arange(MIXTURE_POINTS) + 0.5) * (count / MIXTURE_POINTS)).astype(np.int64)


def _blocks(values: Scores) -> Iterator[tuple[int, Scores]]:
    for start in range(0, len(values), BLOCK):
        yield start, np.asarray(values[start : start + BLOCK])


def _kinds() -> str:
    return "a number between 0 and 1, otsu, gmm or tpr95"


def _warn(text: str) -> None:
    warnings.warn(text, UserWarning, stacklevel=4)
