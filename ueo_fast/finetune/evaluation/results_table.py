"""Results in words and in a table of methods against metrics, as every command shows them."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ueo_fast.finetune.data.names import plural
from ueo_fast.finetune.files.run_files import HEADLINE, METRICS

COLUMNS: Mapping[str, str] = {
    name: METRICS[name].title + (" (known as positive)" if METRICS[name].of_scores else "")
    for name in HEADLINE
}
_JUDGED = {name: METRICS[name].title for name in ("per_class_accuracy", "auroc")}


@dataclass(frozen=True)
class KnownCounts:
    """How many images count as known, and from which score on.

    Attributes:
        known: images whose MCM score reaches ``threshold``, to within rounding.
        unknown: the others; images without a verdict are in neither.
        threshold: on the MCM score; ``None`` where the scores allow none.
        rule: how it was chosen, e.g. ``"otsu"``.
    """

    known: int
    unknown: int
    threshold: float | None
    rule: str

    def text(self) -> str:
        """A clause that follows a semicolon."""
        if self.threshold is None:
            return (
                f"the scores allow no threshold ({self.rule}), so no image counts as known or "
                "unknown"
            )
        counts = "counts" if self.known == 1 else "count"
        return (
            f"at a threshold of {self.threshold:.6g} on the MCM score ({self.rule}), "
            f"{self.known:,} of {plural(self.known + self.unknown, 'image')} {counts} as known and "
            f"{self.unknown:,} as unknown"
        )


def direction(metric: str, before: float | None, after: float | None) -> str:
    """``"better"``, ``"worse"``, or empty: not defined, or equal to a tenth of a point."""
    if before is None or after is None or not float(f"{100 * (after - before):.1f}"):
        return ""
    return "better" if (after > before) != METRICS[metric].low_is_good else "worse"


def verdict(
    title: str,
    before: Mapping[str, float | None] | None,
    after: Mapping[str, float | None] | None,
    *,
    moved: tuple[int, int] | None = None,
    counts: KnownCounts | None = None,
) -> str:
    """Say in one sentence what got better or worse, and how many images count as known.

    Args:
        title: of the method.
        before: metrics of the zero-shot model as fractions; ``None`` without labels.
        after: the same of the adapted model; ``None`` where it was not measured.
        moved: without metrics: images that changed class, and images in all.
        counts: of the adapted model; ``None`` where they are not known yet.
    """
    if before is not None and after is not None:
        found = _changes(title, before, after)
    elif before is not None or after is not None:
        values = before or after or {}
        named = ", ".join(
            f"{name} {100 * value:.1f}%"
            for key, name in _JUDGED.items()
            if (value := values[key]) is not None
        )
        only = "zero-shot" if after is None else title
        found = f"Not compared: only {only} was measured ({named})"
    elif moved is not None:
        found = (
            f"Not measured, because there are no labels: {title} changed the class of "
            f"{moved[0]:,} of {plural(moved[1], 'image')}"
        )
    else:
        found = (
            "Not measured yet" if counts is None else "Not measured, because there are no labels"
        )
    return f"{found}; {counts.text()}." if counts is not None else f"{found}."


def _changes(
    title: str, before: Mapping[str, float | None], after: Mapping[str, float | None]
) -> str:
    said: dict[str, list[str]] = {"better": [], "worse": [], "": []}
    largest = 0.0
    for key, name in _JUDGED.items():
        was, now = before[key], after[key]
        if was is None or now is None:
            continue
        found = direction(key, was, now)
        span = f"{name} from {100 * was:.1f}% to {100 * now:.1f}%"
        points = f"{abs(100 * (now - was)):.1f}"
        largest = max(largest, float(points))
        unit = "point" if points == "1.0" else "points"
        said[found].append(
            f"{span} (by {points} {unit})" if found else f"{name} at {100 * now:.1f}%"
        )
    better, worse, same = said["better"], said["worse"], said[""]
    word = ("Mixed" if worse else "Better") if better else "Worse" if worse else "No change"
    if largest < 1 and (better or worse):
        word = f"Slightly {word.lower()}"
    clauses = [
        f"{verb} {' and '.join(parts)}"
        for verb, parts in (("raised", better), ("lowered", worse), ("left", same))
        if parts
    ]
    return f"{word}: {title} {(' but ' if better and worse else ' and ').join(clauses)}"


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
        """From mappings with ``method``, the name of the row, and the metrics as fractions."""
        grouped: dict[str, list[Mapping[str, Any]]] = {}
        for record in records:
            grouped.setdefault(record["method"], []).append(record)
        rows = {
            method: {key: _spread([record[key] for record in group]) for key in columns}
            for method, group in grouped.items()
        }
        return cls(rows, columns)

    def convention(self) -> str:
        """What its numbers are, in parentheses; nothing that it does not show."""
        spreads = [(key, row[key]) for row in self.rows.values() for key in self.columns]
        defined = {key for key, spread in spreads if spread is not None}
        parts = ["percent"]
        if any(spread is not None and spread.std is not None for _, spread in spreads):
            parts[0] += ", mean ± standard deviation over seeds (n - 1)"
        detection = [one.title for key, one in METRICS.items() if one.of_scores and key in defined]
        if detection:
            named = ", ".join(detection[:-1]) + " and " if detection[1:] else ""
            parts.append(
                f"{named}{detection[-1]} {'are' if named else 'is'} of the MCM score with known "
                "images as the positive class"
            )
        if "hm" in defined:
            parts.append("HM is the harmonic mean of per-class accuracy and AUROC")
        if any(spread is None for _, spread in spreads):
            parts.append("- means not defined, because there are no unknown images")
        return f"({'; '.join(parts)})"

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
        lines = [head, rule, *body]
        return "\n".join("| " + " | ".join(map(escaped, line)) + " |" for line in lines)


def escaped(text: str) -> str:
    """Text that does not end a cell of a GitHub table."""
    return text.replace("|", "\\|")


def _spread(values: Sequence[float | None]) -> Spread | None:
    defined = [value for value in values if value is not None]
    return Spread.of(defined) if defined else None


FEW = 5
"""Fewer images than this in one class say nothing."""


def doubts(
    *,
    classes: Sequence[str],
    predicted: Collection[int | str] = (),
    images: int = 0,
    auroc: float | None = None,
) -> list[str]:
    """What makes predictions doubtful, one sentence each; mostly there is nothing.

    Args:
        classes: names of the known classes.
        predicted: the classes that at least one image was put into.
        images: how many images there are; of fewer than 5 nothing is said about classes.
        auroc: of the MCM score, where it is defined.
    """
    if len(classes) == 1:
        return [
            f"the list has a single class, {classes[0]!r}: every image is put into it with "
            "probability and MCM score 1, so nothing can be learnt and no unknown image found. "
            "List more classes, for example what else the images may show"
        ]
    found = []
    if images >= FEW and len(predicted) == 1:
        (only,) = predicted
        name = classes[only] if isinstance(only, int) else only
        found.append(
            f"all {images} images are put into one class, {name!r}. Unless they all show it, the "
            "names or the prompt do not fit the images, or the adaptation collapsed (then lower "
            "learning rates or fewer epochs help)"
        )
    if auroc is not None and auroc < 0.5:
        found.append(
            f"AUROC is {100 * auroc:.1f}, below 50, which is chance: unknown images have higher "
            "scores than known ones, so a threshold calls the wrong ones unknown. Check the labels "
            "and the list of classes, and look at the images with the highest scores"
        )
    return found
