"""The files of a run folder, read for a report.

A file that is not there is ``None`` or empty: a run without labels has no metrics, one that was
stopped no predictions. A file that is there but broken is an error that names it and the line.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from ueo_fast.finetune.data.names import printable
from ueo_fast.finetune.engine.hooks import EpochRecord, StepRecord
from ueo_fast.finetune.evaluation.results_table import KnownCounts
from ueo_fast.finetune.files.records import BrokenFileError, read_lines, read_object
from ueo_fast.finetune.report.predictions import Predictions, read_predictions
from ueo_fast.finetune.report.thumbnails import THUMBNAILS, Thumbnail, read_thumbnail

T = TypeVar("T")

METRIC_NAMES = ("per_class_accuracy", "accuracy", "auroc", "aupr", "fpr95", "hm")


@dataclass(frozen=True)
class Skipped:
    """An image that could not be read, and why."""

    image: str
    reason: str


@dataclass(frozen=True)
class ProblemData:
    """``problem.json``: classes and images.

    Attributes:
        known: names of the C known classes, in the order of the prompts.
        unknown: names of the labelled classes that are not known.
        train_images: unlabelled images that were trained on.
        test_images: images that were tested on.
        labelled: whether the test images have labels.
        skipped: images that could not be read.
        left_out: kinds of other files that were left out, and how many of each.
    """

    known: tuple[str, ...]
    unknown: tuple[str, ...]
    train_images: int
    test_images: int
    labelled: bool
    skipped: tuple[Skipped, ...]
    left_out: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True)
class RunWarning:
    """Something that looked wrong during a run; ``step`` is ``None`` where it had no step."""

    step: int | None
    text: str


@dataclass(frozen=True)
class MetricsLine:
    """One line of ``metrics.jsonl``.

    Attributes:
        method: name of the method; ``zeroshot`` before adaptation.
        title: how it is written in tables.
        seed: of the run.
        epoch: 0 before training.
        stage: ``before``, ``during`` or ``after``.
        split: ``test``, ``train`` or ``online``.
        values: each of :data:`METRIC_NAMES` as a fraction in 0..1; ``None`` where not defined.
        class_accuracies: of each known class, in the order of ``problem.json``; ``None`` for a
            class without images.
        known_images: images of known classes that the numbers are about.
        unknown_images: the same of unknown classes.
    """

    method: str
    title: str
    seed: int
    epoch: int
    stage: str
    split: str
    values: Mapping[str, float | None]
    class_accuracies: tuple[float | None, ...]
    known_images: int
    unknown_images: int


@dataclass(frozen=True)
class RunData:
    """What is in a run folder.

    Attributes:
        path: of the folder.
        config: ``config.json``, flag to value.
        environment: ``environment.json``; empty where there is none.
        problem: ``problem.json``; ``None`` where the run did not come that far.
        steps: ``train.jsonl``, one record per step, in order; a step that a resumed run took again
            is there once, as it was taken last.
        epochs: ``epochs.jsonl``, likewise.
        warnings: ``warnings.jsonl``.
        metrics: ``metrics.jsonl``; empty without labels.
        predictions: ``predictions.csv``; ``None`` where the run did not come that far.
        stopped: why training ended early; empty where it did not.
        seconds: that the run took, or its last part if it was resumed; ``None`` if unknown.
        counts: known and unknown images; ``None`` where the run did not come that far.
        thumbnails: ``thumbnails.json``, by the path that ``predictions.csv`` has.
        links: the same paths to ``file:`` URIs, of images that are in ``images.json``.
    """

    path: Path
    config: Mapping[str, Any]
    environment: Mapping[str, Any] = field(default_factory=dict)
    problem: ProblemData | None = None
    steps: tuple[StepRecord, ...] = ()
    epochs: tuple[EpochRecord, ...] = ()
    warnings: tuple[RunWarning, ...] = ()
    metrics: tuple[MetricsLine, ...] = ()
    predictions: Predictions | None = None
    stopped: str = ""
    seconds: float | None = None
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
        FileNotFoundError: there is no such folder, or it is not that of a run.
        NotADirectoryError: ``path`` is a file.
        ValueError: a file is broken; with its name and the line. Or the run is of another kind.
    """
    if path.is_file():
        raise NotADirectoryError(f"{path} is a file; give the run folder that holds it")
    if not os.path.lexists(path / "config.json"):
        what = (
            "has no config.json, so it is not a run folder" if path.is_dir() else "does not exist"
        )
        raise FileNotFoundError(
            f"{path} {what}; give a folder that ueo-fast finetune wrote (its --out)"
        )
    config = _read(path / "config.json", dict)
    if "method" not in config:
        raise ValueError(
            f"{path / 'config.json'} names no method, so this is not a run of ueo-fast finetune "
            "(the results of ueo-fast demo are in its results.md)"
        )
    problem = _read_if_there(path / "problem.json", _problem)
    environment = _read_if_there(path / "environment.json", dict) or {}
    stopped, seconds, threshold = _read_if_there(path / "finished.json", _finished) or _NOT_FINISHED
    predictions_file = path / "predictions.csv"
    predictions = (
        read_predictions(predictions_file, problem.known if problem else ())
        if os.path.lexists(predictions_file)
        else None
    )
    steps = _read_lines(path / "train.jsonl", _record(StepRecord))
    epochs = _read_lines(path / "epochs.jsonl", _record(EpochRecord))
    metrics = _read_lines(path / "metrics.jsonl", lambda value: _metrics_line(value, problem))
    by_place = {(m.method, m.seed, m.split, m.stage, m.epoch): m for m in metrics}
    return RunData(
        path=path,
        config=config,
        environment=environment,
        problem=problem,
        steps=tuple(value for _, value in sorted({s.step: s for s in steps}.items())),
        epochs=tuple(value for _, value in sorted({e.epoch: e for e in epochs}.items())),
        warnings=tuple(_read_lines(path / "warnings.jsonl", _warning)),
        metrics=tuple(by_place.values()),
        predictions=predictions,
        stopped=stopped,
        seconds=seconds,
        counts=(
            None
            if predictions is None or threshold is None
            else KnownCounts(predictions.known, predictions.unknown, *threshold)
        ),
        thumbnails=_read_if_there(path / THUMBNAILS, _thumbnails) or {},
        links=_read_if_there(
            path / "images.json",
            lambda lists: _links(lists, predictions, environment.get("folder")),
        )
        or {},
    )


def _read_if_there(path: Path, convert: Callable[[dict[str, Any]], T]) -> T | None:
    return _read(path, convert) if os.path.lexists(path) else None


def _read(path: Path, convert: Callable[[dict[str, Any]], T]) -> T:
    """A file that holds one JSON object."""
    try:
        return read_object(path, convert)
    except BrokenFileError as error:
        raise ValueError(f"{error}{_WAY_OUT}") from None


def _read_lines(path: Path, convert: Callable[[dict[str, Any]], T]) -> list[T]:
    """A file that holds one JSON object per line; empty where there is none."""
    if not os.path.lexists(path):
        return []
    try:
        return read_lines(path, convert)
    except BrokenFileError as error:
        raise ValueError(f"{error}{_WAY_OUT}") from None


_WAY_OUT = ", or remove it to have a report without it"


def _problem(value: dict[str, Any]) -> ProblemData:
    return ProblemData(
        known=tuple(_typed(name, str, "known") for name in _typed(value["known"], list, "known")),
        unknown=tuple(_typed(n, str, "unknown") for n in _typed(value["unknown"], list, "unknown")),
        train_images=_typed(value["train_images"], int, "train_images"),
        test_images=_typed(value["test_images"], int, "test_images"),
        labelled=_typed(value["labelled"], bool, "labelled"),
        skipped=tuple(
            Skipped(str(one["image"]), str(one["reason"])) for one in value.get("skipped", ())
        ),
        left_out=tuple(
            (str(kind), _typed(count, int, "left_out"))
            for kinds in _typed(value.get("left_out", {}), dict, "left_out").values()
            for kind, count in _typed(kinds, dict, "left_out").items()
        ),
    )


Finished = tuple[str, float | None, tuple[float | None, str] | None]
_NOT_FINISHED: Finished = ("", None, None)


def _finished(value: dict[str, Any]) -> Finished:
    seconds, threshold = value.get("seconds"), value.get("threshold")
    return (
        str(value.get("stopped") or ""),
        None if seconds is None else float(_typed(seconds, (int, float), "seconds")),
        None
        if threshold is None
        else (
            _fraction(_typed(threshold, dict, "threshold")["value"], "threshold"),
            _typed(threshold["rule"], str, "rule"),
        ),
    )


def _thumbnails(value: dict[str, Any]) -> dict[str, Thumbnail]:
    return {path: read_thumbnail(_typed(one, dict, path)) for path, one in value.items()}


_LONGEST_LINK = 1000


def _links(
    lists: dict[str, Any], predictions: Predictions | None, folder: object
) -> dict[str, str]:
    """Of the images that a page names: where the run's own list says that they are.

    The page names them as the user did, perhaps relative to ``folder``, where the run was started.
    No file is looked at. A path in the list that is not absolute, or that names another machine,
    gets no link.
    """
    start = printable(folder) if isinstance(folder, str) else ""
    if predictions is None:
        return {}
    wanted = {
        os.path.normpath(os.path.join(start, one.path)): one.path
        for one in (*predictions.lowest, *predictions.most_confident)
    }
    part = lists["train"] if lists.get("test") is None else lists["test"]
    links = {}
    for path in _typed(_typed(part, dict, "images")["paths"], list, "paths"):
        name = wanted.get(printable(_typed(path, str, "paths")))
        if name is not None and os.path.isabs(path) and not path.startswith(("//", "\\\\")):
            link = Path(path).as_uri()  # percent-encoded
            if len(link) <= _LONGEST_LINK:
                links[name] = link
    return links


def _warning(value: dict[str, Any]) -> RunWarning:
    return RunWarning(value.get("step"), _typed(value["text"], str, "text"))


def _metrics_line(value: dict[str, Any], problem: ProblemData | None) -> MetricsLine:
    accuracies = tuple(
        _fraction(one, "class_accuracies")
        for one in _typed(value["class_accuracies"], list, "class_accuracies")
    )
    if problem is not None and len(accuracies) != len(problem.known):
        raise ValueError(
            f"class_accuracies has {len(accuracies)} numbers, but problem.json "
            f"{len(problem.known)} known classes"
        )
    return MetricsLine(
        method=_typed(value["method"], str, "method"),
        title=_typed(value["title"], str, "title"),
        seed=_typed(value["seed"], int, "seed"),
        epoch=_typed(value["epoch"], int, "epoch"),
        stage=_choice(value["stage"], ("before", "during", "after"), "stage"),
        split=_choice(value["split"], ("test", "train", "online"), "split"),
        values={name: _fraction(value[name], name) for name in METRIC_NAMES},
        class_accuracies=accuracies,
        known_images=_typed(value["known_images"], int, "known_images"),
        unknown_images=_typed(value["unknown_images"], int, "unknown_images"),
    )


def _record(kind: Callable[..., T]) -> Callable[[dict[str, Any]], T]:
    """Of a dataclass; what the file has besides its fields is left out."""
    kinds = {one.name: one.type for one in fields(kind)}  # type: ignore[arg-type]
    wanted: dict[str, Any] = {"int": int, "float": (int, float), "dict": dict, "tuple": list}

    def convert(value: dict[str, Any]) -> T:
        for name, annotation in kinds.items():
            _typed(value[name], wanted[str(annotation).partition("[")[0]], name)
        for rate in value.get("learning_rates", {}).values():
            _typed(rate, (int, float), "learning_rates")
        return kind(**{name: value[name] for name in kinds})

    return convert


def _typed(value: Any, kind: type | tuple[type, ...], name: str) -> Any:
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise TypeError(f"{name} is {value!r:.100}, of the wrong type")
    return value


def _choice(value: Any, allowed: tuple[str, ...], name: str) -> str:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}, expected one of {', '.join(allowed)}")
    return str(value)


def _fraction(value: Any, name: str) -> float | None:
    if value is None:
        return None
    _typed(value, (int, float), name)
    if not 0 <= value <= 1:
        raise ValueError(f"{name} is {value!r}, expected a fraction in 0..1")
    return float(value)
