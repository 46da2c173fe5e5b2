"""What a finished run measured, and what its numbers depend on, read from its folder."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ueo_fast.finetune.files.run_folder import RunFolder

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

_SPLITS = ("test", "train", "online")
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
    folder = RunFolder(path)
    config = _read_config(folder)
    try:
        problem = json.loads((path / "problem.json").read_text(encoding="utf-8"))
        if not problem["labelled"]:
            return LeftOut(path, "its images have no labels, so it has no metrics")
        outcomes = _outcomes(path, config, problem, folder.read_json_lines("metrics.jsonl"))
    except FileNotFoundError as error:
        return LeftOut(path, f"it is not finished: there is no {Path(error.filename).name}")
    except OSError as error:
        return LeftOut(path, f"{error.filename} cannot be read ({error.strerror})")
    except (KeyError, TypeError, ValueError) as error:
        return LeftOut(path, f"its files are damaged ({type(error).__name__}: {error})")
    if not any(outcome.method == config["method"] for outcome in outcomes):
        return LeftOut(
            path,
            "it is not finished: there are no metrics from its end; go on with "
            f"ueo-fast finetune --resume --out {shlex.quote(str(path))}",
        )
    return outcomes


def _read_config(folder: RunFolder) -> dict[str, Any]:
    path = folder.path
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; give folders of runs of ueo-fast finetune")
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        inside = sorted(each.parent.name for each in path.glob("*/config.json"))
        hint = f"; but {', '.join(inside[:3])} in it may be: give {path}/*" if inside else ""
        raise ValueError(f"{path} is no run of ueo-fast finetune: no config.json{hint}") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path / 'config.json'} cannot be read: {error}") from error
    if not isinstance(config, dict) or not {"method", "model", "seed"} <= set(config):
        raise ValueError(
            f"{path} is no run of ueo-fast finetune: its config.json has no method, model and seed"
        )
    return config


def _outcomes(
    path: Path,
    config: Mapping[str, Any],
    problem: Mapping[str, Any],
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
        if split not in _SPLITS or not isinstance(record["title"], str):
            raise ValueError(f"metrics.jsonl has split {split!r} and title {record['title']!r}")
        online = split == "online"  # on the training images, while they were adapted to
        images = ("train" if separate else "test") if online else split
        title = f"{record['title']}, online" if online else record["title"]
        zero_shot = method == "zeroshot"
        outcomes.append(
            Outcome(
                run=path,
                method=method,
                title=title,
                seed=int(record["seed"]),
                split=images,
                metrics={key: _fraction(record, key) for key in _METRICS},
                question=question,
                settings={} if zero_shot else settings,
            )
        )
    return outcomes


def _fraction(record: Mapping[str, Any], key: str) -> float | None:
    value = record[key]
    if value is not None and not 0 <= float(value) <= 1:  # NaN neither
        raise ValueError(f"metrics.jsonl has {key} {value!r}, no fraction")
    return None if value is None else float(value)


def _question(config: Mapping[str, Any], problem: Mapping[str, Any]) -> dict[str, Any]:
    values = {key: config.get(key) for key in _QUESTION}
    for key in _QUESTION_PATHS:
        value = values[key]
        if isinstance(value, str):
            values[key] = os.path.normpath(value)
    if values["dataset"] is None:  # then it says nothing
        values["scenario"] = None
    for key in ("known", "unknown"):
        if not isinstance(problem[key], list) or not all(isinstance(x, str) for x in problem[key]):
            raise TypeError(f"problem.json has {key} that are no names")
    return {**values, **{key: problem[key] for key in _QUESTION_COUNTS}}
