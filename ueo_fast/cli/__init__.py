"""The command `ueo-fast`: runs a subcommand, and turns what it raises into an exit status."""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, TextIO

from ueo_fast.cli.commands import prepared

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
    words = list(sys.argv[1:] if argv is None else argv)
    ending = _Ending()
    with _usable_streams(), ending.of_output(), ending.of_command(*words[:1]), _short_warnings():
        command = prepared(words)
        status = command()
        ending.status = status if isinstance(status, int) else 0
    return ending.status


class _Ending:
    """How a command ends: within its contexts, errors that a user can fix become a message and an
    exit status."""

    status = 0

    @contextlib.contextmanager
    def of_output(self) -> Iterator[None]:
        """Standard output may be closed or full."""
        try:
            yield
            sys.stdout.flush()  # here, where an error can be caught, not while Python exits
        except BrokenPipeError:  # `ueo-fast demo | head`: the reader has seen enough
            _discard(sys.stdout)
            self.status = 1
        except OSError as error:
            if error.filename != _STDOUT:
                raise
            print(f"ueo-fast: {_plain(error)}", file=sys.stderr)
            _discard(sys.stdout)
            self.status = 1

    @contextlib.contextmanager
    def of_command(self, name: str = "") -> Iterator[None]:
        """The command may refuse, fail, exit or be interrupted."""
        try:
            yield
        except KeyboardInterrupt:
            print("\ninterrupted", file=sys.stderr)
            self.status = INTERRUPTED
        except SystemExit as exit_:  # how argument parsers leave after --help or an error
            self.status = exit_.code if isinstance(exit_.code, int) else int(exit_.code is not None)
        except Exception as error:
            of_output = isinstance(error, OSError) and error.filename == _STDOUT
            told = None if of_output or isinstance(error, BrokenPipeError) else _told(error, name)
            if told is None:
                raise
            self.status, message = told
            print(f"ueo-fast {name}{harmless(message)}", file=sys.stderr)


def _told(error: Exception, name: str) -> tuple[int, str] | None:
    """The exit status and the message of what a user can fix; ``None`` for a fault of ours."""
    from ueo_fast.finetune.engine.hooks import NonFiniteLossError

    if isinstance(error, ModuleNotFoundError):
        package = (error.name or "").partition(".")[0]
        if package in ("", "ueo_fast"):  # not a missing extra
            return None
        extra = {"pyarrow": "parquet"}.get(
            package, package if package in ("tensorboard", "wandb") else "recipe"
        )
        return 1, (
            f" needs the Python package {package!r}, which is not installed. "
            f'Install it from a clone of the repository:\n    pip install ".[{extra}]"\n'
            "or let make create a separate environment in .venv/ there:\n    make setup"
        )
    if isinstance(error, ImportError):  # of a package, or what we raise ourselves
        return None if error.name is not None else (1, f": {error}")
    if isinstance(error, UnicodeEncodeError) and error.encoding == sys.getfilesystemencoding():
        return 1, (
            f": {error.object!r} cannot be a file name in this locale, whose encoding is "
            f"{error.encoding}: set PYTHONUTF8=1 or LC_ALL=C.UTF-8 in the environment"
        )
    if isinstance(error, (FileExistsError, ValueError)):
        return 2, f": {_plain(error)}"
    if isinstance(error, (OSError, NonFiniteLossError)):
        return 1, f": {_plain(error)}"
    first = str(error).partition("\n")[0]
    if type(error).__name__ == "OutOfMemoryError":  # torch's, which need not be imported here
        return 1, f": out of device memory: {first}\n{_LESS_MEMORY}"
    # torch's allocator of a CPU has no exception of its own.
    if isinstance(error, MemoryError) or "DefaultCPUAllocator" in first:
        return 1, f": out of memory{f': {first}' if first else ''}\n{_LESS_MEMORY}"
    return None


_LESS_MEMORY = (
    "Use smaller batches (--batch-size; finetune: --micro-batch-size, which does not change the "
    "result, and --eval-batch-size), fewer --workers, or --precision bf16"
)


def _plain(error: Exception) -> str:
    """The message, without the numbers that Python puts in front of the system's words."""
    return re.sub(r"\[Errno \d+\] ", "", str(error))


def harmless(text: str) -> str:
    """Spell out what a terminal obeys: names and notes may come from a run folder of others."""
    return _OBEYED.sub(lambda sign: repr(sign[0])[1:-1], text)


# Control characters but for tab and line feed, and marks that reverse the text.
_OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


@contextlib.contextmanager
def _short_warnings() -> Iterator[None]:
    """Warnings as a sentence, without the line of ours that gave them."""
    before = warnings.formatwarning
    warnings.formatwarning = lambda message, *_, **__: f"warning: {harmless(str(message))}\n"
    try:
        yield
    finally:
        warnings.formatwarning = before


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
