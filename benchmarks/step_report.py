"""The CSV of the whole step, and its tables for docs/performance.md."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import markdown, results_file
from benchmarks.step_cases import CASES, CONTENDERS, PARTS

CSV, TEXT = "step_cpu.csv", "step_text_cpu.csv"
NOT_MEASURED = ["Not measured yet: `python -m benchmarks step` does it."]
TARGET = 2.4
WHOLE = "whole step"
TEXTS = ("packed", "cut", "whole")
NAMES = {"ueo_fast": "ueo_fast", "authors": "the authors'"}

Case = tuple[str, str, str]
Seconds = dict[Case, dict[str, dict[str, float]]]
"""By case (model, batch, classes), contender and part."""


def rows(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, object]]:
    """One row per case, contender and part: medians over the turns, in seconds."""
    spent: dict[tuple[object, ...], list[float]] = {}
    for run in runs:
        info = run["extra_info"]
        case = (info["model"], info["batch"], info["classes"], info["contender"])
        parts = {WHOLE: run["stats"]["median"], **info["parts"]}
        for part, seconds in parts.items():
            spent.setdefault((*case, part), []).append(seconds)
    return [
        {
            **dict(zip(("model", "batch", "classes", "contender", "part"), key, strict=True)),
            "median_s": f"{statistics.median(seconds):.5f}",
            "lowest_s": f"{min(seconds):.5f}",
            "highest_s": f"{max(seconds):.5f}",
            "turns": len(seconds),
        }
        for key, seconds in spent.items()
    ]


def _seconds(folder: Path | None) -> Seconds:
    found: Seconds = {}
    for row in results_file.read(CSV, folder)[1]:
        case = (row["model"], row["batch"], row["classes"])
        parts = found.setdefault(case, {}).setdefault(row["contender"], {})
        parts[row["part"]] = float(row["median_s"])
    return dict(sorted(found.items(), key=lambda item: (item[0][0], int(item[0][1]))))


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.1f} ms"


def speed_table(folder: Path | None = None) -> list[str]:
    head = ["tower", "batch", "classes", *(NAMES[name] for name in CONTENDERS), "times faster"]
    lines = []
    for case, by_name in _seconds(folder).items():
        ours, theirs = (by_name[name][WHOLE] for name in CONTENDERS)
        times = [_time(ours), _time(theirs), markdown.ratio(theirs / ours, TARGET)]
        lines.append([*case, *times])
    return markdown.table(head, lines, words=1)


def missed(folder: Path | None = None) -> list[str]:
    """A sentence on the sizes where the target is missed, with the share of what both do alike."""
    slow = []
    for (tower, batch, _), by_name in _seconds(folder).items():
        ours, theirs = (by_name[name] for name in CONTENDERS)
        ratio = theirs[WHOLE] / ours[WHOLE]
        if ratio < TARGET:
            image = sum(theirs[part] for part in ("image forward", "image backward"))
            slow.append(
                f"{tower} at batch {batch} ({ratio:.2f}; the image tower alone is "
                f"{100 * image / theirs[WHOLE]:.0f}% of the authors' step, so that a step without "
                f"any text would be {theirs[WHOLE] / image:.2f} times as fast as theirs)"
            )
    measured = {(tower, batch) for tower, batch, _ in _seconds(folder)}
    absent = [
        f"{case.model} at batch {case.batch}"
        for case in CASES
        if (case.model, str(case.batch)) not in measured
    ]
    sentence = f"Less than {TARGET:g} times as fast: {'; '.join(slow) or 'nowhere'}."
    return [f"{sentence} Not measured: {', '.join(absent)}." if absent else sentence]


def parts_table(folder: Path | None = None) -> list[str]:
    """Each part's time, ours then theirs, for every case."""
    found = _seconds(folder)
    head = ["tower", "batch", "step of", *PARTS]
    lines = [
        [tower, batch, NAMES[name], *(_time(by_name[name][part]) for part in PARTS)]
        for (tower, batch, _), by_name in found.items()
        for name in CONTENDERS
    ]
    return markdown.table(head, lines, words=3)


def text_table(folder: Path | None = None) -> list[str]:
    """The text tower alone: positions and time, by number of classes."""
    found: dict[str, dict[str, dict[str, str]]] = {}
    for row in results_file.read(TEXT, folder)[1]:
        found.setdefault(row["classes"], {})[row["contender"]] = row
    head = ["classes", *(f"positions, {name}" for name in TEXTS), *TEXTS]
    lines = []
    for classes, by_name in found.items():
        times = {name: float(row["median_us"]) for name, row in by_name.items()}
        cells = [by_name[name]["rows"] if name in by_name else "-" for name in TEXTS]
        cells += [_time(times[name] / 1e6) if name in times else "-" for name in TEXTS]
        for name in TEXTS[1:]:
            cells.append(f"{times[name] / times['packed']:.1f}" if name in times else "-")
        lines.append([classes, *cells])
    return markdown.table([*head, "vs cut", "vs whole"], lines, words=0)


_if_measured = functools.partial(markdown.if_measured, otherwise=NOT_MEASURED)

TABLES = {
    "step speed": _if_measured(CSV, speed_table),
    "step missed": _if_measured(CSV, missed),
    "step parts": _if_measured(CSV, parts_table),
    "step provenance": _if_measured(CSV, lambda: markdown.provenance(CSV)),
    "step text": _if_measured(TEXT, text_table),
    "step text provenance": _if_measured(TEXT, lambda: markdown.provenance(TEXT)),
}
"""By name of the marker."""
