"""What a report shows of a run: its files, its predictions counted and ranked, its thumbnails.

A file that is not there is ``None`` or empty: a run without labels has no metrics, one that was
stopped no predictions. A file that is there but broken is an error that names it and the line.
"""

from __future__ import annotations

import base64
import heapq
import io
import itertools
import os
from array import array
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ueo_fast.finetune.data.decode import OVERSAMPLING, UnreadableImageError, opened
from ueo_fast.finetune.data.names import printable
from ueo_fast.finetune.evaluation.results_table import KnownCounts
from ueo_fast.finetune.files import run_files
from ueo_fast.finetune.files.records import BrokenFileError, fitting
from ueo_fast.finetune.files.run_files import (
    LONGEST_SIDE,
    EpochRecord,
    Finished,
    ImageLists,
    MetricsRecord,
    Prediction,
    ProblemSummary,
    StepRecord,
    Thumbnail,
    WarningRecord,
    read_predictions,
)
from ueo_fast.finetune.files.run_folder import RunFolder

T = TypeVar("T")

KEPT = 12
"""Images that are shown at each end of the ranking by MCM score."""

LISTED = 1000
"""Images that a table lists, from the lowest score on."""

UNLABELLED, UNKNOWN, KNOWN = -1, 0, 1

_WAY_OUT = ", or remove it to have a report without it"
_LONGEST_LINK = 1000


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

    @classmethod
    def of(cls, lines: Iterable[Prediction], known: Collection[str]) -> Predictions:
        """Go through the lines once, holding a few numbers per image.

        Args:
            lines: of ``predictions.csv``.
            known: names of the known classes; any other label is an unknown class.
        """
        known = frozenset(known)
        zeroshot, adapted, group = array("d"), array("d"), array("b")
        labels, before, after = Counter[str](), Counter[str](), Counter[str]()
        changed, unknown_right, verdicts = 0, 0, Counter[bool | None]()
        highest: list[Prediction] = []
        lowest: list[Prediction] = []
        lines = iter(lines)
        while chunk := list(itertools.islice(lines, 10_000)):
            for one in chunk:
                zeroshot.append(one.zeroshot_mcm)
                adapted.append(one.adapted_mcm)
                group.append(UNLABELLED if one.label is None else int(one.label in known))
                if one.label is not None:
                    labels[one.label] += 1
                before[one.zeroshot_class] += 1
                after[one.adapted_class] += 1
                changed += one.zeroshot_class != one.adapted_class
                verdicts[one.known] += 1
                unknown_right += one.known is False and group[-1] == UNKNOWN
            # Of equal scores, these keep the first.
            highest = heapq.nlargest(KEPT, [*highest, *chunk], key=_adapted_mcm)
            lowest = heapq.nsmallest(LISTED, [*lowest, *chunk], key=_adapted_mcm)
        return cls(
            zeroshot_mcm=np.frombuffer(zeroshot, dtype=np.float64),
            adapted_mcm=np.frombuffer(adapted, dtype=np.float64),
            group=np.frombuffer(group, dtype=np.int8),
            labels=labels,
            zeroshot_counts=before,
            adapted_counts=after,
            changed=changed,
            known=verdicts[True],
            unknown=verdicts[False],
            unknown_right=unknown_right,
            most_confident=tuple(highest),
            lowest=tuple(lowest),
        )

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


_adapted_mcm = attrgetter("adapted_mcm")


@dataclass(frozen=True)
class RunData:
    """What is in a run folder; :mod:`~ueo_fast.finetune.files.run_files` has the records.

    Attributes:
        path: of the folder.
        config: flag to value.
        environment: empty where there is none.
        problem: ``None`` where the run did not come that far.
        steps: in order; a step that a resumed run took again is there once, as it was taken last.
        epochs: likewise.
        warnings: in order.
        metrics: empty without labels.
        predictions: ``None`` where the run did not come that far.
        outcome: how the run ended; without values where it did not.
        counts: known and unknown images; ``None`` where the run did not come that far.
        thumbnails: by the path that ``predictions.csv`` has.
        links: the same paths to ``file:`` URIs, of images that are in ``images.json``.
    """

    path: Path
    config: Mapping[str, Any]
    environment: Mapping[str, Any] = field(default_factory=dict)
    problem: ProblemSummary | None = None
    steps: tuple[StepRecord, ...] = ()
    epochs: tuple[EpochRecord, ...] = ()
    warnings: tuple[WarningRecord, ...] = ()
    metrics: tuple[MetricsRecord, ...] = ()
    predictions: Predictions | None = None
    outcome: Finished = field(default_factory=Finished)
    counts: KnownCounts | None = None
    thumbnails: Mapping[str, Thumbnail] = field(default_factory=dict)
    links: Mapping[str, str] = field(default_factory=dict)

    @property
    def finished(self) -> bool:
        """The run came to its end: predictions are what it writes last but for this report."""
        return self.predictions is not None


def read_run(path: Path) -> RunData:
    """Read a run folder.

    Args:
        path: the folder; it must have a ``config.json``. It may be that of a run in progress.

    Raises:
        FileNotFoundError, NotADirectoryError: ``path`` is not the folder of a run.
        ValueError: a file is broken; with its name and the line. Or the run is of another kind.
    """
    folder = RunFolder.open(path)
    try:
        return _read(folder)
    except BrokenFileError as error:
        raise ValueError(f"{error}{_WAY_OUT}") from None


def _read(folder: RunFolder) -> RunData:
    def if_there(name: str, convert: Callable[..., T]) -> T | None:
        return folder.read_json(name, convert) if exists(name) else None

    def lines(name: str, convert: Callable[..., T]) -> list[T]:
        return folder.read_json_lines(name, convert) if exists(name) else []

    def exists(name: str) -> bool:
        return os.path.lexists(folder.path / name)

    config = folder.read_config()
    environment: dict[str, Any] = if_there(run_files.ENVIRONMENT, dict) or {}
    problem = if_there(run_files.PROBLEM, ProblemSummary)
    outcome = if_there(run_files.FINISHED, Finished) or Finished()
    predictions, counts, links = None, None, {}
    if exists(run_files.PREDICTIONS):
        known = problem.known if problem else ()
        predictions = Predictions.of(read_predictions(folder.path / run_files.PREDICTIONS), known)
        if outcome.threshold is not None:
            rule, value = outcome.threshold.rule, outcome.threshold.value
            counts = KnownCounts(predictions.known, predictions.unknown, value, rule)
    lists = if_there(run_files.IMAGES, ImageLists)
    if lists is not None and predictions is not None:
        paths = (lists.test or lists.train).paths
        links = dict(_links(paths, predictions, environment.get("folder")))
    metrics = lines(run_files.MEASURED, MetricsRecord)
    classes = len(problem.known) if problem else None
    for number, line in enumerate(metrics, start=1):
        if classes not in (None, len(line.class_accuracies)):
            given = f"class_accuracies has {len(line.class_accuracies)} numbers"
            what = f"{given}, but {run_files.PROBLEM} {classes} known classes"
            raise BrokenFileError(folder.path / run_files.MEASURED, what, number)
    steps = {step.step: step for step in lines(run_files.STEPS, StepRecord)}
    epochs = {epoch.epoch: epoch for epoch in lines(run_files.EPOCHS, EpochRecord)}
    by_place = {(m.method, m.seed, m.split, m.stage, m.epoch): m for m in metrics}
    return RunData(
        path=folder.path,
        config=config,
        environment=environment,
        problem=problem,
        steps=tuple(steps[number] for number in sorted(steps)),
        epochs=tuple(epochs[number] for number in sorted(epochs)),
        warnings=tuple(lines(run_files.WARNINGS, WarningRecord)),
        metrics=tuple(by_place.values()),
        predictions=predictions,
        outcome=outcome,
        counts=counts,
        thumbnails=if_there(run_files.THUMBNAILS, partial(fitting, dict[str, Thumbnail], key=""))
        or {},
        links=links,
    )


def _links(
    paths: Sequence[str], predictions: Predictions, folder: object
) -> Iterator[tuple[str, str]]:
    """Of the images that a page names: where the run's own list says that they are.

    The page names them as the user did, perhaps relative to ``folder``, where the run was started.
    No file is looked at. A path in the list that is not absolute, or that names another machine,
    gets no link.
    """
    start = printable(folder) if isinstance(folder, str) else ""
    wanted = {
        os.path.normpath(os.path.join(start, one.path)): one.path
        for one in (*predictions.lowest, *predictions.most_confident)
    }
    for path in paths:
        name = wanted.get(printable(path))
        if name is not None and os.path.isabs(path) and not path.startswith(("//", "\\\\")):
            link = Path(path).as_uri()  # percent-encoded
            if len(link) <= _LONGEST_LINK:
                yield name, link


def write_thumbnails(folder: RunFolder, paths: Sequence[str], known: Iterable[str]) -> None:
    """Keep a thumbnail of each image that a report of the run will show.

    A run makes them at its end, when it has just read its own images. A report only reads them
    back, so that it never opens a file that a run folder names: such a folder may come from
    somebody else.

    Args:
        folder: of a run that has just written its ``predictions.csv``.
        paths: of the images in it, as the run opened them.
        known: names of the known classes.
    """
    predictions = Predictions.of(
        read_predictions(folder.path / run_files.PREDICTIONS), frozenset(known)
    )
    by_name = {printable(path): path for path in paths}
    shown = (*predictions.likely_unknown, *predictions.most_confident)
    folder.write_json(
        run_files.THUMBNAILS, {one.path: _thumbnail(by_name[one.path]) for one in shown}
    )


def _thumbnail(path: str) -> Thumbnail:
    try:
        with opened(path) as encoded:
            image = encoded.decode(max(encoded.size) / (OVERSAMPLING * LONGEST_SIDE)).image
    except UnreadableImageError as error:
        return Thumbnail("", 0, 0, error.reason)
    image.thumbnail((LONGEST_SIDE, LONGEST_SIDE), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    # Without what the file carries besides its pixels: a place, a name, a colour profile.
    image.info.clear()
    image.save(file, "JPEG", quality=80, optimize=True)
    return Thumbnail(base64.b64encode(file.getvalue()).decode(), image.width, image.height, "")
