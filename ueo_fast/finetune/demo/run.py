"""The demonstration from beginning to end: pre-train, shift, hide classes, adapt, compare."""

from __future__ import annotations

import contextlib
import copy
import math
import multiprocessing
import pickle
import queue
import signal
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ueo_fast import mcm_score
from ueo_fast.finetune.clip.model import ClipClassifier
from ueo_fast.finetune.clip.prompt import PromptLearner
from ueo_fast.finetune.data.loader import processors
from ueo_fast.finetune.data.names import plural
from ueo_fast.finetune.demo.config import DemoConfig
from ueo_fast.finetune.demo.digits import DIGIT_NAMES, load_digits
from ueo_fast.finetune.demo.problem import Problem, make_problem
from ueo_fast.finetune.demo.report import write_report
from ueo_fast.finetune.demo.result import MethodResult
from ueo_fast.finetune.demo.tiny_clip import OnStep, pretrain, tiny_clip, tiny_tokenizer
from ueo_fast.finetune.engine.hooks import Hooks
from ueo_fast.finetune.evaluation.metrics import Metrics, compute_metrics
from ueo_fast.finetune.evaluation.predict import predict_cosines
from ueo_fast.finetune.files.run_folder import RunFolder
from ueo_fast.finetune.methods import UEO, AdaBN, EntMin, InfoMax, LossMethod, Method, ZeroShot
from ueo_fast.finetune.target import Target, zero_shot_target


def demo_methods(config: DemoConfig) -> list[Method]:
    """The rows of the table, in order; AdaBN where the tower has BatchNorm."""
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
        NonFiniteLossError: a method diverged; the results before it are in the folder.
    """
    with RunFolder.create(config.out, prefix="demo") as folder:
        _run(config, folder)
    return folder.path


def _run(config: DemoConfig, folder: RunFolder) -> None:
    started = time.perf_counter()
    threads = min(config.threads or processors(), len(config.seeds))
    folder.write_json("config.json", config.as_dict())
    folder.write_environment(command=config.command(), seeds=config.seeds, threads=threads)
    threads_before = torch.get_num_threads()
    torch.set_num_threads(1)  # training amplifies rounding, which another number would change
    try:
        digits = load_digits()
        problems = [make_problem(config, digits, seed) for seed in config.seeds]
        results: list[MethodResult] = []
        with _progress(config, problems) as bar:
            bar.write(
                f"tiny CLIP ({config.tower}) on {len(digits.images)} handwritten digits, shift "
                f"{config.shift} ({config.effective_severity:g}), scenario {config.scenario}, "
                f"{plural(len(problems), 'seed')}; results in {folder.path}"
            )
            if (config.epochs, config.pretrain_steps) == (DemoConfig.epochs, None):
                bar.write(
                    "each seed is pre-trained, then adapted by one method after the other: usually "
                    f"half a minute a seed, {plural(threads, 'seed')} at a time"
                )
            for result in _results(config, problems, threads, bar):
                folder.append_json_line("metrics.jsonl", result.record())
                folder.append_json_line("history.jsonl", result.history_record())
                results.append(result)
        results.sort(key=lambda result: config.seeds.index(result.seed))
        seconds = time.perf_counter() - started
        print(write_report(folder, config, problems, results, threads=threads, seconds=seconds))
    finally:
        torch.set_num_threads(threads_before)


def _results(
    config: DemoConfig, problems: Sequence[Problem], threads: int, bar: tqdm[Any]
) -> Iterator[MethodResult]:
    """The results of all seeds, each as soon as it is there."""
    if threads == 1:
        for problem in problems:
            yield from run_seed(config, problem, bar)
        return
    context = multiprocessing.get_context("spawn")  # PyTorch's threads do not survive a fork
    events = context.Queue()
    others = set(multiprocessing.active_children())
    with ProcessPoolExecutor(threads, context, _start, (events,)) as pool:
        try:
            seeds = [pool.submit(_run_elsewhere, config, problem.seed) for problem in problems]
            while not (all(seed.done() for seed in seeds) and events.empty()):
                with contextlib.suppress(queue.Empty):
                    name, value = pickle.loads(events.get(timeout=0.1))
                    if name == "result":
                        yield value
                    else:
                        getattr(bar, name)(value)
            for seed in seeds:
                seed.result()  # raises what it has raised
        except BaseException as error:
            for process in set(multiprocessing.active_children()) - others:
                process.terminate()  # after Ctrl-C they would finish their seeds first
            if isinstance(error, BrokenProcessPool):
                raise OSError(
                    "a process that computed a seed was ended, or could not start; use --threads "
                    "1, which needs no other process and less memory"
                ) from error
            raise


def _start(events: Any) -> None:
    """Prepare a process of the pool: one thread, and Ctrl-C is the main process's affair."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    _DistantBar.events = events


def _run_elsewhere(config: DemoConfig, seed: int) -> None:
    bar: Any = _DistantBar()
    for result in run_seed(config, make_problem(config, load_digits(), seed), bar):
        bar.send("result", result)


class _DistantBar:
    """Stands for the progress bar, which is in the main process."""

    events: Any

    def send(self, name: str, value: object) -> None:
        # As bytes: the queue would share tensors by files, which go when this process ends.
        self.events.put(pickle.dumps((name, value)))

    def update(self) -> None:
        self.send("update", 1)

    def write(self, text: str) -> None:
        self.send("write", text)

    def set_description(self, text: str) -> None:
        """Not shown: several seeds are under way."""


def run_seed(config: DemoConfig, problem: Problem, bar: tqdm[Any]) -> Iterator[MethodResult]:
    """Pre-train once, then let every method start from the same model.

    Yields each result as soon as it is there, before its line is printed: what the reader has seen
    the caller has stored.
    """

    def say(text: str) -> None:
        bar.write(f"seed {problem.seed}: {text}")

    def on_step(done: int, total: int, loss: float) -> None:
        bar.update()

    bar.set_description(f"seed {problem.seed}: pre-training")
    started = time.perf_counter()
    zero_shot = pretrained_classifier(config, problem, on_step)
    seconds = time.perf_counter() - started
    clean = compute_metrics(predict_cosines(zero_shot, problem.clean.images), problem.labels)
    say(f"pre-trained on all ten digits ({seconds:.1f} s); without the shift: {_brief(clean)}")
    say(
        f"known: {', '.join(problem.split.known)}; unlabelled: {len(problem.train.images)} images "
        f"of {', '.join(problem.split.train)}"
    )
    target = zero_shot_target(zero_shot, problem.train.images)
    hooks = Hooks(on_step=lambda record: on_step(record.step, record.total, record.loss))
    for method in demo_methods(config):
        bar.set_description(f"seed {problem.seed}: {method.title}")
        result = run_method(config, problem, zero_shot, target, method, hooks)
        yield result
        say(f"{method.title:9} {_brief(result.metrics)}  ({result.seconds:.1f} s)")


def pretrained_classifier(
    config: DemoConfig, problem: Problem, on_step: OnStep | None = None
) -> ClipClassifier:
    """A tiny CLIP trained on the source domain, with prompts for the known classes only."""
    tokenizer = tiny_tokenizer()
    model = tiny_clip(config.tower, problem.seed)
    pretrain(
        model,
        tokenizer,
        problem.source.images,
        problem.source.labels,
        DIGIT_NAMES,
        steps=config.effective_pretrain_steps,
        seed=problem.seed,
        on_step=on_step,
    )
    prompt = PromptLearner(model, tokenizer, problem.split.known)
    return ClipClassifier(model, prompt, patch=config.patch)


def run_method(
    config: DemoConfig,
    problem: Problem,
    zero_shot: ClipClassifier,
    target: Target,
    method: Method,
    hooks: Hooks | None = None,
) -> MethodResult:
    """Adapt a copy of ``zero_shot`` with ``method`` and test it on the whole shifted target.

    Args:
        config: of the run.
        problem: of the seed.
        zero_shot: where every method starts; left as it is.
        target: ``problem.train`` with what ``zero_shot`` says about it.
        method: a row of the table.
        hooks: who is told of each gradient step.
    """
    classifier = copy.deepcopy(zero_shot)
    started = time.perf_counter()
    history = method.adapt(
        classifier,
        target,
        config=config.trainer(problem.seed),
        hooks=hooks,
    )
    seconds = time.perf_counter() - started
    cosines = predict_cosines(classifier, problem.target.images)
    return MethodResult(
        seed=problem.seed,
        method=method.title,
        known=problem.split.known,
        metrics=compute_metrics(cosines, problem.labels),
        scores=mcm_score(cosines),
        history=history,
        seconds=seconds,
    )


def _progress(config: DemoConfig, problems: Sequence[Problem]) -> tqdm[Any]:
    trained = sum(isinstance(method, LossMethod) for method in demo_methods(config))
    steps = sum(
        config.effective_pretrain_steps
        + trained * config.epochs * math.ceil(len(problem.train.images) / config.batch_size)
        for problem in problems
    )
    # disable=None: no bar where the output is a file, so that logs stay readable.
    return tqdm(total=steps, unit="step", disable=None, dynamic_ncols=True)


def _brief(metrics: Metrics) -> str:
    text = f"per-class accuracy {100 * metrics.per_class_accuracy:.1f}"
    if metrics.auroc is not None and metrics.hm is not None:
        text += f", AUROC {100 * metrics.auroc:.1f}, HM {100 * metrics.hm:.1f}"
    return text
