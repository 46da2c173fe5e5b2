"""A table of methods against metrics, mean and spread over seeds, as text and as markdown."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

COLUMNS: Mapping[str, str] = {
    "per_class_accuracy": "per-class accuracy",
    "auroc": "AUROC (known as positive)",
    "hm": "HM",
}


@dataclass(frozen=True)
class Spread:
    """Mean and spread of a metric over seeds.

    Attributes:
        mean: fraction in [0, 1].
        std: sample standard deviation (n - 1); ``None`` for a single seed.
        count: number of seeds.
    """

    mean: float
    std: float | None
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one value."""
        std = statistics.stdev(values) if len(values) > 1 else None
        return cls(statistics.fmean(values), std, len(values))

    def percent(self) -> str:
        """``"61.4 ± 2.0"``: points of a hundred."""
        mean = f"{100 * self.mean:.1f}"
        return mean if self.std is None else f"{mean} ± {100 * self.std:.1f}"


@dataclass(frozen=True)
class ResultsTable:
    """Rows of metrics by method, in order of first appearance.

    Attributes:
        rows: method to metric to spread; ``None`` where the metric is not defined (no unknown
            images).
        columns: metric to heading.
    """

    rows: Mapping[str, Mapping[str, Spread | None]]
    columns: Mapping[str, str]

    @classmethod
    def from_records(
        cls,
        records: Iterable[Mapping[str, Any]],
        columns: Mapping[str, str] = COLUMNS,
    ) -> ResultsTable:
        """From lines of ``metrics.jsonl``: each has ``method`` and the metrics as fractions."""
        grouped: dict[str, list[Mapping[str, Any]]] = {}
        for record in records:
            grouped.setdefault(record["method"], []).append(record)
        rows = {
            method: {key: _spread([record[key] for record in group]) for key in columns}
            for method, group in grouped.items()
        }
        return cls(rows, columns)

    def _cells(self) -> list[list[str]]:
        lines = [["method", *self.columns.values()]]
        for method, row in self.rows.items():
            spreads = (row[key] for key in self.columns)
            lines.append([method, *("-" if s is None else s.percent() for s in spreads)])
        return lines

    def text(self) -> str:
        """Aligned columns for a terminal."""
        lines = self._cells()
        widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
        rendered = [
            "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip()
            for line in lines
        ]
        rule = "-" * len(rendered[0])
        return "\n".join([rendered[0], rule, *rendered[1:]])

    def markdown(self) -> str:
        """A GitHub table."""
        head, *body = self._cells()
        rule = ["---", *("---:" for _ in head[1:])]
        return "\n".join("| " + " | ".join(line) + " |" for line in [head, rule, *body])


def _spread(values: Sequence[float | None]) -> Spread | None:
    defined = [value for value in values if value is not None]
    return Spread.of(defined) if defined else None
