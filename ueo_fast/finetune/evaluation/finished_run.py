"""What a finished run measured, and what its numbers depend on, read from its folder."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ueo_fast.finetune.files.records import BrokenFileError, as_record, read_lines, read_object

# Results under different values of these answer different questions.
_QUESTION = (
    *("data", "test_data", "dataset", "domain", "scenario"),
    *("model", "pretrained", "prompt_template", "mcm_scale"),
)
_QUESTION_PATHS = ("data", "test_data", "model", "pretrained")
_QUESTION_COUNTS = ("known", "unknown", "train_images", "test_images")  # of problem.json

# These change where and how fast a run goes, not what comes out but for rounding; the class list
# is compared by what is in it. All other options are settings, those of later versions included:
# what is not known is not averaged over.
_NOT_SETTINGS = {
    *("out", "resume", "config", "method", "seed", "classes", "data_root", "root", "check_counts"),
    *("workers", "device", "threads", "compile", "patch", "channels_last", "micro_batch_size"),
    *("eval_every", "eval_batch_size", "checkpoint_every", "strict", "tensorboard", "wandb"),
    *_QUESTION,
}

_METRICS = ("per_class_accuracy", "accuracy", "auroc", "aupr", "fpr95", "hm")


@dataclass(frozen=True)
class LeftOut:
    """A run that has nothing to compare.

    Attributes:
        run: the folder.
        reason: why, and what can be done about it.
    """

    run: Path
    reason: str


@dataclass(frozen=True)
class Outcome:
    """Metrics of one method at the end of one run, on one set of images.

    Attributes:
        run: the folder.
        method: name; ``"zeroshot"`` for where the run started.
        title: for people; says so where predictions were made during the adaptation.
        seed: of the run.
        split: ``"test"`` or ``"train"`` images.
        metrics: fractions or ``None``, by the names of ``Metrics``.
        question: what has to agree for numbers to be comparable.
        settings: what has to agree for two seeds of a method to be averaged.
    """

    run: Path
    method: str
    title: str
    seed: int
    split: str
    metrics: Mapping[str, float | None]
    question: Mapping[str, Any]
    settings: Mapping[str, Any]

    @property
    def is_zero_shot(self) -> bool:
        """Whether these are the numbers from before the adaptation."""
        return self.method == "zeroshot"


def read_outcomes(path: Path) -> list[Outcome] | LeftOut:
    """Of the zero-shot model and of the run's method, on test images and, where these are others,
    training images; or why there are none: no labels, not finished, damaged files.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: the folder is not that of a run of ``ueo-fast finetune``.
    """
    config = _read_config(path)
    try:
        problem = read_object(path / "problem.json", as_record(_Problem))
        if not problem.labelled:
            return LeftOut(path, "its images have no labels, so it has no metrics")
        records = read_lines(path / "metrics.jsonl", checked_metrics)
        outcomes = _outcomes(path, config, problem, records)
    except FileNotFoundError as error:
        return LeftOut(path, f"it is not finished: there is no {Path(error.filename).name}")
    except OSError as error:
        return LeftOut(path, f"{error.filename} cannot be read ({error.strerror})")
    except BrokenFileError as error:
        return LeftOut(path, str(error))
    if not any(outcome.method == config["method"] for outcome in outcomes):
        return LeftOut(
            path,
            "it is not finished: there are no metrics from its end; go on with "
            f"ueo-fast finetune --resume --out {shlex.quote(str(path))}",
        )
    return outcomes


def _read_config(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; give folders of runs of ueo-fast finetune")
    try:
        config = read_object(path / "config.json", dict)
    except (FileNotFoundError, NotADirectoryError):
        inside = sorted(each.parent.name for each in path.glob("*/config.json"))
        hint = f"; but {', '.join(inside[:3])} in it may be: give {path}/*" if inside else ""
        raise ValueError(
            f"{path} is not a run of ueo-fast finetune: it has no config.json{hint}"
        ) from None
    if not {"method", "model", "seed"} <= set(config):
        raise ValueError(
            f"{path} is not a run of ueo-fast finetune: its config.json has no method, model "
            "and seed"
        )
    read_object(path / "config.json", as_record(_Config))  # they are of the right types
    return config


@dataclass(frozen=True)
class _Problem:
    """What is needed of ``problem.json``."""

    known: list[str]
    unknown: list[str]
    train_images: int
    test_images: int
    labelled: bool


@dataclass(frozen=True)
class _Config:
    """What is needed of ``config.json``; other options are compared as they are."""

    method: str
    model: str
    seed: int


@dataclass(frozen=True)
class _MetricsLine:
    """What is needed of a line of ``metrics.jsonl``."""

    method: str
    title: str
    seed: int
    epoch: int
    stage: Literal["before", "during", "after"]
    split: Literal["test", "train", "online"]
    per_class_accuracy: float | None
    accuracy: float | None
    auroc: float | None
    aupr: float | None
    fpr95: float | None
    hm: float | None


def checked_metrics(record: dict[str, Any]) -> dict[str, Any]:
    """A line of ``metrics.jsonl`` with all that is read from one.

    Raises:
        KeyError, TypeError, ValueError: a value is missing, of the wrong type, or not a fraction.
    """
    as_record(_MetricsLine)(record)
    for key in _METRICS:
        if record[key] is not None and not 0 <= record[key] <= 1:
            raise ValueError(f"{key} is {record[key]!r}, expected a fraction in 0..1")
    return record


def _outcomes(
    path: Path,
    config: Mapping[str, Any],
    problem: _Problem,
    records: Iterable[Mapping[str, Any]],
) -> list[Outcome]:
    question = _question(config, problem)
    settings = {key: value for key, value in config.items() if key not in _NOT_SETTINGS}
    # A line that was written again by a resumed run replaces the first one.
    final = {
        (record["method"], record["split"]): record
        for record in records
        if record["stage"] == ("before" if record["method"] == "zeroshot" else "after")
    }
    separate = any(split == "train" for _, split in final)
    outcomes = []
    for (method, split), record in final.items():
        online = split == "online"  # on the training images, while they were adapted to
        images = ("train" if separate else "test") if online else split
        title = f"{record['title']}, online" if online else record["title"]
        zero_shot = method == "zeroshot"
        outcomes.append(
            Outcome(
                run=path,
                method=method,
                title=title,
                seed=record["seed"],
                split=images,
                metrics={key: record[key] for key in _METRICS},
                question=question,
                settings={} if zero_shot else settings,
            )
        )
    return outcomes


def _question(config: Mapping[str, Any], problem: _Problem) -> dict[str, Any]:
    values = {key: config.get(key) for key in _QUESTION}
    for key in _QUESTION_PATHS:
        value = values[key]
        if isinstance(value, str):
            values[key] = os.path.normpath(value)
    if values["dataset"] is None:  # then it says nothing
        values["scenario"] = None
    return {**values, **{key: getattr(problem, key) for key in _QUESTION_COUNTS}}
