"""What a run of the demonstration leaves behind: a table, a verdict that claims no more, plots."""

from __future__ import annotations

import math
import statistics
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib import colormaps

# Not pyplot, whose import and backend are the calling program's business.
from matplotlib.figure import Figure

from ueo_fast.finetune.data.names import plural
from ueo_fast.finetune.demo.config import DemoConfig
from ueo_fast.finetune.demo.digits import DIGIT_NAMES, Draw
from ueo_fast.finetune.evaluation.results_table import ResultsTable
from ueo_fast.finetune.files.run_folder import RunFolder, environment
from ueo_fast.finetune.report.charts import KNOWN, UNKNOWN, Floats, histogram_edges

RULE = (
    "Better or worse needs at least 3 seeds, a mean difference of half a point, and all seeds "
    "agreeing or a mean beyond two standard errors."
)
"""When the verdict calls a method better or worse, for the reader of a report."""

_FEWEST_SEEDS = 3
# In per-class accuracy half a point is fewer than three of the target's known images (six digits of
# some 90 images each): less than what another order of the batches moves.
_EQUAL = 0.005

_CONVENTIONS = (
    "Percent, mean ± sample standard deviation over seeds. AUROC is of the MCM score with known "
    "images as the positive class; HM is the harmonic mean of per-class accuracy and AUROC. Every "
    "method starts from the same pre-trained model. EntMin, InfoMax and UEO take the same gradient "
    "steps; AdaBN, where there is one, takes one pass without gradients. The unlabelled images are "
    "part of the test set (transductive); labels are never "
    f"used in adaptation. {RULE}"
)


class Result(NamedTuple):
    """What one method did on one seed.

    Attributes:
        record: the line of ``metrics.jsonl``: seed, method, known classes, metrics as fractions.
        history: the line of ``history.jsonl``: one number per gradient step.
        scores: (N,) MCM score of each target image.
    """

    record: dict[str, Any]
    history: dict[str, Any]
    scores: Floats


def write_report(
    folder: RunFolder,
    config: DemoConfig,
    first: Draw,
    results: Sequence[Result],
    *,
    threads: int,
    seconds: float,
) -> str:
    """Write ``results.md`` and the plots into ``folder``.

    Args:
        folder: the run folder.
        config: choices of the run.
        first: images and classes of the first seed, for the plots.
        results: one per seed and method.
        threads: number of threads that the run used.
        seconds: wall time of the run.

    Returns:
        The table and the paragraph under it, for the terminal.
    """
    records = [result.record for result in results]
    table = ResultsTable.from_records(records)
    paragraph = verdict(records)
    title = (
        f"Tiny CLIP ({config.tower}) on handwritten digits, shift {config.shift} "
        f"({config.effective_severity:g}), scenario {config.scenario}, "
        f"{plural(len(config.seeds), 'seed')}"
    )
    plot(folder.path, first, results)
    page = [
        f"# {title}",
        f"Command: `{config.command()}`",
        table.markdown(),
        _CONVENTIONS,
        paragraph,
        machine_line(threads, seconds),
    ]
    folder.write_text("results.md", "\n\n".join(page) + "\n")
    printed = [
        f"\n{title}",
        table.text(),
        textwrap.fill(_CONVENTIONS, width=96, break_on_hyphens=False),
        textwrap.fill(paragraph, width=96, break_on_hyphens=False),
        f"{seconds:.0f} s; table, numbers and plots are in {folder.path}",
    ]
    return "\n\n".join(printed)


def machine_line(threads: int, seconds: float) -> str:
    """A sentence with what the numbers and the time of a run depend on."""
    facts = environment(threads)
    versions = facts["versions"]
    return (
        f"{seconds:.0f} s on {plural(threads, 'thread')} of {facts['cpu']} "
        f"({facts['cpu_capability']}); torch {versions['torch']}, "
        f"open_clip {versions['open_clip_torch']}, Python {facts['python']}."
    )


def verdict(records: Sequence[Mapping[str, Any]]) -> str:
    """Say in a paragraph which methods differ, and claim no more than the records show.

    Methods are compared seed by seed; :data:`RULE` says what "better" needs. With too few seeds one
    sentence gives what was measured and judges nothing.

    Args:
        records: lines of ``metrics.jsonl``: seed, method, metrics as fractions.
    """
    has_unknown = any(record["hm"] is not None for record in records)
    metric, name = ("hm", "HM") if has_unknown else ("per_class_accuracy", "per-class accuracy")
    sentences = []
    too_few = []
    for (first, second), words in _SENTENCES.items():
        ours, theirs = (_by_seed(records, method, metric) for method in (first, second))
        differences = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
        if not differences:
            continue
        measured = f"{first} minus {second}: {name} {_figures(differences)}"
        if len(differences) < _FEWEST_SEEDS:
            too_few.append(measured)
        else:
            sentences.append(words[_outcome(differences)].format(figures=f"({measured})"))
    if too_few:
        sentences.append(
            f"There are too few seeds to tell the methods apart ({'; '.join(too_few)})."
        )
    return " ".join([*sentences, _SCOPE])


def _by_seed(records: Sequence[Mapping[str, Any]], method: str, metric: str) -> dict[int, float]:
    return {
        record["seed"]: record[metric]
        for record in records
        if record["method"] == method and record[metric] is not None
    }


def _outcome(differences: Sequence[float]) -> str:
    """What :data:`RULE` says of at least three differences, one per seed."""
    count, mean = len(differences), statistics.fmean(differences)
    if abs(mean) < _EQUAL:
        return "unclear"
    word = "better" if mean > 0 else "worse"
    if all(difference * mean > 0 for difference in differences):
        return word
    standard_error = statistics.stdev(differences) / math.sqrt(count)
    return f"mostly {word}" if abs(mean) > 2 * standard_error else "unclear"


def _figures(differences: Sequence[float]) -> str:
    """``"+24.1 ± 8.0 points, higher on 5 of 5 seeds"``."""
    count = len(differences)
    spread = f" ± {100 * statistics.stdev(differences):.1f}" if count > 1 else ""
    wins = sum(difference > 0 for difference in differences)
    mean = statistics.fmean(differences)
    return f"{100 * mean:+.1f}{spread} points, higher on {wins} of {count} seeds"


_SCOPE = (
    "This is a tiny model on 8 x 8 digits: it shows that the method runs and what it does here, "
    "and says nothing about CLIP on photographs."
)

_ADABN = "which only re-estimates BatchNorm's statistics, without a gradient step"
_EQUAL_WEIGHTS = "its special case with equal weights"
_NO_EVIDENCE = (
    "re-normalisation alone repairs this shift better, so this table is not evidence for the "
    "entropy loss itself"
)
_CONFIDENCE = "this table cannot tell what the confidence weights add"

# Two methods, and what to say of each outcome.
_SENTENCES: dict[tuple[str, str], dict[str, str]] = {
    ("UEO", "zero-shot"): {
        "better": "UEO improves on zero-shot on every seed {figures}.",
        "mostly better": "UEO improves on zero-shot on average, not on every seed {figures}.",
        "unclear": "UEO shows no clear difference from zero-shot {figures}.",
        "mostly worse": "UEO hurts on average: it is worse than zero-shot {figures}.",
        "worse": "UEO hurts: it is worse than zero-shot on every seed {figures}.",
    },
    ("UEO", "AdaBN"): {
        "better": f"UEO beats AdaBN, {_ADABN}, on every seed {{figures}}.",
        "mostly better": f"UEO beats AdaBN, {_ADABN}, on average {{figures}}.",
        "unclear": f"UEO shows no clear difference from AdaBN, {_ADABN} {{figures}}.",
        "mostly worse": f"AdaBN, {_ADABN}, beats UEO on average {{figures}}: {_NO_EVIDENCE}.",
        "worse": f"AdaBN, {_ADABN}, beats UEO on every seed {{figures}}: {_NO_EVIDENCE}.",
    },
    ("UEO", "InfoMax"): {
        "better": f"UEO beats InfoMax, {_EQUAL_WEIGHTS}, on every seed {{figures}}.",
        "mostly better": f"UEO beats InfoMax, {_EQUAL_WEIGHTS}, on average {{figures}}.",
        "unclear": (
            f"UEO shows no clear difference from InfoMax, {_EQUAL_WEIGHTS} {{figures}}: "
            f"{_CONFIDENCE}."
        ),
        "mostly worse": f"InfoMax, {_EQUAL_WEIGHTS}, beats UEO on average {{figures}}.",
        "worse": f"InfoMax, {_EQUAL_WEIGHTS}, beats UEO on every seed {{figures}}.",
    },
    ("EntMin", "zero-shot"): {
        "better": "EntMin improves on zero-shot on every seed {figures}.",
        "mostly better": "EntMin improves on zero-shot on average {figures}.",
        "unclear": "EntMin shows no clear difference from zero-shot {figures}.",
        "mostly worse": "EntMin is worse than zero-shot on average {figures}.",
        "worse": "EntMin is worse than zero-shot on every seed {figures}.",
    },
}


def plot(folder: Path, first: Draw, results: Sequence[Result]) -> None:
    """Write the three plots of a run.

    Args:
        folder: where ``mcm_histogram.png``, ``per_class_accuracy.png`` and ``samples.png`` go.
        first: images and classes of the seed whose scores and samples are shown.
        results: one per seed and method.
    """
    for name, figure in (
        ("mcm_histogram", _histograms(first, results)),
        ("per_class_accuracy", _class_accuracies([result.record for result in results])),
        ("samples", _samples(first)),
    ):
        figure.savefig(folder / f"{name}.png", dpi=100)


def _histograms(first: Draw, results: Sequence[Result]) -> Figure:
    """The MCM scores of known and unknown images, zero-shot and UEO's, on the same axes."""
    shown = {
        result.record["method"]: result.scores
        for result in results
        if result.record["seed"] == first.seed and result.record["method"] in ("zero-shot", "UEO")
    }
    is_known = (first.labels >= 0).numpy()
    bins = histogram_edges(list(shown.values()))
    figure = Figure(figsize=(4.2 * len(shown), 3.2), layout="constrained")
    axes = figure.subplots(1, len(shown), sharex=True, sharey=True, squeeze=False)[0]
    for axis, (method, scores) in zip(axes, shown.items(), strict=True):
        for label, group, colour in (
            ("known", scores[is_known], KNOWN),
            ("unknown", scores[~is_known], UNKNOWN),
        ):
            if len(group):
                text = f"{label} ({len(group)})"
                axis.hist(group, bins=bins, density=True, alpha=0.6, color=colour, label=text)
        axis.set_title(f"{method}, seed {first.seed}")
        axis.set_xlabel("MCM score")
        axis.ticklabel_format(useOffset=False)
        axis.legend(frameon=False)
    axes[0].set_ylabel("density")
    return figure


def _class_accuracies(records: Sequence[Mapping[str, Any]]) -> Figure:
    """Bars of each digit's accuracy, mean over the seeds on which it was known, for each method."""

    def percent(method: str, digit: str) -> float:
        accuracies = [
            dict(zip(record["known_classes"], record["class_accuracies"], strict=True)).get(digit)
            for record in records
            if record["method"] == method
        ]
        seen = [accuracy for accuracy in accuracies if accuracy is not None]
        return 100 * statistics.fmean(seen) if seen else math.nan

    methods = list(dict.fromkeys(record["method"] for record in records))
    heights = np.array([[percent(method, digit) for digit in DIGIT_NAMES] for method in methods])
    places = np.arange(len(DIGIT_NAMES))
    width = 0.8 / len(methods)
    colours = colormaps["tab10"](np.arange(len(methods)))
    figure = Figure(figsize=(10.0, 3.4), layout="constrained")
    axis = figure.subplots()
    for i, method in enumerate(methods):
        offset = (i - (len(methods) - 1) / 2) * width
        axis.bar(places + offset, heights[i], width, label=method, color=colours[i])
    # Marked, so that nobody takes it for an accuracy of 0.
    for place in places[np.isnan(heights).all(axis=0)]:
        axis.text(place, 2, "not known", rotation=90, ha="center", fontsize=7, color="grey")
    axis.set_xticks(places, DIGIT_NAMES)
    axis.set_xlim(-0.6, len(DIGIT_NAMES) - 0.4)
    axis.set_ylim(0, 100)
    axis.set_ylabel("accuracy, %")
    axis.spines[["top", "right"]].set_visible(False)
    bars = axis.get_legend_handles_labels()
    figure.legend(*bars, loc="outside upper center", ncols=len(methods), frameon=False)
    return figure


def _samples(first: Draw) -> Figure:
    """One image of each digit in both domains."""
    names = [n if n in first.split.known else f"{n}\n(unknown)" for n in DIGIT_NAMES]
    figure = Figure(figsize=(9.5, 2.7), layout="constrained")
    axes = figure.subplots(2, len(DIGIT_NAMES))
    for line, title, domain, captions in (
        (axes[0], "source", first.source, DIGIT_NAMES),
        (axes[1], "target", first.target, names),
    ):
        for digit, axis in enumerate(line):
            image = domain.images[int((domain.labels == digit).nonzero()[0])]
            axis.imshow(((image + 1) / 2).clamp(0, 1).permute(1, 2, 0).numpy(), vmin=0.0, vmax=1.0)
            axis.set_title(captions[digit], fontsize=8)
            axis.set_xticks([])
            axis.set_yticks([])
        line[0].set_ylabel(title, fontsize=8)
    return figure
