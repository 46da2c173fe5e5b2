"""The demonstration from beginning to end: pre-train, shift, hide classes, adapt, compare."""

from __future__ import annotations

import copy
import math
import multiprocessing
import signal
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from open_clip.model import CLIP
from tqdm import tqdm

from ueo_fast import mcm_score
from ueo_fast.finetune.adaptation import adapt
from ueo_fast.finetune.clip.model import make_classifier
from ueo_fast.finetune.data.loader import processors
from ueo_fast.finetune.data.names import plural
from ueo_fast.finetune.demo.config import DemoConfig
from ueo_fast.finetune.demo.digits import DIGIT_NAMES, Draw, draw, load_digits
from ueo_fast.finetune.demo.report import Result, write_report
from ueo_fast.finetune.demo.tiny_clip import OnStep, one_thread, pretrain, tiny_clip, tiny_tokenizer
from ueo_fast.finetune.engine.hooks import Hooks
from ueo_fast.finetune.engine.training_config import ImagePass
from ueo_fast.finetune.evaluation.metrics import compute_metrics
from ueo_fast.finetune.evaluation.predict import predict_cosines
from ueo_fast.finetune.files.run_folder import RunFolder
from ueo_fast.finetune.methods import UEO, AdaBN, EntMin, InfoMax, LossMethod, Method, ZeroShot

Tell = Callable[[str, Any], None]
"""Called with ("step", title), ("line", text) or ("result", :class:`Result`)."""

BATCHES = ImagePass(batch_size=256)
"""Of an evaluation. The last digits of a number depend on the batch size."""


def demo_methods(config: DemoConfig) -> list[Method]:
    """The rows of the table, in order; AdaBN only where the tower has BatchNorm."""
    methods: list[Method] = [ZeroShot()]
    if config.tower == "bn":
        methods.append(AdaBN())
    methods.append(EntMin(eps=config.eps))
    methods.append(InfoMax(trade_off=config.trade_off, eps=config.eps))
    methods.append(UEO(trade_off=config.trade_off, mcm_scale=config.mcm_scale, eps=config.eps))
    return methods


def run_demo(config: DemoConfig) -> Path:
    """Run the demonstration and print its table.

    Args:
        config: every choice.

    Returns:
        The run folder: config.json, environment.json, metrics.jsonl, history.jsonl, results.md
        and plots.

    Raises:
        FileExistsError: ``config.out`` exists and is not empty.
        NonFiniteLossError: a method diverged; the folder has the results before it.
    """
    with RunFolder.create(config.out, prefix="demo") as folder, one_thread():
        _run(config, folder)
    return folder.path


def _run(config: DemoConfig, folder: RunFolder) -> None:
    started = time.perf_counter()
    threads = min(config.threads or processors(), len(config.seeds))
    folder.write_json("config.json", config.as_dict())
    folder.write_environment(command=config.command(), seeds=config.seeds, threads=threads)
    draws = [draw(config, seed) for seed in config.seeds]
    results: list[Result] = []
    # disable=None: no bar where the output is a file, so that logs stay readable.
    with tqdm(total=_steps(config, draws), unit="step", disable=None, dynamic_ncols=True) as bar:

        def tell(kind: str, value: Any) -> None:
            if kind == "line":
                bar.write(value)
            elif kind == "step":
                if threads == 1:  # otherwise several seeds run at the same time
                    bar.set_description(value, refresh=False)
                bar.update()
            else:
                folder.append_json_line("metrics.jsonl", value.record)
                folder.append_json_line("history.jsonl", value.history)
                results.append(value)

        bar.write(
            f"tiny CLIP ({config.tower}) on {len(load_digits().images)} handwritten digits, shift "
            f"{config.shift} ({config.effective_severity:g}), scenario {config.scenario}, "
            f"{plural(len(draws), 'seed')}; results in {folder.path}"
        )
        if (config.epochs, config.pretrain_steps) == (DemoConfig.epochs, None):
            bar.write(
                "each seed is pre-trained, then adapted by one method after the other: usually "
                f"half a minute a seed, {plural(threads, 'seed')} at a time"
            )
        if threads == 1:
            for seed in config.seeds:
                run_seed(config, seed, tell)
        else:
            _run_in_processes(config, threads, tell)
    results.sort(key=lambda result: config.seeds.index(result.record["seed"]))
    seconds = time.perf_counter() - started
    print(write_report(folder, config, draws[0], results, threads=threads, seconds=seconds))


def _steps(config: DemoConfig, draws: Sequence[Draw]) -> int:
    """Gradient steps of all seeds, pre-training included."""
    trained = sum(isinstance(method, LossMethod) for method in demo_methods(config))
    epochs = trained * config.epochs
    return sum(
        config.effective_pretrain_steps
        + epochs * math.ceil(len(one.train.images) / config.batch_size)
        for one in draws
    )


@contextmanager
def _ctrl_c_waits() -> Iterator[None]:
    """Hold Ctrl-C back while processes start: one that is left half started prints a traceback."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _run_in_processes(config: DemoConfig, threads: int, tell: Tell) -> None:
    """Run each seed in another process, ``threads`` at a time, and pass on what they tell."""
    context = multiprocessing.get_context("spawn")  # PyTorch's threads do not survive a fork
    # A simple queue has no thread: what a seed told is in it as soon as the seed is done.
    events = context.SimpleQueue()
    others = set(multiprocessing.active_children())
    with ProcessPoolExecutor(threads, context, _start, (events,)) as pool:
        try:
            with _ctrl_c_waits():
                seeds = [pool.submit(_run_elsewhere, config, seed) for seed in config.seeds]
            while not (all(seed.done() for seed in seeds) and events.empty()):
                if events.empty():
                    time.sleep(0.02)
                else:
                    tell(*events.get())
            for seed in seeds:
                seed.result()  # raises what the seed raised
        except BaseException as error:
            for process in set(multiprocessing.active_children()) - others:
                process.terminate()  # otherwise they would finish their seeds after Ctrl-C
            if isinstance(error, BrokenProcessPool):
                raise OSError(
                    "a process that computed a seed was ended, or could not start; use --threads "
                    "1, which needs no other process and less memory"
                ) from error
            raise


_events: list[Any] = []  # the queue of this process, where it is one of a pool


def _start(events: Any) -> None:
    """Prepare a process of the pool. Ctrl-C is left to the main process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    _events.append(events)


def _run_elsewhere(config: DemoConfig, seed: int) -> None:
    run_seed(config, seed, lambda *event: _events[0].put(event))


def run_seed(config: DemoConfig, seed: int, tell: Tell) -> None:
    """Pre-train once, then let every method start from the same model.

    A result is told before its line, so that whatever the reader sees has been stored.
    """

    def say(text: str) -> None:
        tell("line", f"seed {seed}: {text}")

    drawn = draw(config, seed)
    started = time.perf_counter()
    model = pretrained(config, drawn, lambda *_: tell("step", f"seed {seed}: pre-training"))
    seconds = time.perf_counter() - started
    known = drawn.split.known
    zero_shot = make_classifier(copy.deepcopy(model), tiny_tokenizer(), known, patch=config.patch)
    cosines = predict_cosines(zero_shot, drawn.clean.images, BATCHES)
    clean = _brief(compute_metrics(cosines, drawn.labels).as_dict())
    say(f"pre-trained on all ten digits ({seconds:.1f} s); without the shift: {clean}")
    say(
        f"known: {', '.join(known)}; unlabelled: {len(drawn.train.images)} images of "
        f"{', '.join(drawn.split.train)}"
    )
    with warnings.catch_warnings():
        # adapt() warns where one class takes all images; here that is a method's line of the table.
        warnings.simplefilter("ignore", UserWarning)
        for method in demo_methods(config):
            result = run_method(config, drawn, model, method, tell)
            tell("result", result)
            record = result.record
            say(f"{method.title:9} {_brief(record)}  ({record['seconds']:.1f} s)")


def pretrained(config: DemoConfig, drawn: Draw, on_step: OnStep | None = None) -> CLIP:
    """A tiny CLIP trained on the source domain, all ten digits of it."""
    model = tiny_clip(config.tower, drawn.seed)
    pretrain(
        model,
        tiny_tokenizer(),
        drawn.source.images,
        drawn.source.labels,
        DIGIT_NAMES,
        steps=config.effective_pretrain_steps,
        seed=drawn.seed,
        on_step=on_step,
    )
    return model


def run_method(
    config: DemoConfig,
    drawn: Draw,
    model: CLIP,
    method: Method,
    tell: Tell = lambda kind, value: None,
) -> Result:
    """Adapt a copy of ``model`` as a user would, and test it on the whole shifted target.

    Args:
        config: choices of the run.
        drawn: images and classes of the seed.
        model: where every method starts, from :func:`pretrained`; left as it is.
        method: a row of the table.
        tell: called at each gradient step.
    """
    name = f"seed {drawn.seed}: {method.title}"
    model = copy.deepcopy(model)
    started = time.perf_counter()
    adaptation = adapt(
        model,
        tiny_tokenizer(),
        drawn.train.images,
        drawn.split.known,
        method=method,
        config=config.trainer(drawn.seed),
        hooks=Hooks(on_step=lambda _: tell("step", name)),
        patch=config.patch,
        eval_batch_size=BATCHES.batch_size,
        progress=False,
    )
    seconds = time.perf_counter() - started
    cosines = predict_cosines(adaptation.classifier, drawn.target.images, BATCHES)
    head = {"seed": drawn.seed, "method": method.title}
    return Result(
        record={
            **head,
            "known_classes": list(drawn.split.known),
            "seconds": round(seconds, 3),
            **compute_metrics(cosines, drawn.labels).as_dict(),
        },
        history={**head, **adaptation.history.as_dict()},
        scores=mcm_score(cosines.double()).numpy(),
    )


def _brief(metrics: Mapping[str, Any]) -> str:
    text = f"per-class accuracy {100 * metrics['per_class_accuracy']:.1f}"
    if metrics["hm"] is not None:
        text += f", AUROC {100 * metrics['auroc']:.1f}, HM {100 * metrics['hm']:.1f}"
    return text
