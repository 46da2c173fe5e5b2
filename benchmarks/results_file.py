"""CSV files with a commented header: `# key: value` lines, then the table."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

FOLDER = Path(__file__).parent / "results"
Row = Mapping[str, object]


def write(
    name: str, header: Mapping[str, str], rows: Sequence[Row], folder: Path | None = None
) -> Path:
    """Write a CSV into benchmarks/results, or ``folder``."""
    path = (folder or FOLDER) / name
    with path.open("w", newline="") as file:
        file.writelines(f"# {key}: {value}\n" for key, value in header.items())
        table = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
    return path


def spread(times: Sequence[float], unit: str = "us", digits: int = 1) -> dict[str, object]:
    """The columns for repeated times: median, lowest and highest; empty if nothing was measured."""
    found = (statistics.median(times), min(times), max(times)) if times else ()
    shown = [f"{value:.{digits}f}" for value in found] or [""] * 3
    names = (f"{name}_{unit}" for name in ("median", "lowest", "highest"))
    return dict(zip(names, shown, strict=True))


def read(name: str, folder: Path | None = None) -> tuple[dict[str, str], list[dict[str, str]]]:
    """Return the header and the rows."""
    lines = ((folder or FOLDER) / name).read_text().splitlines()
    comments = [line[2:].split(": ", 1) for line in lines if line.startswith("# ")]
    table = csv.DictReader(line for line in lines if not line.startswith("#"))
    return dict(comments), list(table)
