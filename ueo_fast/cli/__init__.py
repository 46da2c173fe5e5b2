"""The command `ueo-fast`: picks the subcommand, and turns what it raises into an exit status."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any, TextIO

from ueo_fast.cli.commands import COMMANDS, harmless, plain

INTERRUPTED = 130  # 128 + SIGINT: what shells report for a command ended by Ctrl-C


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand.

    Args:
        argv: the words after ``ueo-fast``; ``None`` takes them from the command line.

    Returns:
        The exit status: 0, 1 (cannot run, or nobody reads the output), 2 (wrong usage) or 130
        (interrupted).
    """
    if argv is None:
        _know_names_of_files()
    _open_closed_descriptors()
    with _usable_streams():
        try:
            status = _run(argv)
            sys.stdout.flush()  # here, where an error can be caught, not while Python exits
            return status
        except BrokenPipeError:  # `ueo-fast demo | head`: the reader has seen enough
            _discard(sys.stdout)
            return 1
        except OSError as error:
            if error.filename != _STDOUT:
                raise
            print(f"ueo-fast: {plain(error)}", file=sys.stderr)
            _discard(sys.stdout)
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
            f"ueo-fast {name} needs the Python package {package!r}, which is not installed. "
            f'Install it from a clone of the repository:\n    pip install ".[{extra}]"\n'
            "or let make create a separate environment in .venv/ there:\n    make setup",
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


_STDOUT = "standard output"


class _Stream:
    """A text stream whose errors have a name, or none at all.

    Args:
        stream: to write to.
        quiet: standard error: its errors are dropped, and progress bars may move the cursor. Into
            other streams nothing is written that a terminal obeys.
    """

    def __init__(self, stream: TextIO, *, quiet: bool) -> None:
        self._stream, self._quiet = stream, quiet

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with self._named():
            self._stream.write(text if self._quiet else harmless(text))
        return len(text)

    def flush(self) -> None:
        with self._named():
            self._stream.flush()

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if not self._quiet:
                raise OSError(error.errno, error.strerror, _STDOUT) from error
            _discard(self._stream)


@contextlib.contextmanager
def _usable_streams() -> Iterator[None]:
    """Within, what cannot be written to standard output is an error that says so, and what cannot
    be written to standard error is dropped: nobody could be told, and the run goes on."""
    output, errors = (
        # A daemon may have none.
        open(os.devnull, "w", encoding="utf-8") if stream is None else stream  # noqa: SIM115
        for stream in (sys.stdout, sys.stderr)
    )
    for stream in (output, errors):
        # A terminal that cannot show "±" shows "?", and the run goes on.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    with (
        contextlib.redirect_stdout(_Stream(output, quiet=False)),
        contextlib.redirect_stderr(_Stream(errors, quiet=True)),
    ):
        yield


def _know_names_of_files() -> None:
    """Begin again in Python's UTF-8 mode where the locale knows ASCII only: lists, tables and
    configs name files in UTF-8, and most of these could not be opened."""
    if os.name == "posix" and sys.getfilesystemencoding() == "ascii" and sys.executable:
        arguments = [sys.executable, *sys.orig_argv[1:]]
        os.execve(sys.executable, arguments, {**os.environ, "PYTHONUTF8": "1"})


def _open_closed_descriptors() -> None:
    """Give standard streams that were closed (cron, daemons) to the null device: else the next
    files that are opened would get their numbers, and what libraries print would go into them."""
    for descriptor in (0, 1, 2):
        if not _is_open(descriptor):
            # The lowest free number, which is this one.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)


def _is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


def _discard(stream: TextIO) -> None:
    """What is still buffered has nowhere to go; without this Python would complain at exit."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
