"""The charts of a report, each one figure as wide as a phone, as SVG that stands in a page.

No text of the user's goes into a chart: matplotlib would read a ``$`` in it as mathematics.

matplotlib's own SVG is a document: it brings a DOCTYPE, links in its metadata, ids that repeat from
figure to figure, and fixed colours and fonts. Here it becomes an element among others, its text is
text, and it follows the page from light to dark.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from xml.etree import ElementTree

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from sklearn.metrics import auc, roc_curve

from ueo_fast.finetune.files.run_files import StepRecord

Floats = NDArray[np.float64]

MOST_POINTS = 400
"""Points of a line: more than a chart has pixels would only make the page heavy."""

_SIZE = (5.4, 3.6)  # inches of 72 units, each about a pixel on a phone
_SCORE_SIZE = (5.0, 4.3)
_FEWEST_BINS, _MOST_BINS = 10, 40

# What a chart draws in, and what the page says it looks like. The left side is what matplotlib
# draws, in distinct colours; the page's style sheet gives the right side its colours.
# Blue, vermilion and green of Okabe and Ito's palette: distinct for colour-blind readers.
INK, QUIET, KNOWN, UNKNOWN, THIRD = "#010203", "#040506", "#0072b2", "#d55e00", "#009e73"
_PAGE_COLOURS = {
    INK: "var(--ink)",
    QUIET: "var(--rule)",
    KNOWN: "var(--known)",
    UNKNOWN: "var(--unknown)",
    THIRD: "var(--third)",
}
_COLOUR = re.compile("|".join(_PAGE_COLOURS), re.IGNORECASE)
_FONT = re.compile(r"\bfont:\s*(?:(\d+)\s+)?([\d.]+)px[^;]*")
_REFERENCE = re.compile(r"url\(#([^)]+)\)")
_DASHES: Any = ("solid", (0, (5, 2)), "dotted")

# Text as text, found by the browser's search and set in the page's own font; nothing of the user's
# own matplotlibrc, and nothing random.
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "ueo_fast",
    "font.family": "sans-serif",
    "font.size": 11.0,
    "text.color": INK,
    "text.usetex": False,
    "axes.labelcolor": INK,
    "axes.edgecolor": QUIET,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "axes.formatter.useoffset": False,
    "axes.titlesize": 11.0,
    "axes.labelsize": 11.0,
    "figure.facecolor": "none",
    "figure.constrained_layout.use": True,
    "grid.color": QUIET,
    "grid.linewidth": 0.5,
    "legend.frameon": False,
    "legend.fontsize": 11.0,
    "lines.linewidth": 1.6,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 10.0,
    "ytick.labelsize": 10.0,
}


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
        name: of the chart, once per page; so in all charts.
        title: what is shown.
        groups: "known", "unknown" or another label to scores (N,); an empty group is left out.
        edges: of the bins, :func:`histogram_edges`.
        highest: upper end of the vertical axis, percent: :func:`highest_bin` of all charts that
            are to be compared.

    Returns:
        An ``<svg>`` element; so do all charts.
    """
    groups = {label: scores for label, scores in groups.items() if len(scores)}

    def draw(axis: Axes) -> None:
        for i, (label, scores) in enumerate(groups.items()):
            colour = {"known": KNOWN, "unknown": UNKNOWN}.get(label, THIRD if i else KNOWN)
            shares = _shares(scores, edges)
            axis.stairs(shares, edges, fill=True, color=colour, alpha=0.35)
            axis.stairs(shares, edges, color=colour, linewidth=1.4, label=f"{label} images")
        axis.set_ylim(0, highest * 1.04)
        axis.set_xlim(edges[0], edges[-1])
        axis.xaxis.set_major_locator(MaxNLocator(5))

    means = "; ".join(
        f"{len(scores)} {label} images, median {np.median(scores):.4g}"
        for label, scores in groups.items()
    )
    share = f"% of {'the group' if len(groups) > 1 else 'images'} per bin"
    description = f"Histogram of MCM scores: {means}."
    return _chart(name, title, description, draw, "MCM score", share, size=_SCORE_SIZE)


def highest_bin(groups: Sequence[Floats], edges: Floats) -> float:
    """Percent of its group that the fullest bin holds."""
    return max(float(_shares(scores, edges).max()) for scores in groups if len(scores))


def roc_chart(name: str, curves: Mapping[str, tuple[Floats, NDArray[np.bool_]]]) -> str:
    """ROC curves of the MCM score, known as positive, with the area under each in percent.

    Args:
        name: of the chart.
        curves: label to (scores (N,), is_known (N,)), with images of both kinds.
    """
    drawn = []
    for label, (scores, is_known) in curves.items():
        x, y, _ = roc_curve(is_known, scores)
        keep = _spaced(x, y)
        drawn.append((label, 100 * auc(x, y), 100 * x[keep], 100 * y[keep]))

    def draw(axis: Axes) -> None:
        axis.plot([0, 100], [0, 100], color=INK, alpha=0.5, linewidth=0.8, linestyle=(0, (4, 4)))
        for (label, area, x, y), colour, dashes in zip(
            drawn, (UNKNOWN, KNOWN, THIRD), ((0, (5, 1.5)), "solid", "dotted"), strict=False
        ):
            text = f"{label}, AUROC {area:.1f}"
            axis.plot(x, y, color=colour, linestyle=dashes, label=text)
        axis.set_xlim(0, 100)
        axis.set_ylim(0, 101)
        axis.legend(loc="lower right")

    areas = ", ".join(f"{label} {area:.1f}" for label, area, _, _ in drawn)
    return _chart(
        name,
        "ROC curve of the MCM score",
        f"Area under the curve in percent, known as positive: {areas}.",
        draw,
        "unknown images taken for known, %",
        "known images kept, %",
        size=_SCORE_SIZE,
        legend=False,
    )


def entropy_chart(name: str, steps: Sequence[StepRecord], classes: int | None) -> str:
    """Conditional and marginal entropy over steps, with the most that C classes can have."""

    def draw(axis: Axes) -> None:
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
        axis.set_ylim(bottom=0)

    first, last = steps[0], steps[-1]
    description = (
        f"From step {first.step} to {last.step}, marginal entropy went from "
        f"{first.marginal_entropy:.3g} to {last.marginal_entropy:.3g} nats and conditional "
        f"entropy from {first.conditional_entropy:.3g} to {last.conditional_entropy:.3g}."
    )
    title = "Entropy of the predictions over steps"
    return _chart(name, title, description, draw, "step", "entropy, nats")


def loss_chart(name: str, steps: Sequence[StepRecord]) -> str:
    """Loss over steps."""
    description = (
        f"From {steps[0].loss:.4g} at step {steps[0].step} to {steps[-1].loss:.4g} at step "
        f"{steps[-1].step}."
    )

    def draw(axis: Axes) -> None:
        _line(axis, steps, [s.loss for s in steps], KNOWN, "loss")

    return _chart(name, "Loss over steps", description, draw, "step", "loss", legend=False)


def learning_rate_chart(name: str, steps: Sequence[StepRecord]) -> str | None:
    """Learning rate of each group over steps; ``None`` where the log has none."""
    groups = list(dict.fromkeys(group for s in steps for group in s.learning_rates))
    if not groups:
        return None
    chosen = list(steps[:: max(1, len(steps) // MOST_POINTS)])
    if chosen[-1] is not steps[-1]:
        chosen.append(steps[-1])

    def draw(axis: Axes) -> None:
        for group, colour, dashes in zip(groups, (KNOWN, UNKNOWN, THIRD), _DASHES, strict=False):
            axis.plot(
                [s.step for s in chosen],
                [s.learning_rates.get(group, math.nan) for s in chosen],
                color=colour,
                linestyle=dashes,
                marker="o" if len(chosen) == 1 else None,
                label=group if group in ("prompt", "affine") else "other",
            )
        axis.set_ylim(bottom=0)
        axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axis.ticklabel_format(axis="y", scilimits=(-3, 3), useMathText=False)

    first, last = steps[0].learning_rates, steps[-1].learning_rates
    description = "; ".join(
        f"from {first.get(g, math.nan):.3g} to {last.get(g, math.nan):.3g}" for g in groups
    )
    return _chart(name, "Learning rate over steps", description, draw, "step", "learning rate")


def metrics_chart(
    name: str, epochs: Sequence[int], lines: Mapping[str, Sequence[float | None]]
) -> str:
    """Metrics on labelled images over epochs.

    Args:
        name: of the chart.
        epochs: 0 is before training.
        lines: label to fractions in 0..1, one per epoch; ``None`` where not defined.
    """

    def draw(axis: Axes) -> None:
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
        axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))

    ends = [
        f"{label} from {100 * values[0]:.1f} to {100 * values[-1]:.1f}"
        for label, values in lines.items()
        if values[0] is not None and values[-1] is not None
    ]
    description = f"Percent: {', '.join(ends)}." if ends else "Percent."
    return _chart(name, "Metrics over epochs", description, draw, "epoch", "%")


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
        low, high = [float(part.min()) for part in parts], [float(part.max()) for part in parts]
        axis.fill_between(places, low, high, color=colour, alpha=0.2, linewidth=0)
    means = [float(part.mean()) for part in parts]
    marker = "o" if len(parts) == 1 else None
    axis.plot(places, means, color=colour, label=label, marker=marker)
    axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))


def _shares(scores: Floats, edges: Floats) -> Floats:
    counts, _ = np.histogram(scores, edges)
    return 100 * counts / len(scores)


def _spaced(x: Floats, y: Floats) -> NDArray[np.int64]:
    """Indices of the points of a curve from (0, 0) to (1, 1) that can be told apart."""
    along = x + y  # both grow, so this is the length of the curve's staircase, 0..2
    places = np.searchsorted(along, np.linspace(0, along[-1], MOST_POINTS))
    return np.unique(np.concatenate([[0], places.clip(max=len(along) - 1), [len(along) - 1]]))


def _chart(
    name: str,
    title: str,
    description: str,
    draw: Callable[[Axes], None],
    x: str,
    y: str,
    *,
    size: tuple[float, float] = _SIZE,
    legend: bool = True,
) -> str:
    """An ``<svg>`` element, its width that of its place. It holds no link and no id but its own.

    Args:
        name: of the chart, once per page; ids begin with it.
        title: what it is, in a few words; escaped here, as is ``description``.
        description: what it shows, for readers who cannot see it.
        draw: draws in the colours of this module.
        x: what the horizontal axis shows.
        y: what the vertical axis shows.
        size: inches.
        legend: whether one stands above the axes.
    """
    file = io.StringIO()
    with rc_context(_STYLE):
        figure = Figure(figsize=size)
        axis = figure.subplots()
        draw(axis)
        axis.set_xlabel(x)
        axis.set_ylabel(y)
        if legend:
            figure.legend(loc="outside upper left", ncols=3)
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file, format="svg", metadata=nothing)
    root = ElementTree.fromstring(file.getvalue())
    for child in list(root):
        if child.tag.endswith("}metadata"):
            root.remove(child)
    for element in root.iter():
        _strip_namespaces(element)
    _own_ids(root, name)
    for attribute in ("width", "height", "version"):
        root.attrib.pop(attribute, None)
    root.set("role", "img")
    root.set("aria-labelledby", f"{name}-title {name}-description")
    for position, (tag, part, text) in enumerate(
        (("title", "title", title), ("desc", "description", description))
    ):
        element = ElementTree.Element(tag, id=f"{name}-{part}")
        element.text = text
        root.insert(position, element)
    return ElementTree.tostring(root, encoding="unicode")


def _strip_namespaces(element: ElementTree.Element) -> None:
    """A page knows what an ``<svg>`` and its parts are; ``xlink:href`` is ``href`` by now."""
    element.tag = element.tag.rpartition("}")[2]
    for attribute in list(element.attrib):
        value = element.attrib.pop(attribute)
        value = _COLOUR.sub(lambda match: _PAGE_COLOURS[match[0].lower()], value)
        name = attribute.rpartition("}")[2]
        if name == "style":
            value = _FONT.sub(_page_font, value)
        element.set(name, value)
    # Line breaks between elements are most of what is left of a small chart.
    if element.text is not None and not element.text.strip():
        element.text = None
    if element.tail is not None and not element.tail.strip():
        element.tail = None


def _page_font(match: re.Match[str]) -> str:
    """Size and weight; the family is the page's."""
    weight = f"font-weight: {match[1]}; " if match[1] else ""
    return f"{weight}font-size: {match[2]}px"


def _own_ids(root: ElementTree.Element, name: str) -> None:
    """Ids that nothing refers to go; the others begin with ``name``."""
    used: set[str] = set()
    for element in root.iter():
        for attribute, value in element.attrib.items():
            used.update(_REFERENCE.findall(value))
            if attribute == "href":
                used.add(value.removeprefix("#"))
    for element in root.iter():
        for attribute, value in list(element.attrib.items()):
            if attribute == "id":
                if value in used:
                    element.set("id", f"{name}-{value}")
                else:
                    del element.attrib["id"]
            elif attribute == "href":
                element.set("href", f"#{name}-{value.removeprefix('#')}")
            else:
                element.set(attribute, _REFERENCE.sub(rf"url(#{name}-\1)", value))
