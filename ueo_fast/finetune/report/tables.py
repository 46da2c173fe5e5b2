"""The tables of a report: their rows and columns, and how numbers and the user's words are written.

To add a column to the table of classes or of images, add a :class:`Column` to
:func:`class_columns` or :func:`image_columns`.
"""

from __future__ import annotations

import json
import shlex
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup, escape

from ueo_fast.finetune.evaluation.results_table import direction
from ueo_fast.finetune.files.run_files import METRICS, MetricsRecord
from ueo_fast.finetune.report.run_data import RunData

Ends = tuple[MetricsRecord | None, MetricsRecord | None]
"""The metrics of the zero-shot model and of the adapted one."""

ROWS = {
    # Those of recognition first, then those of detection.
    name: METRICS[name].title[0].upper() + METRICS[name].title[1:]
    for name in sorted(METRICS, key=lambda name: METRICS[name].of_scores)
}
"""The rows of the table of metrics."""

SPLITS: Mapping[str, str] = {
    "test": "Test images",
    "train": "Training images",
    "online": "Training images, each predicted as it was met",
}

SHORT_TABLE = 30
"""Classes that are shown at once; of more, the :data:`EXTREMES` at either end."""

EXTREMES = 10

MOST_ROWS = 1000
"""Rows of a table that is opened by hand; a line says what is left out, and which file has it."""


@dataclass(frozen=True)
class Cell:
    """What a table shows, and its class in the style sheet: ``better``, ``worse`` or empty."""

    text: str
    direction: str = ""


@dataclass(frozen=True)
class Column:
    """A column of a table of classes or images.

    Attributes:
        heading: empty for a column that only decorates the one before it.
        cell: what it shows of a row; text is escaped, ``Markup`` is not.
        css: its class in the style sheet; the page's script sorts a ``number`` as such.
    """

    heading: str
    cell: Callable[[Any], Cell | str]
    css: str = ""

    def of(self, row: Any) -> Cell:
        """The cell in ``row``."""
        cell = self.cell(row)
        return cell if isinstance(cell, Cell) else Cell(cell)


@dataclass(frozen=True)
class MetricsTable:
    """Metrics on the same images, before and after, side by side.

    Attributes:
        title: what the images are.
        known_images: images of known classes.
        unknown_images: images of unknown classes; without any, detection is not defined.
        columns: headings: zero-shot, then each method with its difference to that.
        rows: for each of :data:`ROWS` the cells, percent and points.
    """

    title: str
    known_images: int
    unknown_images: int
    columns: list[str]
    rows: dict[str, list[Cell]]


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
    def change(self) -> float:
        """Of the accuracy; 0 where it is not defined."""
        return 0.0 if self.before is None or self.after is None else self.after - self.before


def image_columns(run: RunData) -> list[Column]:
    """The columns of the table of all images; a row is a ``Prediction``."""
    columns = [
        Column("Image", lambda p: file_link(run, p)),
        Column("Known?", lambda p: {True: "known", False: "unknown", None: "-"}[p.known]),
        Column("Class", lambda p: name(p.adapted_class, 60)),
        Column("MCM", lambda p: score(p.adapted_mcm), "number"),
    ]
    if run.config["method"] != "zeroshot":
        columns += [
            Column("Zero-shot class", lambda p: name(p.zeroshot_class, 60)),
            Column("Zero-shot MCM", lambda p: score(p.zeroshot_mcm), "number"),
        ]
    if run.predictions is not None and run.predictions.labels:
        columns.append(Column("Label", lambda p: name(p.label or "", 60)))
    return columns


def class_columns(run: RunData, *, full: bool) -> list[Column]:
    """The columns of a table of classes; a row is a :class:`ClassRow`.

    Args:
        run: of the report.
        full: with the images that are put into each class, instead of a bar.
    """
    before, after = before_and_after(run)
    columns = [Column("Class", lambda row: name(row.name, 80))]
    if run.predictions is not None and run.predictions.labels:
        columns.append(Column("Images", lambda row: count(row.images), "number"))
    if before:
        columns.append(Column("Zero-shot", lambda row: percent(row.before), "number"))
    if after:
        columns.append(Column("Adapted", lambda row: percent(row.after), "number"))
    if before and after:
        columns.append(
            Column("Points", lambda row: difference("accuracy", row.before, row.after), "number")
        )
    if not full and (before or after):
        columns.append(Column("", _bar, "bar-cell"))
    if full and run.predictions is not None:
        columns.append(Column("Predicted, zero-shot", lambda row: count(row.put_before), "number"))
        if run.config["method"] != "zeroshot":
            columns.append(Column("Predicted, adapted", lambda row: count(row.put_after), "number"))
    return columns


def _bar(row: ClassRow) -> Markup:
    """The last accuracy as a bar, with a stroke at the first."""
    last = row.before if row.after is None else row.after
    inside = Markup("")
    if last is not None:
        inside += Markup('<i style="width:{}%"></i>').format(percent(last))
    if row.before is not None and row.after is not None:
        inside += Markup('<b style="left:{}%"></b>').format(percent(row.before))
    return Markup('<span class="bar">{}</span>').format(inside)


def file_link(run: RunData, one: Any) -> Markup:
    """The name of an image, which links to it where the run's own list has it."""
    text = name(one.image, 80)
    link = run.links.get(one.path)
    return text if link is None else Markup('<a href="{}">{}</a>').format(link, text)


def options(run: RunData) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Flags with their values: those that the command of the run names, and the others.

    The command is the shortest one that gives the run, so what it names is not the default.
    """
    given = set(_flags(run.environment.get("command")))
    rows = [(f"--{key.replace('_', '-')}", _value_text(value)) for key, value in run.config.items()]
    return [row for row in rows if row[0] in given], [row for row in rows if row[0] not in given]


def _flags(command: Any) -> Iterator[str]:
    try:
        words = shlex.split(command) if isinstance(command, str) else []
    except ValueError:  # quotes that do not match: nobody's shell made it
        return
    yield from (word.partition("=")[0] for word in words if word.startswith("--"))


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
        "folder": "current folder",
    }
    rows = [
        (titles.get(key, key.replace("_", " ")), _value_text(value))
        for key, value in environment.items()
        if key not in ("command", "argv", "versions")
    ]
    versions = environment.get("versions")
    if isinstance(versions, dict):
        rows += [(key, _value_text(value)) for key, value in versions.items() if value is not None]
    return rows


def metrics_tables(run: RunData) -> list[MetricsTable]:
    """One table per kind of image, in the order of :data:`SPLITS`."""
    tables = []
    for split in SPLITS:
        lines = _first_and_last(run, split)
        if lines and split == "online":  # they are compared with the zero-shot model on the same
            before = [m for m in run.metrics if m.stage == "before"]
            lines += [m for m in before if m.split == "train"] or before
        if lines:
            lines.sort(key=lambda m: (m.seed, m.stage != "before"))
            tables.append(_metrics_table(SPLITS[split], lines))
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


def _metrics_table(title: str, lines: list[MetricsRecord]) -> MetricsTable:
    seeds = len({one.seed for one in lines})
    headings: list[str] = []
    cells: dict[str, list[Cell]] = {key: [] for key in ROWS}
    for line in lines:
        heading = f"{line.title}, epoch {line.epoch}" if line.stage == "during" else line.title
        headings.append(heading if seeds == 1 else f"{heading}, seed {line.seed}")
        base = next((m for m in lines if m.stage == "before" and m.seed == line.seed), line)
        if line is not base:
            headings.append("points")
        for key, row in cells.items():
            row.append(Cell(percent(line.values[key])))
            if line is not base:
                row.append(difference(key, base.values[key], line.values[key]))
    return MetricsTable(title, lines[-1].known_images, lines[-1].unknown_images, headings, cells)


def before_and_after(run: RunData) -> Ends:
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
    ends, predictions = before_and_after(run), run.predictions
    if run.problem is None or (ends == (None, None) and predictions is None):
        return []
    missing: tuple[None, ...] = (None,) * len(run.problem.known)
    before, after = (missing if end is None else end.class_accuracies for end in ends)
    accuracies = zip(run.problem.known, before, after, strict=True)
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
    ranked = sorted(rows, key=lambda row: row.change)
    lost = [row for row in ranked if row.change < 0][:EXTREMES]
    gained = [row for row in reversed(ranked) if row.change > 0][:EXTREMES]
    return gained, lost


def difference(key: str, before: float | None, after: float | None) -> Cell:
    """Of a metric, in points; what is equal as it is written has no direction."""
    if before is None or after is None:
        return Cell("-")
    text = f"{100 * (after - before):+.1f}"
    text = text[1:] if float(text) == 0 else text.replace("-", "\N{MINUS SIGN}")
    return Cell(text, direction(key, before, after))


def percent(value: float | None) -> str:
    """``0.614`` as ``"61.4"``; ``"-"`` for what is not defined."""
    return "-" if value is None else f"{100 * value:.1f}"


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


def _value_text(value: Any) -> str:
    """A value of a JSON file, as a flag would be written."""
    if isinstance(value, str):
        return value if value.strip() else repr(value)
    return "none" if value is None else json.dumps(value, ensure_ascii=False)


def shown(text: str, limit: int = 300) -> str:
    """The user's words as a page can hold them.

    Control characters and bytes of a file name that are not UTF-8 become their escape sequence; of
    what is longer than ``limit``, the middle is left out.
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
