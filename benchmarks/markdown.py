"""Cells, tables and footnotes of the docs, shared by the CPU's and the GPU's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks import results_file


def time(microseconds: float, digits: int = 0) -> str:
    """In the unit that reads best; ``digits`` decimals of a microsecond below 100 µs."""
    if microseconds < 100:
        return f"{microseconds:.{digits}f} µs"
    if microseconds < 1000:
        return f"{microseconds:.0f} µs"
    return f"{microseconds / 1000:.1f} ms"


def ratio(value: float, target: float | None) -> str:
    """How many times faster; bold where it reaches the target."""
    if target is None:
        return f"{value:.1f}"
    return (
        f"**{value:.1f}** (target {target:g})"
        if value >= target
        else f"{value:.1f} (target {target:g}, missed)"
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]], words: int) -> list[str]:
    """A table whose first ``words`` columns hold words, the others numbers."""
    aligned = ["---" if column < words else "---:" for column in range(len(head))]
    return [f"| {' | '.join(cells)} |" for cells in (head, aligned, *rows)]


def provenance(name: str, folder: Path | None = None) -> list[str]:
    """Show the command that made a CSV, and what its header says of the machine."""
    header = results_file.read(name, folder)[0]
    facts = ", ".join(f"{key} {value}" for key, value in header.items() if key != "command")
    return [f"`{header['command']}`: {facts}."]


def if_measured(
    name: str, make: Callable[[], list[str]], otherwise: list[str]
) -> Callable[[], list[str]]:
    """Return a function that makes the table, or returns ``otherwise`` if its CSV is missing."""

    def lines() -> list[str]:
        return make() if (results_file.FOLDER / name).exists() else otherwise

    return lines
