"""`ueo-fast finetune`: from images and class names to an adapted CLIP, all in one run folder."""

from __future__ import annotations

import contextlib
import dataclasses
import shlex
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

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
from ueo_fast.finetune.data.loader import STOPPING
from ueo_fast.finetune.engine.checkpoint import SafetensorsCheckpoints
from ueo_fast.finetune.engine.trainer import History, NonFiniteLossError
from ueo_fast.finetune.files.run_folder import RunFolder
from ueo_fast.finetune.report import write_report

FINISHED = "finished.json"
DELTA = "delta.safetensors"
REPORT = "report.html"
PREDICTIONS = "predictions.csv"
_RESULTS = (PREDICTIONS, DELTA, FINISHED, REPORT)


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
        SystemExit: Ctrl-C, SIGTERM or SIGHUP, with 128 plus the signal's number.
    """
    with _terminable():
        if not config.resume:
            problem = read_problem(config)
            with RunFolder.create(config.out, prefix="finetune") as folder:
                return _run(config, folder, problem)
        assert config.out is not None
        with RunFolder.resume(config.out) as folder:
            config = _saved_config(folder, config)
            missing = [name for name in _RESULTS if not (folder.path / name).exists()]
            if missing in ([], [REPORT]):
                folder.read_json(FINISHED, dict)
                print(f"{folder.path} is finished: there is nothing to resume")
                if missing:
                    _report(folder)
                return folder.path
            if not (folder.path / SafetensorsCheckpoints.name).exists():
                print("no step was saved: the training begins again")
            return _run(config, folder, None if is_begun(folder) else read_problem(config))


def _run(config: FinetuneConfig, folder: RunFolder, problem: Problem | None) -> Path:
    started = time.perf_counter()
    check_trackers(config)
    store = SafetensorsCheckpoints(folder)
    with _threads(config.threads) as threads:
        try:
            clip = _load(config)
            if not (folder.path / "config.json").exists():
                folder.write_json("config.json", config.as_dict())
            if not (folder.path / "environment.json").exists():
                command = config.command()
                folder.write_environment(command=command, seeds=[config.seed], threads=threads)
            start = (
                begin(config, folder, clip, problem) if problem else continued(folder, clip, config)
            )
            history, recorder = _train(config, folder, clip, start, store)
            _finish(config, folder, clip, start, history, recorder)
            folder.write_json(
                FINISHED, {"stopped": history.stopped, "seconds": time.perf_counter() - started}
            )
            print(f"adapted: {folder.path / DELTA}")
            _report(folder)
        except KeyboardInterrupt as ended:
            with contextlib.suppress(OSError):  # of a terminal that was closed
                print(f"\nstopped: {_what_is_kept(folder, store)}", file=sys.stderr)
            number = ended.number if isinstance(ended, _Stop) else signal.SIGINT
            raise SystemExit(128 + number) from None
        except OSError as error:
            unread = isinstance(error, BrokenPipeError)  # of what is printed: nobody's fault
            if unread or not (folder.path / "config.json").exists():
                raise
            raise OSError(f"{error}\nFix this, then go on: {_resume(folder)}") from error
        except ValueError as error:
            if not (folder.path / "config.json").exists():
                raise
            raise ValueError(
                f"{error}\n{folder.path} is kept. With the same options, once this is fixed: "
                f"{_resume(folder)}; with others choose another --out"
            ) from error
    return folder.path


def _report(folder: RunFolder) -> None:
    try:
        print(f"report:  {write_report(folder.path)}")
    except OSError as error:  # a full disk, hours after the start: say what there is all the same
        raise OSError(
            f"{error}\nThe run is finished, but for its page; to write that: ueo-fast report "
            f"{shlex.quote(str(folder.path))}"
        ) from error


def _what_is_kept(folder: RunFolder, store: SafetensorsCheckpoints) -> str:
    """What a run that is stopped leaves, and how it goes on."""
    if not (folder.path / "config.json").exists():
        return "nothing was done yet"
    if store.step is not None:
        kept = f"step {store.step} is saved"
    elif store.path.exists():
        kept = "the last checkpoint is kept"
    else:
        kept = "no step is saved yet, so it begins again"
    return f"{kept}; to go on: {_resume(folder)}"


def _resume(folder: RunFolder) -> str:
    return f"ueo-fast finetune --resume --out {shlex.quote(str(folder.path))}"


class _Stop(KeyboardInterrupt):
    def __init__(self, number: int) -> None:
        self.number = number


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """What would kill the process without a word becomes an exception, as Ctrl-C is one."""

    def stop(number: int, frame: object) -> None:
        raise _Stop(number)

    main = threading.current_thread() is threading.main_thread()
    numbers = [n for n in STOPPING if main and signal.getsignal(n) is signal.SIG_DFL]
    for number in numbers:
        signal.signal(number, stop)
    try:
        yield
    except _Stop as ended:  # before there was a folder
        raise SystemExit(128 + ended.number) from None
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)


def _load(config: FinetuneConfig) -> LoadedClip:
    return load_clip(
        config.model,
        config.weights,
        device=chosen_device(config.device),
        activation=config.activation,
    )


def _train(
    config: FinetuneConfig,
    folder: RunFolder,
    clip: LoadedClip,
    start: Start,
    store: SafetensorsCheckpoints,
) -> tuple[History, Recorder]:
    method = config.make_method()
    recorder = Recorder(config, folder, start)
    before = recorder.before()
    if before is not None:
        print(f"zero-shot: {brief(before)}")
    with training_hooks(config, folder, recorder, store) as hooks:
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
    folder.write_csv(PREDICTIONS, PREDICTION_COLUMNS, rows)
    _save(config, folder, clip, start.classifier)
    records = recorder.first_and_last()
    if records:
        print(metrics_table(records))
    else:
        print("no labels, hence no metrics; the report shows what can be seen without")


def _saved_config(folder: RunFolder, given: FinetuneConfig) -> FinetuneConfig:
    """The run's own options; others that are given beside ``--resume`` must agree with them."""
    saved = dataclasses.replace(FinetuneConfig.read(folder), out=given.out)
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
