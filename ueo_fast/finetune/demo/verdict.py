"""What the table shows, in words that claim no more than it does."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

# In per-class accuracy half a point is fewer than three of the target's known images (six digits of
# some 90 images each): less than what another order of the batches moves.
_EQUAL = 0.005

# A spread can be computed from two seeds, but it says next to nothing.
_FEWEST_SEEDS = 3

RULE = (
    "Better or worse needs at least 3 seeds, a mean difference of half a point, and all seeds "
    "agreeing or a mean beyond two standard errors."
)
"""The rule of :attr:`Comparison.outcome`, for the reader of a report."""

Outcome = Literal["better", "mostly better", "unclear", "mostly worse", "worse", "too few"]


@dataclass(frozen=True)
class Comparison:
    """Differences of one metric between two methods, seed by seed.

    Attributes:
        differences: first minus second, as fractions; one per seed that has both.
    """

    differences: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.differences)

    @property
    def wins(self) -> int:
        """Seeds on which the first method is better."""
        return sum(difference > 0 for difference in self.differences)

    @property
    def outcome(self) -> Outcome:
        """How much the differences say.

        ``better``: mean of half a point or more, and higher on every seed. ``mostly better``: such
        a mean, not on every seed, but more than two standard errors from 0. ``worse`` and ``mostly
        worse`` accordingly. ``too few``: fewer than three seeds, whatever the differences.
        ``unclear``: everything else.
        """
        count = len(self.differences)
        if count < _FEWEST_SEEDS:
            return "too few"
        if abs(self.mean) < _EQUAL:
            return "unclear"
        losses = sum(difference < 0 for difference in self.differences)
        if self.wins == count:
            return "better"
        if losses == count:
            return "worse"
        standard_error = statistics.stdev(self.differences) / math.sqrt(count)
        if abs(self.mean) > 2 * standard_error:
            return "mostly better" if self.mean > 0 else "mostly worse"
        return "unclear"

    def figures(self) -> str:
        """``"+24.1 ± 8.0 points, higher on 5 of 5 seeds"``."""
        count = len(self.differences)
        spread = f" ± {100 * statistics.stdev(self.differences):.1f}" if count > 1 else ""
        return f"{100 * self.mean:+.1f}{spread} points, higher on {self.wins} of {count} seeds"


def compare(
    records: Sequence[Mapping[str, Any]], first: str, second: str, metric: str
) -> Comparison | None:
    """Pair two methods by seed; ``None`` where they share no seed with a defined metric."""
    values = {
        method: {
            record["seed"]: record[metric]
            for record in records
            if record["method"] == method and record[metric] is not None
        }
        for method in (first, second)
    }
    seeds = [seed for seed in values[first] if seed in values[second]]
    if not seeds:
        return None
    return Comparison(tuple(values[first][seed] - values[second][seed] for seed in seeds))


def verdict(records: Sequence[Mapping[str, Any]]) -> str:
    """A paragraph about the records of one run.

    Differences are paired by seed; :data:`RULE` says what "better" needs. Comparisons over too few
    seeds are not judged: one sentence has what was measured.

    Args:
        records: lines of ``metrics.jsonl``: seed, method, metrics as fractions.
    """
    has_unknown = any(record["hm"] is not None for record in records)
    metric, name = ("hm", "HM") if has_unknown else ("per_class_accuracy", "per-class accuracy")
    sentences = []
    too_few = []
    for first, second, words in _SENTENCES:
        comparison = compare(records, first, second, metric)
        if comparison is None:
            continue
        measured = f"{first} minus {second}: {name} {comparison.figures()}"
        if comparison.outcome == "too few":
            too_few.append(measured)
        else:
            sentences.append(words[comparison.outcome].format(figures=f"({measured})"))
    if too_few:
        sentences.append(
            f"There are too few seeds to tell the methods apart ({'; '.join(too_few)})."
        )
    return " ".join([*sentences, _SCOPE])


_SCOPE = (
    "This is a tiny model on 8 x 8 digits: it shows that the method runs and what it does here, "
    "and says nothing about CLIP on photographs."
)

_MERE = "mere re-estimation of BatchNorm's statistics without a gradient step"
_EQUAL_WEIGHTS = "its special case with equal weights"
_NO_EVIDENCE = (
    "re-normalisation alone repairs this shift better, so this table is no evidence for the "
    "entropy loss in particular"
)
_CONFIDENCE = "what the confidence weights add cannot be told from this table"

# One row per comparison: first method, second method, what to say for each outcome.
_SENTENCES: tuple[tuple[str, str, dict[Outcome, str]], ...] = (
    (
        "UEO",
        "zero-shot",
        {
            "better": "UEO improves on zero-shot on every seed {figures}.",
            "mostly better": "UEO improves on zero-shot on average, not on every seed {figures}.",
            "unclear": "There is no clear difference between UEO and zero-shot {figures}.",
            "mostly worse": "UEO hurts on average: it is worse than zero-shot {figures}.",
            "worse": "UEO hurts: it is worse than zero-shot on every seed {figures}.",
        },
    ),
    (
        "UEO",
        "AdaBN",
        {
            "better": f"UEO beats AdaBN, {_MERE}, on every seed {{figures}}.",
            "mostly better": f"UEO beats AdaBN, {_MERE}, on average {{figures}}.",
            "unclear": f"There is no clear difference from AdaBN, {_MERE} {{figures}}.",
            "mostly worse": f"AdaBN, {_MERE}, beats UEO on average {{figures}}: {_NO_EVIDENCE}.",
            "worse": f"AdaBN, {_MERE}, beats UEO on every seed {{figures}}: {_NO_EVIDENCE}.",
        },
    ),
    (
        "UEO",
        "InfoMax",
        {
            "better": f"UEO beats InfoMax, {_EQUAL_WEIGHTS}, on every seed {{figures}}.",
            "mostly better": f"UEO beats InfoMax, {_EQUAL_WEIGHTS}, on average {{figures}}.",
            "unclear": (
                f"There is no clear difference from InfoMax, {_EQUAL_WEIGHTS} {{figures}}: "
                f"{_CONFIDENCE}."
            ),
            "mostly worse": f"InfoMax, {_EQUAL_WEIGHTS}, beats UEO on average {{figures}}.",
            "worse": f"InfoMax, {_EQUAL_WEIGHTS}, beats UEO on every seed {{figures}}.",
        },
    ),
    (
        "EntMin",
        "zero-shot",
        {
            "better": "EntMin improves on zero-shot on every seed {figures}.",
            "mostly better": "EntMin improves on zero-shot on average {figures}.",
            "unclear": "EntMin shows no clear difference from zero-shot {figures}.",
            "mostly worse": "EntMin is worse than zero-shot on average {figures}.",
            "worse": "EntMin is worse than zero-shot on every seed {figures}.",
        },
    ),
)
