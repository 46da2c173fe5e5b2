"""The charts of a report, each one figure as wide as a phone.

No text of the user's goes into a chart: matplotlib would read a ``$`` in it as mathematics.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from sklearn.metrics import auc, roc_curve

from ueo_fast.finetune.engine.hooks import StepRecord
from ueo_fast.finetune.report.svg import (
    INK,
    KNOWN,
    THIRD,
    UNKNOWN,
    chart_style,
    inline_svg,
)

Floats = NDArray[np.float64]

MOST_POINTS = 400
"""Points of a line: more than a chart has pixels would only make the page heavy."""

_SIZE = (5.4, 3.6)  # inches of 72 units, each about a pixel on a phone
_SCORE_SIZE = (5.0, 4.3)
_FEWEST_BINS, _MOST_BINS = 10, 40


def histogram_edges(scores: Sequence[Floats]) -> Floats:
    """Edges of bins that hold every score, the same for all charts that are to be compared."""
    low = min(float(s.min()) for s in scores if len(s))
    high = max(float(s.max()) for s in scores if len(s))
    if high - low < 1e-12:  # bins without width would hold nothing
        low, high = low - 0.01, high + 0.01
    # Rice's rule, within reason: few images in many bins would show little but noise.
    bins = np.clip(2 * max(map(len, scores)) ** (1 / 3), _FEWEST_BINS, _MOST_BINS)
    return np.linspace(low, high, round(bins) + 1)


def histogram_chart(
    name: str, title: str, groups: Mapping[str, Floats], edges: Floats, *, highest: float
) -> str:
    """Distribution of the MCM score, one outline per group.

    Args:
        name: of the chart, once per page.
        title: what is shown.
        groups: "known", "unknown" or another label to scores (N,); an empty group is left out.
        edges: of the bins, :func:`histogram_edges`.
        highest: upper end of the vertical axis, percent: :func:`highest_bin` of all charts that
            are to be compared.

    Returns:
        An ``<svg>`` element.
    """
    groups = {label: scores for label, scores in groups.items() if len(scores)}
    with chart_style():
        figure = Figure(figsize=_SCORE_SIZE)
        axis = figure.subplots()
        for i, (label, scores) in enumerate(groups.items()):
            colour = {"known": KNOWN, "unknown": UNKNOWN}.get(label, THIRD if i else KNOWN)
            axis.stairs(_shares(scores, edges), edges, fill=True, color=colour, alpha=0.35)
            axis.stairs(
                _shares(scores, edges), edges, color=colour, linewidth=1.4, label=f"{label} images"
            )
        axis.set_xlabel("MCM score")
        axis.set_ylabel(f"% of {'the group' if len(groups) > 1 else 'images'} per bin")
        axis.set_ylim(0, highest * 1.04)
        axis.set_xlim(edges[0], edges[-1])
        axis.xaxis.set_major_locator(MaxNLocator(5))
        figure.legend(loc="outside upper left", ncols=3)
    means = "; ".join(
        f"{len(scores)} {label} images, median {np.median(scores):.4g}"
        for label, scores in groups.items()
    )
    return inline_svg(figure, name, title=title, description=f"Histogram of MCM scores: {means}.")


def highest_bin(groups: Sequence[Floats], edges: Floats) -> float:
    """Percent of its group that the fullest bin holds."""
    return max(float(_shares(scores, edges).max()) for scores in groups if len(scores))


def roc_chart(name: str, curves: Mapping[str, tuple[Floats, NDArray[np.bool_]]]) -> str:
    """ROC curves of the MCM score, known as positive.

    Args:
        name: of the chart, once per page.
        curves: label to (scores (N,), is_known (N,)), with images of both kinds.

    Returns:
        An ``<svg>`` element. Its legend has the area under each curve in percent.
    """
    areas = []
    with chart_style():
        figure = Figure(figsize=_SCORE_SIZE)
        axis = figure.subplots()
        axis.plot([0, 100], [0, 100], color=INK, alpha=0.5, linewidth=0.8, linestyle=(0, (4, 4)))
        for (label, (scores, is_known)), colour, dashes in zip(
            curves.items(),
            (UNKNOWN, KNOWN, THIRD),
            ((0, (5, 1.5)), "solid", "dotted"),
            strict=False,
        ):
            false_positive, true_positive, _ = roc_curve(is_known, scores)
            area = 100 * auc(false_positive, true_positive)
            areas.append(f"{label} {area:.1f}")
            keep = _spaced(false_positive, true_positive)
            axis.plot(
                100 * false_positive[keep],
                100 * true_positive[keep],
                color=colour,
                linestyle=dashes,
                label=f"{label}, AUROC {area:.1f}",
            )
        axis.set_xlabel("unknown images taken for known, %")
        axis.set_ylabel("known images kept, %")
        axis.set_xlim(0, 100)
        axis.set_ylim(0, 101)
        axis.legend(loc="lower right")
    return inline_svg(
        figure,
        name,
        title="ROC curve of the MCM score",
        description=f"Area under the curve in percent, known as positive: {', '.join(areas)}.",
    )


def entropy_chart(name: str, steps: Sequence[StepRecord], classes: int | None) -> str:
    """Conditional and marginal entropy over steps, with the most that C classes can have."""
    with chart_style():
        figure = Figure(figsize=_SIZE)
        axis = figure.subplots()
        if classes is not None and classes > 1:
            axis.axhline(
                math.log(classes),
                color=INK,
                alpha=0.6,
                linewidth=0.8,
                linestyle=(0, (4, 4)),
                label=f"log C = {math.log(classes):.2f}",
            )
        _line(axis, steps, [s.marginal_entropy for s in steps], KNOWN, "marginal")
        _line(axis, steps, [s.conditional_entropy for s in steps], UNKNOWN, "conditional")
        axis.set_xlabel("step")
        axis.set_ylabel("entropy, nats")
        axis.set_ylim(bottom=0)
        figure.legend(loc="outside upper left", ncols=3)
    first, last = steps[0], steps[-1]
    return inline_svg(
        figure,
        name,
        title="Entropy of the predictions over steps",
        description=(
            f"From step {first.step} to {last.step}, marginal entropy went from "
            f"{first.marginal_entropy:.3g} to {last.marginal_entropy:.3g} nats and conditional "
            f"entropy from {first.conditional_entropy:.3g} to {last.conditional_entropy:.3g}."
        ),
    )


def loss_chart(name: str, steps: Sequence[StepRecord]) -> str:
    """Loss over steps."""
    with chart_style():
        figure = Figure(figsize=_SIZE)
        axis = figure.subplots()
        _line(axis, steps, [s.loss for s in steps], KNOWN, "loss")
        axis.set_xlabel("step")
        axis.set_ylabel("loss")
    return inline_svg(
        figure,
        name,
        title="Loss over steps",
        description=f"From {steps[0].loss:.4g} at step {steps[0].step} to {steps[-1].loss:.4g} "
        f"at step {steps[-1].step}.",
    )


def learning_rate_chart(name: str, steps: Sequence[StepRecord]) -> str | None:
    """Learning rate of each group over steps; ``None`` where the log has none."""
    groups = list(dict.fromkeys(group for s in steps for group in s.learning_rates))
    if not groups:
        return None
    chosen = steps[:: max(1, len(steps) // MOST_POINTS)]
    if chosen[-1] is not steps[-1]:
        chosen = [*chosen, steps[-1]]
    with chart_style():
        figure = Figure(figsize=_SIZE)
        axis = figure.subplots()
        for group, colour, style in zip(
            groups, (KNOWN, UNKNOWN, THIRD), ("solid", (0, (5, 2)), "dotted"), strict=False
        ):
            rates = [s.learning_rates.get(group, math.nan) for s in chosen]
            axis.plot(
                [s.step for s in chosen],
                rates,
                color=colour,
                linestyle=style,
                marker="o" if len(chosen) == 1 else None,
                label={"prompt": "prompt", "affine": "affine"}.get(group, "other"),
            )
        axis.set_xlabel("step")
        axis.set_ylabel("learning rate")
        axis.set_ylim(bottom=0)
        axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axis.ticklabel_format(axis="y", scilimits=(-3, 3), useMathText=False)
        figure.legend(loc="outside upper left", ncols=3)
    first, last = steps[0].learning_rates, steps[-1].learning_rates
    return inline_svg(
        figure,
        name,
        title="Learning rate over steps",
        description="; ".join(
            f"from {first.get(g, math.nan):.3g} to {last.get(g, math.nan):.3g}" for g in groups
        ),
    )


def metrics_chart(
    name: str, epochs: Sequence[int], lines: Mapping[str, Sequence[float | None]]
) -> str:
    """Metrics on labelled images over epochs.

    Args:
        name: of the chart, once per page.
        epochs: 0 is before training.
        lines: label to fractions in 0..1, one per epoch; ``None`` where not defined.
    """
    with chart_style():
        figure = Figure(figsize=_SIZE)
        axis = figure.subplots()
        for (label, values), colour, marker in zip(
            lines.items(), (KNOWN, UNKNOWN, THIRD), "os^", strict=False
        ):
            axis.plot(
                epochs,
                [math.nan if value is None else 100 * value for value in values],
                color=colour,
                marker=marker if len(epochs) <= 60 else None,
                markersize=4,
                label=label,
            )
        axis.set_xlabel("epoch")
        axis.set_ylabel("%")
        axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        figure.legend(loc="outside upper left", ncols=3)
    ends = [
        f"{label} from {100 * values[0]:.1f} to {100 * values[-1]:.1f}"
        for label, values in lines.items()
        if values[0] is not None and values[-1] is not None
    ]
    return inline_svg(
        figure,
        name,
        title="Metrics over epochs",
        description=f"Percent: {', '.join(ends)}." if ends else "Percent.",
    )


def window(steps: int) -> int:
    """Steps that one point of a training curve stands for."""
    return -(-steps // MOST_POINTS)


def _line(
    axis: Axes, steps: Sequence[StepRecord], values: Sequence[float], colour: str, label: str
) -> None:
    """A curve; where there are many steps, the mean of each window and its range as a band."""
    size = window(len(steps))
    starts = range(0, len(steps), size)
    parts = [np.array(values[start : start + size]) for start in starts]
    places = [float(np.mean([s.step for s in steps[start : start + size]])) for start in starts]
    if size > 1:
        axis.fill_between(
            places,
            [float(part.min()) for part in parts],
            [float(part.max()) for part in parts],
            color=colour,
            alpha=0.2,
            linewidth=0,
        )
    axis.plot(
        places,
        [float(part.mean()) for part in parts],
        color=colour,
        label=label,
        marker="o" if len(parts) == 1 else None,
    )
    axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))


def _shares(scores: Floats, edges: Floats) -> Floats:
    counts, _ = np.histogram(scores, edges)
    return 100 * counts / len(scores)


def _spaced(x: Floats, y: Floats) -> NDArray[np.int64]:
    """Indices of the points of a curve from (0, 0) to (1, 1) that can be told apart."""
    along = x + y  # both grow, so this is the length of the curve's staircase, 0..2
    places = np.searchsorted(along, np.linspace(0, along[-1], MOST_POINTS))
    return np.unique(np.concatenate([[0], places.clip(max=len(along) - 1), [len(along) - 1]]))
