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

from ueo_fast.finetune.clip.base_model import BaseModel, named_as_flags, option
from ueo_fast.finetune.clip.delta import save_delta
from ueo_fast.finetune.clip.load import LoadedClip, load_base, load_clip
from ueo_fast.finetune.clip.model import ClipClassifier
from ueo_fast.finetune.clip.trust import recall
from ueo_fast.finetune.clip.weights import identify
from ueo_fast.finetune.commands.device import chosen_device
from ueo_fast.finetune.commands.evaluation import (
    PREDICTION_COLUMNS,
    brief,
    known_counts,
    metrics_table,
    prediction_rows,
    verdict_line,
    warning_lines,
)
from ueo_fast.finetune.commands.finetune_config import FinetuneConfig
from ueo_fast.finetune.commands.problem import Problem, read_problem
from ueo_fast.finetune.commands.recorder import Recorder
from ueo_fast.finetune.commands.stages import Start, begin, continued, is_begun
from ueo_fast.finetune.commands.tracking import check_trackers, training_hooks
from ueo_fast.finetune.data.loader import loading_errors
from ueo_fast.finetune.engine.trainer import History, NonFiniteLossError
from ueo_fast.finetune.evaluation.results_table import KnownCounts
from ueo_fast.finetune.files.run_folder import RunFolder
from ueo_fast.finetune.report import write_report, write_thumbnails

FINISHED = "finished.json"
DELTA = "delta.safetensors"
BASE = "base_model.json"


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
            given, config = config, _saved_config(folder, config)
            if (folder.path / FINISHED).exists():
                print(f"{folder.path} is finished: there is nothing to resume")
                return folder.path
            problem = None if is_begun(folder) else read_problem(config)
            return _run(config, folder, problem, given)
    config.make_method().check(config.trainer())  # before anything is read or written
    problem = read_problem(config)
    folder = RunFolder.create(config.out, prefix="finetune")
    try:
        with folder.lock():
            return _run(config, folder, problem, config)
    except BaseException:
        folder.remove_if_unused()
        raise


def _run(
    config: FinetuneConfig, folder: RunFolder, problem: Problem | None, given: FinetuneConfig
) -> Path:
    started = time.perf_counter()
    check_trackers(config)
    with _threads(config.threads) as threads:
        clip = _load(config, folder, given)
        try:
            if not (folder.path / "config.json").exists():
                folder.write_json("config.json", config.as_dict())
            if not (folder.path / BASE).exists():
                folder.write_json(BASE, dataclasses.asdict(clip.base))
            if not (folder.path / "environment.json").exists():
                command = config.command()
                folder.write_environment(command=command, seeds=[config.seed], threads=threads)
            start = (
                begin(config, folder, clip, problem) if problem else continued(folder, clip, config)
            )
            history, recorder = _train(config, folder, clip, start)
            counts = _finish(config, folder, clip, start, history, recorder)
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
            FINISHED,
            {
                "stopped": history.stopped,
                "seconds": time.perf_counter() - started,
                "threshold": {"rule": counts.rule, "value": counts.threshold},
            },
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


def _load(config: FinetuneConfig, folder: RunFolder, given: FinetuneConfig) -> LoadedClip:
    """The model that the user named, with the weights that the run began with if it has begun.

    A resumed run's folder may come from somebody else. Where the options beside ``--resume`` do not
    name the model, it is the run that does, and this machine must know it.
    """
    device = chosen_device(config.device)
    if not given.resume:
        with named_as_flags():
            return load_clip(
                config.model, config.weights, device=device, activation=config.activation
            )
    recorded = _recorded_base(folder)
    named = (given.model, given.weights) == (config.model, config.weights)
    named = named or given.model != FinetuneConfig(resume=True, out=given.out).model
    with named_as_flags():
        recorded = recorded or recall(identify(config.model), config.weights)
        if recorded is None and not named:
            raise ValueError(
                f"{folder.path} was stopped before its model, {config.model}, was loaded; because "
                "such a folder may come from others, that model is not opened. If you trust it, "
                f"name it: {option('model', config.model)}"
            )
        if recorded is None:
            return load_clip(given.model, given.weights, device=device)
        try:
            if named:
                return load_base(
                    recorded, model=given.model, pretrained=given.weights, device=device
                )
            return load_base(recorded, device=device)
        except ValueError as error:
            raise ValueError(f"{folder.path} cannot go on: {error}") from error


def _recorded_base(folder: RunFolder) -> BaseModel | None:
    """The model that the run began with; None before that is known."""
    if not (folder.path / BASE).exists():
        return None
    values = folder.read_json(BASE)
    names = {item.name for item in dataclasses.fields(BaseModel)}
    if not isinstance(values, dict) or values.keys() != names:
        raise ValueError(f"{folder.path / BASE} must have {', '.join(sorted(names))}")
    for name, value in values.items():
        kinds: Any = {"pretrained": (str, type(None)), "embed_dim": int}.get(name, str)
        if not isinstance(value, kinds):
            raise ValueError(f"{folder.path / BASE}: {name} is {value!r}")
    return BaseModel(**values)


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
        folder.path / DELTA,
        classifier,
        clip.base,
        method=config.method,
        seed=config.seed,
        extra={"mcm_scale": config.mcm_scale},
    )


@loading_errors()
def _finish(
    config: FinetuneConfig,
    folder: RunFolder,
    clip: LoadedClip,
    start: Start,
    history: History,
    recorder: Recorder,
) -> KnownCounts:
    if history.stopped:
        print(f"stopped early: {history.stopped}")
    before, scale = start.test_cosines, config.mcm_scale
    adapted = recorder.after(history)
    counts = known_counts(adapted, scale)
    rows = prediction_rows(start.tested, start.known, before, adapted, scale, counts.threshold)
    folder.write_csv("predictions.csv", PREDICTION_COLUMNS, rows)
    write_thumbnails(folder, start.tested.images.paths, start.known)
    _save(config, folder, clip, start.classifier)
    records = recorder.first_and_last()
    final = records[:2][-1] if records else None
    print(warning_lines(start.known, adapted, final), end="")
    print(verdict_line(config.method, records, before, adapted, counts))
    if records:
        print(metrics_table(records))
    return counts


def _saved_config(folder: RunFolder, given: FinetuneConfig) -> FinetuneConfig:
    """The run's own options; others that are given beside ``--resume`` must agree with them."""
    values: dict[str, Any] = folder.read_json("config.json")
    saved = FinetuneConfig(**values, out=given.out)
    default = FinetuneConfig(resume=True, out=given.out)
    for item in dataclasses.fields(FinetuneConfig):
        value, kept = getattr(given, item.name), getattr(saved, item.name)
        # A model that moved has another name; it is known by its fingerprint.
        if item.name not in ("resume", "out", "model", "pretrained") and value not in (
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
