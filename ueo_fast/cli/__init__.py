"""The command `ueo-fast`: picks the subcommand, and turns what it raises into an exit status."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence
from contextlib import suppress

from ueo_fast.cli.commands import COMMANDS

INTERRUPTED = 130  # 128 + SIGINT: what shells report for a command ended by Ctrl-C


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand.

    Args:
        argv: the words after ``ueo-fast``; ``None`` takes them from the command line.

    Returns:
        The exit status: 0, 1 (cannot run, or nobody reads the output), 2 (wrong usage) or 130
        (interrupted).
    """
    for stream in (sys.stdout, sys.stderr):
        # A terminal that cannot show "±" shows "?", and the run goes on.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        status = _run(argv)
        sys.stdout.flush()  # here, where a closed pipe can be caught, not while Python exits
        return status
    except BrokenPipeError:  # `ueo-fast demo | head`: the reader has seen enough
        # What is still buffered has nowhere to go; without this Python would complain at exit.
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _run(argv: Sequence[str] | None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(_usage())
        return 0 if words else 2
    if words[0] == "--version":
        from ueo_fast import __version__

        print(f"ueo_fast {__version__}")
        return 0
    name, *rest = words
    if name not in COMMANDS:
        print(
            f"ueo-fast: no command {name!r}: choose one of {', '.join(COMMANDS)}\n\n{_usage()}",
            file=sys.stderr,
        )
        return 2
    try:
        return COMMANDS[name].run(rest)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return INTERRUPTED
    except SystemExit as exit_:  # how argument parsers leave after --help or an error
        return exit_.code if isinstance(exit_.code, int) else int(exit_.code is not None)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "ueo_fast"):  # a fault of ours, not a missing extra
            raise
        extra = {"pyarrow": "parquet"}.get(
            package, package if package in ("tensorboard", "wandb") else "recipe"
        )
        print(
            f"ueo-fast {name} needs the module {package!r}, which is not installed. In a clone of "
            f'the repository:\n    pip install ".[{extra}]"\nor, for an environment of its own:\n'
            "    make setup",
            file=sys.stderr,
        )
        return 1
    except ImportError as error:
        if error.name is not None:  # a fault of ours or of a package, not what we raise ourselves
            raise
        print(f"ueo-fast {name}: {error}", file=sys.stderr)
        return 1


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
