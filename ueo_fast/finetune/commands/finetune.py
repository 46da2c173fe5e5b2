"""`ueo-fast finetune`: from images and class names to an adapted CLIP, all in one run folder."""

from __future__ import annotations

import contextlib
import functools
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ueo_fast.finetune.clip.base_model import BaseModel, named_as_flags, option, recall
from ueo_fast.finetune.clip.delta import save_delta
from ueo_fast.finetune.clip.load import LoadedClip, load_base, load_clip
from ueo_fast.finetune.clip.model import ClipClassifier, make_classifier
from ueo_fast.finetune.clip.weights import identify
from ueo_fast.finetune.commands.adapted import chosen_device
from ueo_fast.finetune.commands.finetune_config import (
    DataOptions,
    FinetuneConfig,
    MethodOptions,
    ModelOptions,
)
from ueo_fast.finetune.commands.problem import Problem, read_problem, reread_problem
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
        FileExistsError: the folder ``--out`` exists and is not empty.
        NonFiniteLossError: the loss became NaN or infinite; what was learned before is in the
            folder.
        SystemExit: Ctrl-C, SIGTERM or SIGHUP, with 128 plus the signal's number.
    """
    given, problem = config, None
    with _terminable(), contextlib.ExitStack() as stack:
        if given.output.resume:
            assert given.output.out is not None
            folder = stack.enter_context(RunFolder.resume(given.output.out))
            config = given.resumed(folder)
            if _is_finished(folder, config.data.cache):
                return folder.path
        method, trainer = config.method.make(), config.trainer
        if not given.output.resume:
            method.check(trainer)  # before anything is read or written
        if not given.output.resume or not is_begun(folder):
            problem = read_problem(config.data, needs_labels=method.reads_labels)
        if not given.output.resume:
            folder = stack.enter_context(RunFolder.create(config.output.out, prefix="finetune"))
        started = time.perf_counter()
        check_trackers(config.output)
        store = SafetensorsCheckpoints(folder)
        threads = stack.enter_context(_threads(config.speed.threads))
        stack.enter_context(_hints_if_stopped(folder, store))
        clip = _load(config, folder, given)
        method.check(trainer, tower=clip.model.visual)
        stack.enter_context(_hints_if_wrong(folder))
        stack.enter_context(loading_errors())
        _keep_choices(config, folder, clip, threads)
        copies = _open_copies(config.data, config.method.method, folder, given)
        start = _start(config, folder, clip, problem, copies)
        recorder = Recorder(
            folder,
            start,
            method=config.method,
            trainer=trainer,
            eval_every=config.output.eval_every,
        )
        before = recorder.before()
        if before is not None:
            print(f"zero-shot: {brief(before)}")
        save = functools.partial(_save, config, folder, clip, start.classifier)
        with training_hooks(config.output, config.as_dict(), folder, recorder, store) as hooks:
            try:
                history = method.adapt(start.classifier, start.target, config=trainer, hooks=hooks)
            except NonFiniteLossError as error:
                kept = f"What was learned before that is in {save()}"
                raise NonFiniteLossError(f"{error}\n{kept}") from error
        counts = _predictions(config.method, folder, start, recorder, history, save)
        threshold = Threshold(counts.rule, counts.threshold)
        seconds = time.perf_counter() - started
        folder.write_json(FINISHED, Finished(history.stopped, seconds, threshold))
        print(f"adapted: {folder.path / DELTA}")
        if copies is not None:
            copies.close()
        _remove_copies(config.data.cache, folder)
        _report(folder)
    return folder.path


def _is_finished(folder: RunFolder, cache: str) -> bool:
    """Whether a run that is to go on has nothing left to do, and says so; if only its report is
    missing, it is written."""
    missing = [name for name in _RESULTS if not (folder.path / name).exists()]
    if missing not in ([], [REPORT]):
        if not (folder.path / CHECKPOINT).exists():
            print("no step was saved: the training begins again")
        return False
    folder.read_json(FINISHED, Finished)
    _remove_copies(cache, folder)
    print(f"{folder.path} is finished: there is nothing to resume")
    if missing:
        _report(folder)
    return True


def _keep_choices(
    config: FinetuneConfig, folder: RunFolder, clip: LoadedClip, threads: int
) -> None:
    """What the run folder says about how the run was started; a resumed run has it already."""
    if not (folder.path / CONFIG).exists():
        folder.write_json(CONFIG, config.as_dict())
    if not (folder.path / BASE_MODEL).exists():
        folder.write_json(BASE_MODEL, clip.base)
    if not (folder.path / ENVIRONMENT).exists():
        seeds = [config.training.seed]
        folder.write_environment(command=config.command(), seeds=seeds, threads=threads)


def _start(
    config: FinetuneConfig,
    folder: RunFolder,
    clip: LoadedClip,
    problem: Problem | None,
    copies: Copies | None,
) -> Start:
    """The zero-shot classifier and its images; without ``problem`` as the run folder has them."""
    images = problem or reread_problem(folder)
    classifier = make_classifier(
        clip.model,
        clip.tokenizer,
        images.known,
        template=config.model.prompt_template,
        scope=config.model.affine_scope,
        patch=config.model.patch,
        logit_scale=config.model.logit_scale,
    )
    return (continued if problem is None else begin)(
        folder,
        classifier,
        images,
        config.data,
        copies,
        evaluation=config.evaluation,
        keep_features=not config.method.make().trains_tower(config.trainer),
    )


def _save(
    config: FinetuneConfig, folder: RunFolder, clip: LoadedClip, classifier: ClipClassifier
) -> Path:
    return save_delta(
        folder.path / DELTA,
        classifier,
        clip.base,
        method=config.method.method,
        seed=config.training.seed,
        extra={"mcm_scale": config.method.mcm_scale, "decode": config.data.decode},
    )


def _predictions(
    method: MethodOptions,
    folder: RunFolder,
    start: Start,
    recorder: Recorder,
    history: History,
    save: Callable[[], object],
) -> KnownCounts:
    """What the adapted classifier says, into the run folder with itself, and in brief."""
    if history.stopped:
        print(f"stopped early: {history.stopped}")
    before, scale = start.test_cosines, method.mcm_scale
    adapted = recorder.after(history)
    counts = known_counts(adapted, scale)
    rows = prediction_rows(start.tested, start.known, before, adapted, scale, counts.threshold)
    folder.write_csv(PREDICTIONS, PREDICTION_COLUMNS, rows)
    write_thumbnails(folder, start.tested.images.paths, start.known)
    save()
    records = recorder.first_and_last()
    final = records[:2][-1] if records else None
    print(warning_lines(start.known, adapted, final), end="")
    print(verdict_line(method.method, records, before, adapted, counts))
    if records:
        print(metrics_table(records))
    return counts


def _open_copies(
    options: DataOptions, method: str, folder: RunFolder, given: FinetuneConfig
) -> Copies | None:
    cache, limit, own = options.cache, options.cache_limit, folder.path / CACHE
    if own.is_symlink():  # in a run folder from others it could lead anywhere
        raise OSError(f"{own} is a link to another folder: remove it; --cache DIR names a folder")
    if method == "zeroshot":  # which sees each image once
        cache = "off"
    elif given.output.resume and cache not in ("auto", "off", given.data.cache):
        # A run folder from others must not choose where files are made.
        cache = cache if (Path(cache) / COPIES).is_file() else "auto"
    most_bytes = None if limit is None else round(limit * 1e9)
    return open_copies(cache, own, options.decode, most_bytes)


def _remove_copies(cache: str, folder: RunFolder) -> None:
    """Of the run's own folder, which an earlier part of the run may have used with another
    ``--cache``, or left by being killed."""
    own = folder.path / CACHE
    if own.is_symlink() or Path(cache).absolute() == own.absolute():
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


@contextlib.contextmanager
def _hints_if_stopped(folder: RunFolder, store: SafetensorsCheckpoints) -> Iterator[None]:
    """Within, a run that a signal or the system stops says what is kept and how to go on."""
    try:
        yield
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


@contextlib.contextmanager
def _hints_if_wrong(folder: RunFolder) -> Iterator[None]:
    """Within, an error about something that the user gave says how to go on."""
    try:
        yield
    except ValueError as error:
        if not (folder.path / CONFIG).exists():
            raise
        raise ValueError(
            f"{error}\n{folder.path} is kept. Fix this and resume with: {_resume(folder)}; to "
            "change options, use another --out"
        ) from error


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

    A resumed run's folder may come from somebody else. If the options given with ``--resume`` name
    no model, the run does, and this machine must know it.
    """
    device, own, named = chosen_device(config.speed.device), config.model, given.model
    if not given.output.resume:
        with named_as_flags():
            return load_clip(own.model, own.weights, device=device, activation=own.activation)
    recorded = None  # the model that the run began with, before that is known
    if (folder.path / BASE_MODEL).exists():
        recorded = folder.read_json(BASE_MODEL, BaseModel)
    by_user = named.model != ModelOptions().model
    by_user = by_user or (named.model, named.weights) == (own.model, own.weights)
    with named_as_flags():
        recorded = recorded or recall(identify(own.model), own.weights)
        if recorded is None and not by_user:
            raise ValueError(
                f"{folder.path} was stopped before its model, {own.model}, was loaded; because "
                "such a folder may come from others, that model is not opened. If you trust it, "
                f"name it: {option('model', own.model)}"
            )
        if recorded is None:
            return load_clip(named.model, named.weights, device=device)
        try:
            if by_user:
                return load_base(
                    recorded, model=named.model, pretrained=named.weights, device=device
                )
            return load_base(recorded, device=device)
        except ValueError as error:
            raise ValueError(f"{folder.path} cannot go on: {error}") from error


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[int]:
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)
