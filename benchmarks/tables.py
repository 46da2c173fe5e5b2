"""The docs' tables as data: the CSV, the lines made from its rows, and what each column shows."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import results_file

LOSS_KEYS = ("rows", "columns", "dtype")
LAYER_KEYS = ("op", "shape", "layout", "dtype")
TOWER_KEYS = ("model", "batch", "layout", "dtype")

Line = dict[str, Any]
"""What a table shows in one line: the keys of a case as text, and a number for each contender."""
Lines = Callable[[str, Path], list[Line]]
"""From the name of a CSV and its folder."""


# ---- What a column shows ------------------------------------------------------------------------


@dataclass(frozen=True)
class Column:
    """A column: its label, the cell for a line, and whether it holds words or numbers."""

    label: str
    cell: Callable[[Line], str]
    words: bool = False


def numbers(text: Callable[[Any], str], *shown: str, words: bool = False) -> list[Column]:
    """Show values by "name", or by "label=name"; "-" if a line has none."""
    columns = []
    for one in shown:
        label, named, name = one.rpartition("=")

        def cell(line: Line, name: str = name) -> str:
            return text(line[name]) if name in line else "-"

        columns.append(Column(label if named else name, cell, words))
    return columns


def words(*shown: str, text: Callable[[str], str] = str) -> list[Column]:
    """Show keys, named as for :func:`numbers`."""
    return numbers(text, *shown, words=True)


def ratio(
    label: str,
    top: str,
    bottom: str,
    target: float | Callable[[Line], float | None] | None = None,
    *,
    digits: int = 1,
    percent: bool = False,
    at_most: bool = False,
) -> Column:
    """Show ``top / bottom`` and whether it reaches its target; "-" if the line lacks one."""

    def cell(line: Line) -> str:
        if not {top, bottom} <= line.keys():
            return "-"
        value = line[top] / line[bottom]
        shown = f"{100 * value:.0f}%" if percent else f"{value:.{digits}f}"
        wanted = target(line) if callable(target) else target
        if wanted is None:
            return shown
        aim = f"target {100 * wanted:.0f}%" if percent else f"target {wanted:g}"
        met = value <= wanted if at_most else value >= wanted
        return f"**{shown}** ({aim})" if met else f"{shown} ({aim}, missed)"

    return Column(label, cell)


def time(microseconds: float, digits: int = 0) -> str:
    """Show a time in the unit that reads best, with ``digits`` decimals below 100 µs."""
    if microseconds < 100:
        return f"{microseconds:.{digits}f} µs"
    if microseconds < 1000:
        return f"{microseconds:.0f} µs"
    return f"{microseconds / 1000:.1f} ms"


tenths = functools.partial(time, digits=1)

SIZE = Column("B x C", lambda line: f"{line['rows']} x {line['columns']}", words=True)
LOSS = (SIZE, *words("dtype"))
LAYER_NAMES = {
    "bn": "`frozen_batch_norm`",
    "bn+relu": "with ReLU",
    "bn+add+relu": "with addition and ReLU",
    "affine": "`channel_affine`, `dim=-1`",
    "layer_norm": "`layer_norm`",
}
LAYER = (
    *words("layer=op", text=LAYER_NAMES.__getitem__),
    *words("x=shape", text=lambda shape: shape.replace("x", " x ")),
    *words("layout", "dtype"),
)
TOWER = (
    *words("tower=model", "batch", "layout"),
    *words("dtype", text=lambda dtype: dtype.replace("bfloat16", "bfloat16 autocast")),
)


Target = Callable[[Line], float | None]


def times_on_a_cpu(vs_eager: Target | None, vs_compile: Target | None) -> list[Column]:
    """The times of ours, (b) and (c), and how many times faster ours is."""
    return [
        *numbers(time, "ueo_fast", "(b)=eager", "(c)=compile"),
        ratio("vs (b)", "eager", "ueo_fast", vs_eager),
        ratio("vs (c)", "compile", "ueo_fast", vs_compile),
    ]


OF_THE_FLOOR = ratio("of the floor", "floor", "ueo_fast", percent=True)


# ---- From a CSV to lines ------------------------------------------------------------------------


def by_case(
    keys: Sequence[str],
    *values: str,
    who: Callable[[Mapping[str, str]], str | None] = lambda row: row["contender"],
) -> Lines:
    """Make one line per case.

    Args:
        keys: the columns of the CSV that name a case.
        values: the columns with numbers. A line has the first under the contender's name, others
            under the name of both: "eager", "eager peak_bytes". Empty fields are left out.
        who: the name of a row's contender; None leaves the row out.
    """

    def lines(csv: str, folder: Path) -> list[Line]:
        found: dict[tuple[str, ...], Line] = {}
        for row in results_file.read(csv, folder)[1]:
            case = {key: row[key] for key in keys}
            line = found.setdefault(tuple(case.values()), case)
            if name := who(row):
                for value in values:
                    if row[value]:
                        line[name if value == values[0] else f"{name} {value}"] = float(row[value])
        return list(found.values())

    return lines


def by_row(csv: str, folder: Path) -> list[Line]:
    """Make one line of each row, all of it text."""
    return list(map(dict, results_file.read(csv, folder)[1]))


# ---- Drawing ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Text:
    """What stands at a marker in the docs, made from a CSV."""

    csv: str
    draw: Callable[[Path], list[str]]


def cells(columns: Sequence[Column], lines: Sequence[Line]) -> list[list[str]]:
    return [[column.label for column in columns]] + [
        [column.cell(line) for column in columns] for line in lines
    ]


def table(
    csv: str,
    lines: Lines,
    *columns: Column,
    more: Callable[[list[Line]], Sequence[Column]] = lambda lines: (),
    notes: Callable[[Path], list[str]] = lambda folder: [],
) -> Text:
    """Describe a table of the docs.

    Args:
        csv: the file.
        lines: what makes the lines from it.
        columns: what each line shows.
        more: makes the columns after them, if they depend on what was measured.
        notes: makes the lines of text below the table.
    """

    def draw(folder: Path) -> list[str]:
        found = lines(csv, folder)
        all_columns = [*columns, *more(found)]
        head, *rows = cells(all_columns, found)
        aligned = ["---" if column.words else "---:" for column in all_columns]
        labels = " | ".join(head).rstrip()  # the last may be empty
        drawn = [f"| {' | '.join(row)} |" for row in (aligned, *rows)]
        return [f"| {labels} |", *drawn, *notes(folder)]

    return Text(csv, draw)


def provenance(csv: str) -> Text:
    """Show the command that made a CSV, and what its header says about the machine."""

    def draw(folder: Path) -> list[str]:
        header = results_file.read(csv, folder)[0]
        facts = ", ".join(f"{key} {value}" for key, value in header.items() if key != "command")
        return [f"`{header['command']}`: {facts}."]

    return Text(csv, draw)


Drawn = Callable[..., list[str]]
"""From a folder of CSVs, by default benchmarks/results, to what stands at a marker in the docs."""


def measured_by(how: str, entries: Mapping[str, Text | str]) -> dict[str, Drawn]:
    """Draw what stands at each marker; without its CSV, say how to measure it.

    Args:
        how: the command; "" for a CSV that must be there.
        entries: by marker. A CSV's name stands for its provenance.
    """

    def draw(entry: Text, folder: Path | None = None) -> list[str]:
        folder = folder or results_file.FOLDER
        if how and entry.csv and not (folder / entry.csv).exists():
            return [f"Not measured yet: {how} does it."]
        return entry.draw(folder)

    return {
        marker: functools.partial(draw, provenance(entry) if isinstance(entry, str) else entry)
        for marker, entry in entries.items()
    }
