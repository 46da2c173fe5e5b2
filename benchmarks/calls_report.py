"""The table of what a call of the loss costs besides its arithmetic, for docs/performance.md."""

from __future__ import annotations

import functools
from pathlib import Path

from benchmarks import markdown, results_file

CSV = "calls_cpu.csv"
NOT_MEASURED = ["Not measured yet: `python -m benchmarks calls` does it."]
MOST_OURS_US = 35.0
MOST_OF_FUNCTION = 1.25
"""Design targets at 8 x 10: microseconds besides ops and engine, or times a one-op Function."""


def _lowest(folder: Path | None) -> dict[tuple[str, str, str], dict[str, float]]:
    """Microseconds by case and contender."""
    cases: dict[tuple[str, str, str], dict[str, float]] = {}
    for row in results_file.read(CSV, folder)[1]:
        case = cases.setdefault((row["rows"], row["columns"], row["confidence"]), {})
        case[row["contender"]] = float(row["lowest_us"])
    return cases


def table(folder: Path | None = None) -> list[str]:
    head = ["B x C", "confidence", "engine", "the ops", "one-op `Function`", "ueo_fast"]
    head += ["its own", "ours", "vs one-op `Function`", "target"]
    lines = []
    for (rows, columns, confidence), by_name in _lowest(folder).items():
        names = ("engine", "ops", "function", "ueo_fast")
        engine, ops, function, ueo_fast = (by_name[name] for name in names)
        ours, ratio = ueo_fast - ops - engine, ueo_fast / function
        met = ours <= MOST_OURS_US or ratio <= MOST_OF_FUNCTION
        times = (engine, ops, function, ueo_fast, function - ops - engine, ours)
        cells = [f"{rows} x {columns}", confidence]
        cells += [markdown.time(time, digits=1) for time in times]
        lines.append([*cells, f"{ratio:.2f}", "met" if met else "missed"])
    return markdown.table(head, lines, words=2)


_if_measured = functools.partial(markdown.if_measured, otherwise=NOT_MEASURED)

TABLES = {
    "calls": _if_measured(CSV, table),
    "calls provenance": _if_measured(CSV, lambda: markdown.provenance(CSV)),
}
"""By name of the marker."""
