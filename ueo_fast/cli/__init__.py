"""The command `ueo-fast`: one function per subcommand, each importing only what it needs."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

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
    if name not in _COMMANDS:
        print(
            f"ueo-fast: no command {name!r}: choose one of {', '.join(_COMMANDS)}\n\n{_usage()}",
            file=sys.stderr,
        )
        return 2
    command, _ = _COMMANDS[name]
    try:
        return command(rest)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return INTERRUPTED
    except SystemExit as exit_:  # how argument parsers leave after --help or an error
        return exit_.code if isinstance(exit_.code, int) else int(exit_.code is not None)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "ueo_fast"):  # a fault of ours, not a missing extra
            raise
        print(
            f"ueo-fast {name} needs the module {package!r}, which is not installed. In a clone of "
            'the repository:\n    pip install ".[demo]"\nor, for an environment of its own:\n'
            "    make setup",
            file=sys.stderr,
        )
        return 1


def _usage() -> str:
    lines = [f"    {name:8}{summary}" for name, (_, summary) in _COMMANDS.items()]
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


def _info(words: Sequence[str]) -> int:
    from ueo_fast.info import main as print_info

    if words:
        print(f"ueo-fast info takes no options, got {' '.join(words)!r}", file=sys.stderr)
        return 2
    return print_info() or 0


def _demo(words: Sequence[str]) -> int:
    parser = _demo_parser()
    options = vars(parser.parse_args(list(words)))
    del options["config"]
    from ueo_fast.finetune.demo.config import DemoConfig

    try:
        config = DemoConfig(**options)
    except ValueError as error:
        parser.error(str(error))
    from ueo_fast.finetune.demo.run import run_demo
    from ueo_fast.finetune.trainer import NonFiniteLossError

    try:
        run_demo(config)
    except BrokenPipeError:  # an OSError too, but no fault of the run folder's
        raise
    except FileExistsError as error:
        print(f"ueo-fast demo: {error}", file=sys.stderr)
        return 2
    except (OSError, NonFiniteLossError) as error:
        print(f"ueo-fast demo: {error}", file=sys.stderr)
        return 1
    return 0


def _demo_parser() -> ArgumentParser:
    """One flag per field of ``DemoConfig``, whose metadata has the help."""
    from dataclasses import fields
    from typing import get_type_hints

    from jsonargparse import ArgumentParser

    from ueo_fast.finetune.demo.config import DemoConfig

    parser = ArgumentParser(
        prog="ueo-fast demo",
        description=(
            "Watch a real CLIP being adapted to unlabelled images with unknown classes among them. "
            "A tiny CLIP learns to read handwritten digits; then the images change and some digits "
            "are taken off the list of classes. Zero-shot, AdaBN, EntMin, InfoMax and UEO are "
            "compared from the same start. Nothing is downloaded; the defaults take one "
            "to two minutes on two cores."
        ),
    )
    parser.add_argument(
        "--config",
        action="config",
        help="file with options (YAML or JSON), e.g. the config.json of another run",
    )
    hints = get_type_hints(DemoConfig)
    defaults = DemoConfig()
    for field in fields(DemoConfig):
        flag = "--" + field.name.replace("_", "-")
        default = getattr(defaults, field.name)
        kind: dict[str, Any]
        if isinstance(default, tuple):  # several words after the flag: --seeds 0 1 2
            kind = {
                "type": type(default[0]),
                "nargs": "+",
                "default": list(default),
            }
        else:
            kind = {"type": hints[field.name], "default": default}
        parser.add_argument(flag, help=field.metadata["help"], **kind)
    return parser


_COMMANDS: dict[str, tuple[Callable[[Sequence[str]], int], str]] = {
    "demo": (_demo, "adapt a tiny CLIP to shifted digits with unknown classes, and compare"),
    "info": (_info, "versions, instruction set, and which backends can run, or why not"),
}


if __name__ == "__main__":
    sys.exit(main())
