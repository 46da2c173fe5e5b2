"""The subcommands: what each is for, its options, and the code it runs, imported only then."""

from __future__ import annotations

import contextlib
import functools
import importlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ueo_fast.cli.flags import parse


def prepared(words: Sequence[str]) -> Callable[[], object]:
    """What the words after ``ueo-fast`` ask for, ready to run; an int that it returns is the exit
    status.

    What the options alone show to be wrong is reported before the command, and PyTorch with it, is
    imported.

    Raises:
        SystemExit: after ``--help``, ``--version`` or wrong options (status 2).
    """
    name, *rest = words or [""]
    if name in ("", "-h", "--help"):
        print(_usage())
        sys.exit(0 if words else 2)
    if name == "--version":
        from ueo_fast import __version__

        print(f"ueo_fast {__version__}")
        sys.exit(0)
    if name not in COMMANDS:
        names = ", ".join(COMMANDS)
        print(
            f"ueo-fast: no command {name!r}: choose one of {names}\n\n{_usage()}", file=sys.stderr
        )
        sys.exit(2)
    return COMMANDS[name].prepared(rest)


@dataclass(frozen=True)
class Command:
    """A subcommand whose options are a dataclass.

    Attributes:
        name: the word after ``ueo-fast``.
        summary: one line of ``ueo-fast --help``.
        description: head of ``ueo-fast NAME --help``.
        config: ``module:class`` of the dataclass of options, below ``ueo_fast.finetune``.
        entry: ``module:function`` that takes it.
    """

    name: str
    summary: str
    description: str
    config: str
    entry: str

    def prepared(self, words: Sequence[str]) -> Callable[[], object]:
        """The command with its options."""
        config = parse(
            _load(self.config), words, prog=f"ueo-fast {self.name}", description=self.description
        )
        if hasattr(config, "check_files"):
            config.check_files()
        with _ctrl_c_ends_at_once():
            return functools.partial(_load(self.entry), config)


@dataclass(frozen=True)
class Info:
    """``ueo-fast info``, which has no options."""

    summary: str = "versions, instruction set, and which backends can run, or why not"

    def prepared(self, words: Sequence[str]) -> Callable[[], object]:
        """What prints it."""
        if words in (["-h"], ["--help"]):
            print(f"usage: ueo-fast info\n\nPrints {self.summary}. It takes no options.")
            sys.exit(0)
        if words:
            print(f"ueo-fast info takes no options, got {' '.join(words)!r}", file=sys.stderr)
            sys.exit(2)
        from ueo_fast.info import main as print_info

        return print_info


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


def _load(path: str) -> Any:
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(f"ueo_fast.finetune.{module}"), name)


def _usage() -> str:
    lines = [f"    {name:10}{command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: ueo-fast COMMAND [options]",
            "",
            "Adapts CLIP to unlabelled images, some of which belong to no class on your list.",
            "",
            *lines,
            "",
            "ueo-fast COMMAND --help explains a command's options; ueo-fast --version.",
        ]
    )


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
            "some 0.4 GB of memory; images that cannot be read are listed and skipped."
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
