"""The tables of a report, as rows of text."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ueo_fast.finetune.evaluation.results_table import direction
from ueo_fast.finetune.report.predictions import Predictions
from ueo_fast.finetune.report.read_run import MetricsLine, RunData
from ueo_fast.finetune.report.text import percent, points, value_text

METRICS: Mapping[str, str] = {
    "per_class_accuracy": "Per-class accuracy",
    "accuracy": "Accuracy",
    "hm": "HM",
    "auroc": "AUROC",
    "aupr": "AUPR",
    "fpr95": "FPR95",
}
DIFFERENCE = "points"

SPLITS: Mapping[str, str] = {
    "test": "Test images",
    "train": "Training images",
    "online": "Training images, each predicted as it was met",
}

SHORT_TABLE = 30
"""Classes that are shown at once; of more, the :data:`EXTREMES` at either end."""

EXTREMES = 10

MOST_ROWS = 1000
"""Rows of a table that is opened by hand; what is left out is said, with the file that has it."""


@dataclass(frozen=True)
class Cell:
    """A number with its direction: ``better``, ``worse`` or empty."""

    text: str
    direction: str = ""


@dataclass(frozen=True)
class MetricsTable:
    """Metrics on the same images, before and after, side by side.

    Attributes:
        split: a key of :data:`SPLITS`.
        known_images: images of known classes.
        unknown_images: images of unknown classes; without any, detection is not defined.
        columns: headings: zero-shot, then each method with its difference to that.
        rows: for each of :data:`METRICS` the cells, percent and points.
    """

    split: str
    known_images: int
    unknown_images: int
    columns: tuple[str, ...]
    rows: Mapping[str, tuple[Cell, ...]]

    @property
    def title(self) -> str:
        """What the images are."""
        return SPLITS[self.split]


@dataclass(frozen=True)
class ClassRow:
    """One known class.

    Attributes:
        name: of the class.
        images: labelled images of it; ``None`` without labels.
        before: zero-shot accuracy, a fraction; ``None`` where not defined.
        after: the same of the adapted model.
        put_before: images that the zero-shot model puts here; ``None`` without predictions.
        put_after: the same of the adapted model.
    """

    name: str
    images: int | None
    before: float | None
    after: float | None
    put_before: int | None
    put_after: int | None

    @property
    def change(self) -> float | None:
        """Points of a hundred, or ``None``."""
        defined = self.before is not None and self.after is not None
        return 100 * (self.after - self.before) if defined else None  # type: ignore[operator]

    @property
    def difference(self) -> Cell:
        """The same as it is written."""
        return difference("accuracy", self.before, self.after)


def options(run: RunData) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Flags with their values: those that the command of the run names, and the others.

    The command is the shortest one that gives the run, so what it names is not the default.
    """
    given = set(_flags(run.environment.get("command")))
    rows = [(f"--{key.replace('_', '-')}", value_text(value)) for key, value in run.config.items()]
    return [row for row in rows if row[0] in given], [row for row in rows if row[0] not in given]


def facts(environment: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What numbers depend on besides the options."""
    titles = {
        "time": "started",
        "python": "Python",
        "platform": "system",
        "cpu": "processor",
        "cpu_capability": "instruction set",
        "cpus": "processors",
        "threads": "threads used",
        "seeds": "seeds",
        "folder": "current folder",
    }
    rows = [
        (titles.get(key, key.replace("_", " ")), value_text(value))
        for key, value in environment.items()
        if key not in ("command", "argv", "versions")
    ]
    versions = environment.get("versions")
    if isinstance(versions, dict):
        rows += [(key, value_text(value)) for key, value in versions.items() if value is not None]
    return rows


def metrics_tables(run: RunData) -> list[MetricsTable]:
    """One table per kind of image, in the order of :data:`SPLITS`."""
    tables = []
    for split in SPLITS:
        lines = _first_and_last(run, split)
        if lines:
            if split == "online":
                lines += _zero_shot_of_training_images(run)
            lines.sort(key=lambda m: (m.seed, m.stage != "before"))
            tables.append(_metrics_table(split, lines))
    return tables


def _first_and_last(run: RunData, split: str) -> list[MetricsLine]:
    """Before and after; where there is no after yet, the last line of each method so far."""
    lines = [m for m in run.metrics if m.split == split]
    # The zero-shot method has nothing after: it measures the same model twice.
    lines = [m for m in lines if m.stage == "before" or m.method != "zeroshot"]
    ends = [m for m in lines if m.stage != "during"]
    done = {(m.method, m.seed) for m in ends}
    so_far = {(m.method, m.seed): m for m in sorted(lines, key=lambda m: m.epoch)}
    return ends + [line for key, line in so_far.items() if key not in done]


def _zero_shot_of_training_images(run: RunData) -> list[MetricsLine]:
    """Of their own, or of the test images where these are the same."""
    before = [m for m in run.metrics if m.stage == "before"]
    return [m for m in before if m.split == "train"] or [m for m in before if m.split == "test"]


def before_and_after(run: RunData) -> tuple[MetricsLine | None, MetricsLine | None]:
    """The zero-shot line and the adapted one, on the most telling images that have metrics."""
    for split in SPLITS:
        lines = [m for m in run.metrics if m.split == split]
        before = [m for m in lines if m.stage == "before"]
        after = [m for m in lines if m.stage == "after" and m.method != "zeroshot"]
        if before or after:
            return (before[-1] if before else None), (after[-1] if after else None)
    return None, None


def class_rows(run: RunData) -> list[ClassRow]:
    """One row per known class, in the order of the prompts; empty where nothing was measured."""
    before, after = before_and_after(run)
    predictions = run.predictions
    if run.problem is None or (before is None and after is None and predictions is None):
        return []
    missing: tuple[None, ...] = (None,) * len(run.problem.known)
    accuracies = zip(
        run.problem.known,
        missing if before is None else before.class_accuracies,
        missing if after is None else after.class_accuracies,
        strict=True,
    )
    return [_class_row(name, was, now, predictions) for name, was, now in accuracies]


def _class_row(
    name: str, before: float | None, after: float | None, predictions: Predictions | None
) -> ClassRow:
    if predictions is None:
        return ClassRow(name, None, before, after, None, None)
    return ClassRow(
        name,
        predictions.labels[name] if predictions.labels else None,
        before,
        after,
        predictions.zeroshot_counts[name],
        predictions.adapted_counts[name],
    )


def gained_and_lost(rows: list[ClassRow]) -> tuple[list[ClassRow], list[ClassRow]]:
    """The classes whose accuracy rose most and those where it fell most, most first."""
    changed = sorted((r for r in rows if r.change), key=lambda r: r.change or 0)
    lost = [row for row in changed if (row.change or 0) < 0][:EXTREMES]
    gained = [row for row in reversed(changed) if (row.change or 0) > 0][:EXTREMES]
    return gained, lost


def _metrics_table(split: str, lines: list[MetricsLine]) -> MetricsTable:
    seeds = len({one.seed for one in lines})
    headings: list[str] = []
    cells: dict[str, list[Cell]] = {key: [] for key in METRICS}
    for line in lines:
        title = f"{line.title}, epoch {line.epoch}" if line.stage == "during" else line.title
        headings.append(title if seeds == 1 else f"{title}, seed {line.seed}")
        base = next((m for m in lines if m.stage == "before" and m.seed == line.seed), None)
        if base is not None and line is not base:
            headings.append(DIFFERENCE)
        for key, row in cells.items():
            row.append(Cell(percent(line.values[key])))
            if base is not None and line is not base:
                row.append(difference(key, base.values[key], line.values[key]))
    return MetricsTable(
        split,
        lines[-1].known_images,
        lines[-1].unknown_images,
        tuple(headings),
        {key: tuple(row) for key, row in cells.items()},
    )


def difference(key: str, before: float | None, after: float | None) -> Cell:
    """Of a metric, in points; what is equal as it is written has no direction."""
    return Cell(points(before, after), direction(key, before, after))


def _flags(command: Any) -> Iterator[str]:
    try:
        words = shlex.split(command) if isinstance(command, str) else []
    except ValueError:  # quotes that do not match: nobody's shell made it
        return
    yield from (word.partition("=")[0] for word in words if word.startswith("--"))
