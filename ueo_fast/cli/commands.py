"""The subcommands: what each is for, its options, and the code it runs, imported only then."""

from __future__ import annotations

import contextlib
import importlib
import re
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ueo_fast.cli.flags import parse


@dataclass(frozen=True)
class Command:
    """A subcommand whose options are a dataclass.

    Attributes:
        name: the word after ``ueo-fast``.
        summary: one line of ``ueo-fast --help``.
        description: head of ``ueo-fast NAME --help``.
        config: ``module:class`` of the dataclass of options, below ``ueo_fast.finetune``.
        entry: ``module:function`` that takes it; an int that it returns is the exit status.
    """

    name: str
    summary: str
    description: str
    config: str
    entry: str

    def run(self, words: Sequence[str]) -> int:
        """Parse, run, and turn what a user can fix into a message and a status.

        What the options alone show to be wrong (a config's ``check_files``) is said before the
        command, and PyTorch with it, is imported.
        """
        config = parse(
            _load(self.config), words, prog=f"ueo-fast {self.name}", description=self.description
        )
        try:
            with _short_warnings():
                if hasattr(config, "check_files"):
                    config.check_files()
                with _ctrl_c_ends_at_once():
                    entry = _load(self.entry)
                status = entry(config)
            return status if isinstance(status, int) else 0
        except BrokenPipeError:  # an OSError too, but nobody's fault
            raise
        except (ValueError, OSError, RuntimeError, MemoryError) as error:
            told = _told(error)
            if told is None:
                raise
            status, message = told
            print(f"ueo-fast {self.name}: {harmless(message)}", file=sys.stderr)
            return status


@contextlib.contextmanager
def _ctrl_c_ends_at_once() -> Iterator[None]:
    """Within, Ctrl-C ends the process: a KeyboardInterrupt while PyTorch is imported becomes an
    error of the import, or an abort, and there is nothing to save yet."""
    ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not ours or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def harmless(text: str) -> str:
    """Spell out what a terminal obeys: names and notes may come from a run folder of others."""
    return _OBEYED.sub(lambda sign: repr(sign[0])[1:-1], text)


# Control characters but for tab and line feed, and marks that reverse the text.
_OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def _told(error: Exception) -> tuple[int, str] | None:
    """The exit status and the message of what a user can fix; ``None`` for a fault of ours."""
    from ueo_fast.finetune.engine.hooks import NonFiniteLossError

    if isinstance(error, UnicodeEncodeError) and error.encoding == sys.getfilesystemencoding():
        return 1, (
            f"{error.object!r} cannot be a file name in this locale, whose encoding is "
            f"{error.encoding}: set PYTHONUTF8=1 or LC_ALL=C.UTF-8 in the environment"
        )
    if isinstance(error, (FileExistsError, ValueError)):
        return 2, plain(error)
    if isinstance(error, (OSError, NonFiniteLossError)):
        return 1, plain(error)
    first = str(error).partition("\n")[0]
    if type(error).__name__ == "OutOfMemoryError":  # torch's, which need not be imported here
        return 1, f"out of device memory: {first}\n{_LESS_MEMORY}"
    # torch's allocator of a CPU has no exception of its own.
    if isinstance(error, MemoryError) or "DefaultCPUAllocator" in first:
        return 1, f"out of memory{f': {first}' if first else ''}\n{_LESS_MEMORY}"
    return None


def plain(error: Exception) -> str:
    """The message, without the numbers that Python puts in front of the system's words."""
    return re.sub(r"\[Errno \d+\] ", "", str(error))


_LESS_MEMORY = (
    "Use smaller batches (--batch-size; finetune: --micro-batch-size, which does not change the "
    "result, and --eval-batch-size), fewer --workers, or --precision bf16"
)


@dataclass(frozen=True)
class Info:
    """``ueo-fast info``, which has no options."""

    summary: str = "versions, instruction set, and which backends can run, or why not"

    def run(self, words: Sequence[str]) -> int:
        if words in (["-h"], ["--help"]):
            print(f"usage: ueo-fast info\n\nPrints {self.summary}. It takes no options.")
            return 0
        if words:
            print(f"ueo-fast info takes no options, got {' '.join(words)!r}", file=sys.stderr)
            return 2
        from ueo_fast.info import main as print_info

        return print_info() or 0


@contextlib.contextmanager
def _short_warnings() -> Iterator[None]:
    """Warnings as a sentence, without the line of ours that gave them."""
    before = warnings.formatwarning
    warnings.formatwarning = lambda message, *_, **__: f"warning: {harmless(str(message))}\n"
    try:
        yield
    finally:
        warnings.formatwarning = before


def _load(path: str) -> Any:
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(f"ueo_fast.finetune.{module}"), name)


_ALL = (
    Command(
        name="demo",
        summary="adapt a tiny CLIP to shifted digits with unknown classes, and compare",
        description=(
            "Watch a real CLIP being adapted to unlabelled images with unknown classes among them. "
            "A tiny CLIP learns to read handwritten digits; then the images change and some digits "
            "are taken off the list of classes. Zero-shot, AdaBN, EntMin, InfoMax and UEO are "
            "compared from the same start. Nothing is downloaded; the five seeds of the "
            "default take half a minute each, and as many run at once as there are processors."
        ),
        config="demo.config:DemoConfig",
        entry="demo.run:run_demo",
    ),
    Command(
        name="finetune",
        summary="adapt CLIP to a folder of unlabelled images and a list of class names",
        description=(
            "Adapt CLIP to your own unlabelled images, some of which may belong to no class on "
            "your list: ueo-fast finetune --data photos/ --classes names.txt --out run. No label "
            "is needed; where there are labels (class folders, a list with labels) they are used "
            "for metrics only, before, during and after. Everything goes into the run folder, "
            "whose delta.safetensors is what was learnt; a run that was stopped goes on with "
            "--resume."
        ),
        config="commands.finetune_config:FinetuneConfig",
        entry="commands.finetune:run",
    ),
    Command(
        name="evaluate",
        summary="compare zero-shot and adapted on labelled images",
        description=(
            "Metrics of a run's adapted CLIP next to zero-shot CLIP, on images with labels (class "
            "folders, or a list or CSV with labels). Labels that are not among the run's classes "
            "are unknown images."
        ),
        config="commands.options:EvaluateConfig",
        entry="commands.evaluate:run",
    ),
    Command(
        name="score",
        summary="classes, probabilities and known/unknown for each image of a folder",
        description=(
            "For each image the most probable classes, the MCM score (high: known) and the "
            "verdict known or unknown, written to a CSV or Parquet file. A million images take "
            "some 0.4 GB of memory, more with a larger --top-k. Images that cannot be read are "
            "listed and skipped."
        ),
        config="commands.options:ScoreConfig",
        entry="commands.score:run",
    ),
    Command(
        name="report",
        summary="one HTML page that tells what a run did",
        description=(
            "Write report.html into the run folder (or to --out): one page that needs no network, "
            "with metrics before and after, MCM histogram and ROC curve, per-class accuracy, "
            "training curves, and the most and least confident images."
        ),
        config="commands.options:ReportConfig",
        entry="report.page:run",
    ),
    Command(
        name="compare",
        summary="runs side by side: methods, seeds, mean and spread",
        description=(
            "Compare run folders of ueo-fast finetune: one row per method, mean and standard "
            "deviation over its seeds, and a table of every run."
        ),
        config="commands.options:CompareConfig",
        entry="evaluation.compare:run",
    ),
)

COMMANDS: dict[str, Command | Info] = {**{c.name: c for c in _ALL}, "info": Info()}
