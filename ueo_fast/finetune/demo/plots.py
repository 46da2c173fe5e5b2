"""Plots of a run, drawn without a display.

Without pyplot, whose import and whose backend are the business of the program that we run in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from torch import Tensor

# Blue and vermilion of Okabe and Ito's palette: distinct for colour-blind readers.
KNOWN_COLOUR = "#0072B2"
UNKNOWN_COLOUR = "#D55E00"


def plot_mcm_histograms(path: Path, panels: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """Distribution of the MCM score of known and unknown images, one panel per method.

    Args:
        path: of the PNG.
        panels: title to (scores (N,), is_known (N,) bool). All panels share their axes.
    """
    everything = np.concatenate([scores.numpy() for scores, _ in panels.values()])
    # In double: 31 edges of a narrow range may coincide in the scores' own precision.
    low, high = float(everything.min()), float(everything.max())
    if low == high:  # bins without width would have no density
        low, high = low - 0.01, high + 0.01
    bins = np.linspace(low, high, 31)
    figure = Figure(figsize=(4.2 * len(panels), 3.2), layout="constrained")
    axes = figure.subplots(1, len(panels), sharex=True, sharey=True, squeeze=False)
    for axis, (title, (scores, is_known)) in zip(axes[0], panels.items(), strict=True):
        for group, label, colour in (
            (scores[is_known], "known", KNOWN_COLOUR),
            (scores[~is_known], "unknown", UNKNOWN_COLOUR),
        ):
            if len(group):
                axis.hist(
                    group.double().numpy(),
                    bins=bins,
                    density=True,
                    alpha=0.6,
                    color=colour,
                    label=f"{label} ({len(group)})",
                )
        axis.set_title(title)
        axis.set_xlabel("MCM score")
        axis.ticklabel_format(useOffset=False)
        axis.legend(frameon=False)
    axes[0][0].set_ylabel("density")
    figure.savefig(path, dpi=100)


def plot_per_class_accuracy(
    path: Path, accuracies: Mapping[str, Mapping[str, float]], *, classes: Sequence[str]
) -> None:
    """Bars of each class's accuracy, one colour per method.

    Args:
        path: of the PNG.
        accuracies: method to class to accuracy in [0, 1]; a class that no method has is marked
            "not known", so that it is not taken for an accuracy of 0.
        classes: order of the classes.
    """
    size = (max(6.0, 0.9 * len(classes) + 1.0), 3.4)
    figure = Figure(figsize=size, layout="constrained")
    axis = figure.subplots()
    width = 0.8 / len(accuracies)
    colours = colormaps["tab10"](np.arange(len(accuracies)))
    places = np.arange(len(classes))
    for i, (method, values) in enumerate(accuracies.items()):
        heights = [100 * values.get(name, float("nan")) for name in classes]
        offset = (i - (len(accuracies) - 1) / 2) * width
        axis.bar(places + offset, heights, width, label=method, color=colours[i])
    axis.set_xticks(places, classes)
    for place, name in enumerate(classes):
        if not any(name in values for values in accuracies.values()):
            axis.text(place, 2, "not known", rotation=90, ha="center", fontsize=7, color="grey")
    axis.set_xlim(-0.6, len(classes) - 0.4)
    axis.set_ylim(0, 100)
    axis.set_ylabel("accuracy, %")
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(
        *axis.get_legend_handles_labels(),
        loc="outside upper center",
        ncols=len(accuracies),
        frameon=False,
    )
    figure.savefig(path, dpi=100)


def plot_samples(path: Path, rows: Mapping[str, tuple[Tensor, Sequence[str]]]) -> None:
    """Example images, one row per domain.

    Args:
        path: of the PNG.
        rows: title to (images (N, 3, H, W) in [0, 1], N captions); N is the same in all rows.
    """
    count = max(len(captions) for _, captions in rows.values())
    figure = Figure(figsize=(0.95 * count, 1.35 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), count, squeeze=False)
    for line, (title, (images, captions)) in zip(axes, rows.items(), strict=True):
        for axis, image, caption in zip(line, images, captions, strict=True):
            axis.imshow(image.permute(1, 2, 0).numpy(), vmin=0.0, vmax=1.0)
            axis.set_title(caption, fontsize=8)
            axis.set_xticks([])
            axis.set_yticks([])
        line[0].set_ylabel(title, fontsize=8)
    figure.savefig(path, dpi=100)
