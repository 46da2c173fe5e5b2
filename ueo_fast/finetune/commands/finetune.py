"""`ueo-fast finetune`: from images and class names to an adapted CLIP, all in one run folder."""

from __future__ import annotations

import contextlib
import dataclasses
import shlex
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ueo_fast.finetune.clip.delta import save_delta
from ueo_fast.finetune.clip.load import LoadedClip, load_clip
from ueo_fast.finetune.clip.model import ClipClassifier
from ueo_fast.finetune.commands.device import chosen_device
from ueo_fast.finetune.commands.evaluation import (
    PREDICTION_COLUMNS,
    brief,
    metrics_table,
    prediction_rows,
)
from ueo_fast.finetune.commands.finetune_config import FinetuneConfig
from ueo_fast.finetune.commands.problem import Problem, read_problem
from ueo_fast.finetune.commands.recorder import Recorder
from ueo_fast.finetune.commands.stages import Start, begin, continued, is_begun
from ueo_fast.finetune.commands.tracking import check_trackers, training_hooks
from ueo_fast.finetune.data.loader import loading_errors
from ueo_fast.finetune.engine.trainer import History, NonFiniteLossError
from ueo_fast.finetune.files.run_folder import RunFolder
from ueo_fast.finetune.report import write_report

FINISHED = "finished.json"
DELTA = "delta.safetensors"


def run(config: FinetuneConfig) -> Path:
    """Fine-tune, or go on with a run that was stopped.

    Args:
        config: every choice.

    Returns:
        The run folder.

    Raises:
        ValueError, OSError: an option, a file or an image is unusable.
        FileExistsError: ``config.out`` exists and is not empty.
        NonFiniteLossError: the loss became NaN or infinite; what was learnt before is in the
            folder.
    """
    if config.resume:
        assert config.out is not None
        with RunFolder.open(config.out).lock():
            folder = RunFolder.resume(config.out)
            config = _saved_config(folder, config)
            if (folder.path / FINISHED).exists():
                print(f"{folder.path} is finished: there is nothing to resume")
                return folder.path
            return _run(config, folder, None if is_begun(folder) else read_problem(config))
    problem = read_problem(config)
    folder = RunFolder.create(config.out, prefix="finetune")
    try:
        with folder.lock():
            return _run(config, folder, problem)
    except BaseException:
        folder.remove_if_unused()
        raise


def _run(config: FinetuneConfig, folder: RunFolder, problem: Problem | None) -> Path:
    started = time.perf_counter()
    check_trackers(config)
    with _threads(config.threads) as threads:
        clip = _load(config)
        try:
            if not (folder.path / "config.json").exists():
                folder.write_json("config.json", config.as_dict())
            if not (folder.path / "environment.json").exists():
                command = config.command()
                folder.write_environment(command=command, seeds=[config.seed], threads=threads)
            start = (
                begin(config, folder, clip, problem) if problem else continued(folder, clip, config)
            )
            history, recorder = _train(config, folder, clip, start)
            _finish(config, folder, clip, start, history, recorder)
        except KeyboardInterrupt:
            print(f"\nstopped; to go on: {_resume(folder)}")
            raise
        except OSError as error:
            unread = isinstance(error, BrokenPipeError)  # of what is printed: nobody's fault
            if unread or not (folder.path / "config.json").exists():
                raise
            raise OSError(f"{error}\nMend that, then go on: {_resume(folder)}") from error
        except ValueError as error:
            raise ValueError(
                f"{error}\n{folder.path} is kept. With the same options, once that is mended: "
                f"{_resume(folder)}; with others choose another --out"
            ) from error
        folder.write_json(
            FINISHED, {"stopped": history.stopped, "seconds": time.perf_counter() - started}
        )
    print(f"adapted: {folder.path / DELTA}")
    try:
        print(f"report:  {write_report(folder.path)}")
    except OSError as error:  # a full disk, hours after the start: say what there is all the same
        raise OSError(
            f"{error}\nThe run is finished, but for its page; to write that: ueo-fast report "
            f"{shlex.quote(str(folder.path))}"
        ) from error
    return folder.path


def _resume(folder: RunFolder) -> str:
    return f"ueo-fast finetune --resume --out {shlex.quote(str(folder.path))}"


def _load(config: FinetuneConfig) -> LoadedClip:
    return load_clip(
        config.model,
        config.weights,
        device=chosen_device(config.device),
        activation=config.activation,
    )


@loading_errors()
def _train(
    config: FinetuneConfig, folder: RunFolder, clip: LoadedClip, start: Start
) -> tuple[History, Recorder]:
    method = config.make_method()
    recorder = Recorder(config, folder, start)
    before = recorder.before()
    if before is not None:
        print(f"zero-shot: {brief(before)}")
    with training_hooks(config, folder, recorder) as hooks:
        try:
            history = method.adapt(
                start.classifier, start.target, config=config.trainer(), hooks=hooks
            )
        except NonFiniteLossError as error:
            path = _save(config, folder, clip, start.classifier)
            raise NonFiniteLossError(
                f"{error}\nWhat was learnt before that is in {path}"
            ) from error
    return history, recorder


def _save(
    config: FinetuneConfig, folder: RunFolder, clip: LoadedClip, classifier: ClipClassifier
) -> Path:
    return save_delta(
        folder.path / DELTA, classifier, clip.base, method=config.method, seed=config.seed
    )


@loading_errors()
def _finish(
    config: FinetuneConfig,
    folder: RunFolder,
    clip: LoadedClip,
    start: Start,
    history: History,
    recorder: Recorder,
) -> None:
    if history.stopped:
        print(f"stopped early: {history.stopped}")
    adapted = recorder.after(history)
    rows = prediction_rows(start.tested, start.known, start.test_cosines, adapted, config.mcm_scale)
    folder.write_csv("predictions.csv", PREDICTION_COLUMNS, rows)
    _save(config, folder, clip, start.classifier)
    records = recorder.first_and_last()
    if records:
        print(metrics_table(records))
    else:
        print("no labels, hence no metrics; the report shows what can be seen without")


def _saved_config(folder: RunFolder, given: FinetuneConfig) -> FinetuneConfig:
    """The run's own options; others that are given beside ``--resume`` must agree with them."""
    values: dict[str, Any] = folder.read_json("config.json")
    saved = FinetuneConfig(**values, out=given.out)
    default = FinetuneConfig(resume=True, out=given.out)
    for item in dataclasses.fields(FinetuneConfig):
        value, kept = getattr(given, item.name), getattr(saved, item.name)
        if item.name not in ("resume", "out") and value not in (
            kept,
            getattr(default, item.name),
        ):
            raise ValueError(
                f"{item.name}={value!r} differs from {kept!r}, which {folder.path} was started "
                "with: a resumed run keeps its options, so leave it out, or start another run"
            )
    return saved


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[int]:
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)
