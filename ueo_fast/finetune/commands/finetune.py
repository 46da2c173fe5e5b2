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
from typing import TYPE_CHECKING

import torch

from ueo_fast.finetune.clip.base_model import BaseModel, named_as_flags, option, recall
from ueo_fast.finetune.clip.delta import save_delta
from ueo_fast.finetune.clip.load import LoadedClip, load_base, load_clip
from ueo_fast.finetune.clip.model import ClipClassifier
from ueo_fast.finetune.clip.weights import identify
from ueo_fast.finetune.commands.device import chosen_device
from ueo_fast.finetune.commands.finetune_config import FinetuneConfig
from ueo_fast.finetune.commands.problem import Problem, read_problem
from ueo_fast.finetune.commands.recorder import Recorder, check_trackers, training_hooks
from ueo_fast.finetune.commands.results import (
    brief,
    known_counts,
    metrics_table,
    prediction_rows,
    verdict_line,
    warning_lines,
)
from ueo_fast.finetune.commands.stages import Start, begin, continued, is_begun
from ueo_fast.finetune.data.copies import COPIES, open_copies, remove_copies
from ueo_fast.finetune.data.loader import STOPPING, loading_errors
from ueo_fast.finetune.engine.checkpoint import SafetensorsCheckpoints
from ueo_fast.finetune.engine.trainer import History, NonFiniteLossError
from ueo_fast.finetune.evaluation.results_table import KnownCounts
from ueo_fast.finetune.files.run_files import (
    BASE_MODEL,
    CACHE,
    CHECKPOINT,
    CONFIG,
    DELTA,
    ENVIRONMENT,
    FINISHED,
    PREDICTION_COLUMNS,
    PREDICTIONS,
    REPORT,
    Finished,
    Threshold,
)
from ueo_fast.finetune.files.run_folder import RunFolder
from ueo_fast.finetune.report import write_report, write_thumbnails

if TYPE_CHECKING:
    from ueo_fast.finetune.data.copies import Copies

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
            config.make_method().check(config.trainer())  # before anything is read or written
            problem = read_problem(config)
            with RunFolder.create(config.out, prefix="finetune") as folder:
                return _run(config, folder, problem, config)
        assert config.out is not None
        with RunFolder.resume(config.out) as folder:
            given, config = config, _saved_config(folder, config)
            missing = [name for name in _RESULTS if not (folder.path / name).exists()]
            if missing in ([], [REPORT]):
                folder.read_json(FINISHED, Finished)
                _remove_copies(config, folder)
                print(f"{folder.path} is finished: there is nothing to resume")
                if missing:
                    _report(folder)
                return folder.path
            if not (folder.path / CHECKPOINT).exists():
                print("no step was saved: the training begins again")
            begun = is_begun(folder)
            return _run(config, folder, None if begun else read_problem(config), given)


def _run(
    config: FinetuneConfig, folder: RunFolder, problem: Problem | None, given: FinetuneConfig
) -> Path:
    started = time.perf_counter()
    check_trackers(config)
    store = SafetensorsCheckpoints(folder)
    clip: LoadedClip | None = None
    with _threads(config.threads) as threads:
        try:
            loaded = _load(config, folder, given)
            config.make_method().check(config.trainer(), tower=loaded.model.visual)
            clip = loaded
            if not (folder.path / CONFIG).exists():
                folder.write_json(CONFIG, config.as_dict())
            if not (folder.path / BASE_MODEL).exists():
                folder.write_json(BASE_MODEL, clip.base)
            if not (folder.path / ENVIRONMENT).exists():
                command = config.command()
                folder.write_environment(command=command, seeds=[config.seed], threads=threads)
            copies = _open_copies(config, folder, given)
            start = (
                begin(config, folder, clip, problem, copies)
                if problem
                else continued(folder, clip, config, copies)
            )
            history, recorder = _train(config, folder, clip, start, store)
            counts = _finish(config, folder, clip, start, history, recorder)
            threshold = Threshold(counts.rule, counts.threshold)
            seconds = time.perf_counter() - started
            folder.write_json(FINISHED, Finished(history.stopped, seconds, threshold))
            print(f"adapted: {folder.path / DELTA}")
            if copies is not None:
                copies.close()
            _remove_copies(config, folder)
            _report(folder)
        except KeyboardInterrupt as ended:
            with contextlib.suppress(OSError):  # of a terminal that was closed
                print(f"\nstopped: {_what_is_kept(folder, store)}", file=sys.stderr)
            number = ended.number if isinstance(ended, _Stop) else signal.SIGINT
            raise SystemExit(128 + number) from None
        except OSError as error:
            unread = isinstance(error, BrokenPipeError)  # of what is printed: nobody's fault
            if unread or not (folder.path / CONFIG).exists():
                raise
            raise OSError(f"{error}\nFix this, then go on: {_resume(folder)}") from error
        except ValueError as error:
            if clip is None or not (folder.path / CONFIG).exists():
                raise
            raise ValueError(
                f"{error}\n{folder.path} is kept. Fix this and resume with: {_resume(folder)}; to "
                "change options, use another --out"
            ) from error
    return folder.path


def _open_copies(config: FinetuneConfig, folder: RunFolder, given: FinetuneConfig) -> Copies | None:
    cache, limit, own = config.cache, config.cache_limit, folder.path / CACHE
    if own.is_symlink():  # in a run folder from others it could lead anywhere
        raise OSError(f"{own} is a link to another folder: remove it; --cache DIR names a folder")
    if config.method == "zeroshot":  # which sees each image once
        cache = "off"
    elif given.resume and cache not in ("auto", "off", given.cache):
        # A run folder from others must not choose where files are made.
        cache = cache if (Path(cache) / COPIES).is_file() else "auto"
    return open_copies(
        cache,
        own,
        config.decode,
        None if limit is None else round(limit * 1e9),
    )


def _remove_copies(config: FinetuneConfig, folder: RunFolder) -> None:
    """Of the run's own folder, which an earlier part of the run may have used with another
    ``--cache``, or left by being killed."""
    own = folder.path / CACHE
    if own.is_symlink() or Path(config.cache).absolute() == own.absolute():
        return
    remove_copies(own)


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
    if not (folder.path / CONFIG).exists():
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
    if not (folder.path / BASE_MODEL).exists():
        return None
    return folder.read_json(BASE_MODEL, BaseModel)


@loading_errors()
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
        folder.path / DELTA,
        classifier,
        clip.base,
        method=config.method,
        seed=config.seed,
        extra={"mcm_scale": config.mcm_scale, "decode": config.decode},
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
    folder.write_csv(PREDICTIONS, PREDICTION_COLUMNS, rows)
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
    saved = dataclasses.replace(FinetuneConfig.read(folder), out=given.out)
    default = FinetuneConfig(resume=True, out=given.out)
    # Where copies of images are kept changes no result.
    for name in ("cache", "cache_limit"):
        if getattr(given, name) != getattr(default, name):
            saved = dataclasses.replace(saved, **{name: getattr(given, name)})
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
