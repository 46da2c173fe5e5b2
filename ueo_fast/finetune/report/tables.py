"""The tables of a report: their rows and columns, and how numbers and the user's words are written.

``templates/macros.html`` draws the tables of classes and of images column by column; a column there
needs an attribute of its row, :class:`ClassRow` or
:class:`~ueo_fast.finetune.files.run_files.Prediction`.
"""

from __future__ import annotations

import json
import shlex
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup, escape

from ueo_fast.finetune.evaluation.results_table import direction
from ueo_fast.finetune.files.run_files import METRICS, MetricsRecord
from ueo_fast.finetune.report.data import RunData

ROWS = {
    # Those of recognition first, then those of detection.
    name: METRICS[name].title[0].upper() + METRICS[name].title[1:]
    for name in sorted(METRICS, key=lambda name: METRICS[name].of_scores)
}
"""The rows of the table of metrics."""

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
        rows: for each of :data:`ROWS` the cells, percent and points.
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


def _first_and_last(run: RunData, split: str) -> list[MetricsRecord]:
    """Before and after; where there is no after yet, the last line of each method so far."""
    lines = [m for m in run.metrics if m.split == split]
    # The zero-shot method has nothing after: it measures the same model twice.
    lines = [m for m in lines if m.stage == "before" or m.method != "zeroshot"]
    ends = [m for m in lines if m.stage != "during"]
    done = {(m.method, m.seed) for m in ends}
    so_far = {(m.method, m.seed): m for m in sorted(lines, key=lambda m: m.epoch)}
    return ends + [line for key, line in so_far.items() if key not in done]


def _zero_shot_of_training_images(run: RunData) -> list[MetricsRecord]:
    """Of their own, or of the test images where these are the same."""
    before = [m for m in run.metrics if m.stage == "before"]
    return [m for m in before if m.split == "train"] or [m for m in before if m.split == "test"]


def before_and_after(run: RunData) -> tuple[MetricsRecord | None, MetricsRecord | None]:
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
    if predictions is None:
        return [ClassRow(name, None, was, now, None, None) for name, was, now in accuracies]
    return [
        ClassRow(
            name,
            predictions.labels[name] if predictions.labels else None,
            was,
            now,
            predictions.zeroshot_counts[name],
            predictions.adapted_counts[name],
        )
        for name, was, now in accuracies
    ]


def gained_and_lost(rows: list[ClassRow]) -> tuple[list[ClassRow], list[ClassRow]]:
    """The classes whose accuracy rose most and those where it fell most, most first."""
    changed = sorted((r for r in rows if r.change), key=lambda r: r.change or 0)
    lost = [row for row in changed if (row.change or 0) < 0][:EXTREMES]
    gained = [row for row in reversed(changed) if (row.change or 0) > 0][:EXTREMES]
    return gained, lost


def _metrics_table(split: str, lines: list[MetricsRecord]) -> MetricsTable:
    seeds = len({one.seed for one in lines})
    headings: list[str] = []
    cells: dict[str, list[Cell]] = {key: [] for key in ROWS}
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


def percent(value: float | None) -> str:
    """``0.614`` as ``"61.4"``; ``"-"`` for what is not defined."""
    return "-" if value is None else f"{100 * value:.1f}"


def points(before: float | None, after: float | None) -> str:
    """Difference of two fractions in points of a hundred, with its sign."""
    if before is None or after is None:
        return "-"
    text = f"{100 * (after - before):+.1f}"
    return text[1:] if float(text) == 0 else text.replace("-", "\N{MINUS SIGN}")


def count(value: int) -> str:
    """``12,345``."""
    return f"{value:,}"


def score(value: float) -> str:
    """An MCM score; at scale 1 they differ in late digits."""
    return f"{value:#.5g}"


def duration(seconds: float) -> str:
    """``"1 h 02 min"``, ``"3 min 20 s"``, ``"12.5 s"``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def value_text(value: Any) -> str:
    """A value of a JSON file, as a flag would be written."""
    if isinstance(value, str):
        return value if value.strip() else repr(value)
    return "none" if value is None else json.dumps(value, ensure_ascii=False)


def shown(text: str, limit: int = 300) -> str:
    """The user's words as a page can hold them.

    What is no character (controls, and bytes of a file name that are not UTF-8) becomes its escape
    sequence; of what is longer than ``limit``, the middle is left out.
    """
    if len(text) > limit:
        text = f"{text[: limit - limit // 3]} … {text[-limit // 3 :]}"
    return "".join(
        one
        if unicodedata.category(one) not in ("Cc", "Cs")
        else one.encode("unicode_escape").decode()
        for one in text
    )


def name(text: str, limit: int = 300) -> Markup:
    """The same as an element that keeps the direction of its letters to itself."""
    return Markup("<bdi>{}</bdi>").format(escape(shown(text, limit)))
