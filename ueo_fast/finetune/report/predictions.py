"""``predictions.csv`` of a run, read line by line: what a report needs of any number of images."""

from __future__ import annotations

import csv
import heapq
import math
from array import array
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ueo_fast.finetune.files.records import bounded_lines, open_regular

COLUMNS = (
    "image",
    "path",
    "label",
    "zeroshot_class",
    "zeroshot_mcm",
    "adapted_class",
    "adapted_mcm",
    "known",
)

KEPT = 12
"""Images that are shown at each end of the ranking by MCM score."""

LISTED = 1000
"""Images that a table lists, from the lowest score on."""

UNLABELLED, UNKNOWN, KNOWN = -1, 0, 1


@dataclass(frozen=True, slots=True)
class Prediction:
    """One test image.

    Attributes:
        image: its name, as the user sees it.
        path: where it was read from.
        label: name of its class; ``None`` where it has none.
        zeroshot_class: the class that the zero-shot model puts it into.
        zeroshot_mcm: that model's MCM score.
        adapted_class: the same of the adapted model.
        adapted_mcm: the same of the adapted model.
        known: whether that score reaches the run's threshold; ``None`` where it has none.
    """

    image: str
    path: str
    label: str | None
    zeroshot_class: str
    zeroshot_mcm: float
    adapted_class: str
    adapted_mcm: float
    known: bool | None


@dataclass(frozen=True)
class Predictions:
    """All N test images, in columns.

    Attributes:
        zeroshot_mcm: (N,) float64.
        adapted_mcm: (N,) float64.
        group: (N,) int8: :data:`KNOWN`, :data:`UNKNOWN` or :data:`UNLABELLED`.
        labels: images per label.
        zeroshot_counts: images per class that the zero-shot model predicts.
        adapted_counts: images per class that the adapted model predicts.
        changed: images that the two put into different classes.
        known: images that count as known.
        unknown: images that count as unknown.
        unknown_right: those of them whose label is an unknown class.
        most_confident: the :data:`KEPT` images with the highest adapted MCM score, highest first.
        lowest: the :data:`LISTED` images with the lowest, lowest first.
    """

    zeroshot_mcm: NDArray[np.float64]
    adapted_mcm: NDArray[np.float64]
    group: NDArray[np.int8]
    labels: Counter[str]
    zeroshot_counts: Counter[str]
    adapted_counts: Counter[str]
    changed: int
    known: int
    unknown: int
    unknown_right: int
    most_confident: tuple[Prediction, ...]
    lowest: tuple[Prediction, ...]

    @property
    def likely_unknown(self) -> tuple[Prediction, ...]:
        """The images to look at first: the lowest scores that do not count as known."""
        return tuple(one for one in self.lowest[:KEPT] if not one.known)

    @property
    def likely_known(self) -> tuple[Prediction, ...]:
        """The highest scores that do not count as unknown."""
        return tuple(one for one in self.most_confident if one.known is not False)

    def __len__(self) -> int:
        return len(self.group)

    @property
    def labelled(self) -> bool:
        """There are known images and unknown ones among those that have a label."""
        return bool((self.group == KNOWN).any() and (self.group == UNKNOWN).any())


def read_predictions(path: Path, known: Collection[str]) -> Predictions:
    """Read the file once, holding a few numbers per image.

    Args:
        path: of the CSV; its first line names at least :data:`COLUMNS`.
        known: names of the known classes; any other label is an unknown class.

    Raises:
        ValueError: a column is missing, a line is short, a score is not a finite number, or
            ``known`` is not true, false or empty; with the file and the line.
        OSError: the file cannot be read.
    """
    known = frozenset(known)
    zeroshot, adapted, group = array("d"), array("d"), array("b")
    labels: Counter[str] = Counter()
    zeroshot_counts: Counter[str] = Counter()
    adapted_counts: Counter[str] = Counter()
    changed, unknown_right, verdicts = 0, 0, Counter[bool | None]()
    highest = _Extremes(KEPT, lambda score: score)
    lowest = _Extremes(LISTED, lambda score: -score)
    # A file name need not be UTF-8; what is not is kept as it was, so that the file is found.
    with open_regular(path) as file:
        text = (
            line.decode("utf-8-sig" if number == 0 else "utf-8", "surrogateescape")
            for number, line in enumerate(bounded_lines(path, file))
        )
        lines = csv.reader(text)
        try:
            places = _places(next(lines, []))
            for cells in lines:
                if not cells:
                    continue
                one = _prediction(cells, places)
                zeroshot.append(one.zeroshot_mcm)
                adapted.append(one.adapted_mcm)
                group.append(UNLABELLED if one.label is None else int(one.label in known))
                if one.label is not None:
                    labels[one.label] += 1
                zeroshot_counts[one.zeroshot_class] += 1
                adapted_counts[one.adapted_class] += 1
                changed += one.zeroshot_class != one.adapted_class
                verdicts[one.known] += 1
                unknown_right += one.known is False and group[-1] == UNKNOWN
                highest.offer(one)
                lowest.offer(one)
        except (csv.Error, _BadLineError) as error:
            raise ValueError(
                f"{path}, line {lines.line_num}: {error}; the file was changed or damaged: "
                "restore it, or remove it to have a report without it"
            ) from None
    return Predictions(
        zeroshot_mcm=np.frombuffer(zeroshot, dtype=np.float64),
        adapted_mcm=np.frombuffer(adapted, dtype=np.float64),
        group=np.frombuffer(group, dtype=np.int8),
        labels=labels,
        zeroshot_counts=zeroshot_counts,
        adapted_counts=adapted_counts,
        changed=changed,
        known=verdicts[True],
        unknown=verdicts[False],
        unknown_right=unknown_right,
        most_confident=highest.ranked(),
        lowest=lowest.ranked(),
    )


class _BadLineError(ValueError):
    pass


class _Extremes:
    """The ``count`` predictions whose key is highest; among equals, those that came first."""

    def __init__(self, count: int, key: Callable[[float], float]) -> None:
        self._count = count
        self._key = key
        self._heap: list[tuple[float, int, Prediction]] = []
        self._seen = 0

    def offer(self, one: Prediction) -> None:
        self._seen += 1
        entry = (self._key(one.adapted_mcm), -self._seen, one)
        if len(self._heap) < self._count:
            heapq.heappush(self._heap, entry)
        elif entry > self._heap[0]:
            heapq.heapreplace(self._heap, entry)

    def ranked(self) -> tuple[Prediction, ...]:
        return tuple(one for _, _, one in sorted(self._heap, reverse=True))


def _places(head: list[str]) -> list[int]:
    missing = [column for column in COLUMNS if column not in head]
    if missing:
        raise _BadLineError(f"no column {', '.join(missing)} among {', '.join(head) or 'none'}")
    return [head.index(column) for column in COLUMNS]


def _prediction(cells: list[str], places: list[int]) -> Prediction:
    if len(cells) <= max(places):
        raise _BadLineError(f"{len(cells)} cells, expected {max(places) + 1}")
    image, path, label, zeroshot_class, zeroshot_mcm, adapted_class, adapted_mcm, known = (
        cells[place] for place in places
    )
    if known not in _VERDICTS:
        raise _BadLineError(f"known is {known!r}, expected true, false or nothing")
    return Prediction(
        image=image,
        path=path,
        label=label or None,
        zeroshot_class=zeroshot_class,
        zeroshot_mcm=_score("zeroshot_mcm", zeroshot_mcm),
        adapted_class=adapted_class,
        adapted_mcm=_score("adapted_mcm", adapted_mcm),
        known=_VERDICTS[known],
    )


_VERDICTS = {"true": True, "false": False, "": None}


def _score(column: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise _BadLineError(f"{column} is {text!r}, not a number") from None
    if not math.isfinite(value):
        raise _BadLineError(f"{column} is {text!r}, not a finite number")
    return value
