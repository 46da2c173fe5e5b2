"""One folder per run, in which nothing is ever half-written."""

from __future__ import annotations

import contextlib
import csv
import errno
import io
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

from ueo_fast.finetune.files.atomic import (
    atomic_file,
    failed_write,
    lock,
    open_own,
    remove_leftover,
    sync_folder,
)
from ueo_fast.finetune.files.records import LONGEST_LINE, parse_object, read_lines, read_whole
from ueo_fast.finetune.files.run_files import CONFIG, ENVIRONMENT

T = TypeVar("T")

_PARTIAL = ".*.partial"  # see atomic_file
_PACKAGES = (
    "ueo_fast",
    "torch",
    "torchvision",
    "numpy",
    "pillow",
    "open_clip_torch",
    "safetensors",
    "scikit-learn",
)


@dataclass(frozen=True)
class _Identity:
    """The options that every run of ``ueo-fast finetune`` has."""

    method: str
    model: str
    seed: int


class RunFolder:
    """The folder of one run: :mod:`~ueo_fast.finetune.files.run_files` says what is in it.

    Files are written atomically. Lines are appended to ``*.jsonl`` in one write each and forced to
    disk, so a run that is killed keeps every line that it had reported. An error of the system
    (full disk, read-only folder) is raised as the ``OSError`` that it is, names the file, and
    leaves what was there before.

    Args:
        path: an existing folder; :meth:`create` makes one, :meth:`open` checks that one is a run,
            and :meth:`resume` makes it ready to go on.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    @contextlib.contextmanager
    def create(cls, out: str | os.PathLike[str] | None, *, prefix: str) -> Iterator[RunFolder]:
        """Make the folder, and be the only process that writes to it while the block runs.

        Partial files of a killed process are removed from it. A folder in which nothing was written
        is removed when the block ends, so that a failed start leaves none.

        Args:
            out: a folder that does not exist yet or is empty; ``None`` makes
                ``runs/<prefix>-<date>-<time>`` in the current folder, numbered where two runs
                start in the same second.
            prefix: what the run is.

        Raises:
            FileExistsError: ``out`` is a file, or has something in it.
            BlockingIOError: another process writes to it.
        """
        if out is None:
            path = _make_numbered(Path("runs") / time.strftime(f"{prefix}-%Y%m%d-%H%M%S"))
        else:
            path = Path(out)
            cls.check_free(path)
            path.mkdir(parents=True, exist_ok=True)
        with _locked(path):  # before looking into it: another process may be about to write
            folder = cls(path)
            folder._remove_partial_files()
            cls.check_free(path)
            try:
                yield folder
            finally:
                with contextlib.suppress(OSError):
                    path.rmdir()  # refuses a folder that is not empty

    @staticmethod
    def check_free(path: Path) -> None:
        """Refuse what :meth:`create` cannot take, and change nothing.

        Raises:
            FileExistsError: ``path`` is a file, or has something in it.
        """
        if path.exists() and not path.is_dir():
            raise FileExistsError(f"{path} is a file; --out names a folder")
        partial = {leftover.name for leftover in path.glob(_PARTIAL)}
        if path.is_dir() and any(entry.name not in partial for entry in path.iterdir()):
            raise FileExistsError(
                f"{path} is not empty, and nothing is overwritten: choose another --out, or "
                "leave it out for a new folder under runs/"
            )

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> RunFolder:
        """An existing run, to be read.

        Raises:
            NotADirectoryError: ``path`` is a file.
            FileNotFoundError: there is no such folder, or no ``config.json`` in it.
        """
        folder = Path(path)
        if folder.exists() and not folder.is_dir():
            raise NotADirectoryError(f"{folder} is a file; give the folder of a run")
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} does not exist; give the folder of a run")
        if not os.path.lexists(folder / CONFIG):  # reading says what else it is
            found = sorted(entry.name for entry in folder.iterdir())
            shown = ", ".join(found[:5]) + (f" and {len(found) - 5} more" if found[5:] else "")
            runs = sorted(each.parent.name for each in folder.glob(f"*/{CONFIG}"))
            what = f"it has no {CONFIG} (found: {shown or 'nothing'})"
            if runs:
                what += f"; but {', '.join(runs[:3])} in it may be (compare takes {folder}/*)"
            raise FileNotFoundError(f"{folder} is not the folder of a run: {what}")
        return cls(folder)

    @classmethod
    @contextlib.contextmanager
    def resume(cls, path: str | os.PathLike[str]) -> Iterator[RunFolder]:
        """An existing run, to be written to again by this process alone while the block runs.

        Partial files of a killed process are removed, and a torn last line is cut from its
        ``*.jsonl``, so that the next one begins a line of its own.

        Raises:
            BlockingIOError: another process writes to it.
            OSError: as :meth:`open`, or the folder cannot be written to.
        """
        folder = cls.open(path)
        with _locked(folder.path):
            folder._remove_partial_files()
            for lines in folder.path.glob("*.jsonl"):
                if lines.is_file() and not lines.is_symlink():
                    _cut_torn_line(lines)
            yield folder

    def _remove_partial_files(self) -> None:
        # The lock is held, so nobody is writing them.
        for partial in self.path.glob(_PARTIAL):
            remove_leftover(partial)

    def write_text(self, name: str, text: str) -> Path:
        """Write a whole file, or replace one, atomically."""
        path = self.path / name
        with atomic_file(path) as file:
            file.write(text.encode())
        return path

    def write_json(self, name: str, value: Any) -> Path:
        """Write a record or ``dict`` as indented JSON, atomically; NaN is an error."""
        text = json.dumps(value, indent=2, allow_nan=False, default=asdict)
        return self.write_text(name, text + "\n")

    def write_json_lines(self, name: str, records: Iterable[Any]) -> Path:
        """Write a whole JSON-lines file, or replace one, atomically."""
        return self.write_text(name, "".join(map(_line, records)))

    def read_json(self, name: str, convert: Callable[..., T]) -> T:
        """Read a file that holds one JSON object.

        ``convert`` is a record's class, which checks each value, or a function of the object.

        Raises:
            FileNotFoundError: the run has no such file.
            BrokenFileError: ``convert`` refuses what is in it; the message names file and line.
        """
        path = self.path / name
        return parse_object(path, read_whole(path), convert)

    def read_json_lines(
        self,
        name: str,
        convert: Callable[..., T] = dict,  # type: ignore[assignment]
    ) -> list[T]:
        """Read a file that holds one JSON object per line, as :meth:`read_json` does.

        A last line without its line break was cut off by a crash and is left out.
        """
        path = self.path / name
        return [
            parse_object(path, line, convert, number)
            for number, line in enumerate(read_lines(path), start=1)
            if line.endswith(b"\n")
        ]

    def read_config(self) -> dict[str, Any]:
        """Read the options of a run of ``ueo-fast finetune``, whichever version wrote it.

        Raises:
            ValueError: the file is damaged, or the run is of another kind.
        """
        config: dict[str, Any] = self.read_json(CONFIG, dict)
        missing = [name for name in _Identity.__annotations__ if name not in config]
        if missing:
            raise ValueError(
                f"{self.path / CONFIG} names no {', '.join(missing)}, so this is not a run of "
                "ueo-fast finetune (the results of ueo-fast demo are in its results.md)"
            )
        self.read_json(CONFIG, _Identity)
        return config

    def write_csv(self, name: str, header: Sequence[str], rows: Iterable[Sequence[object]]) -> Path:
        """Write a table as CSV (UTF-8, quoted as the csv module does), atomically, row by row."""
        path = self.path / name
        with atomic_file(path) as file:
            text = io.TextIOWrapper(file, encoding="utf-8", newline="", write_through=True)
            writer = csv.writer(text)
            writer.writerow(header)
            writer.writerows(rows)
            text.detach()
        return path

    def write_environment(self, *, command: str, seeds: Sequence[int], threads: int) -> Path:
        """Write ``environment.json``: see :func:`environment`."""
        values = {"command": command, "seeds": list(seeds), **environment(threads)}
        return self.write_json(ENVIRONMENT, values)

    def append_json_line(self, name: str, record: Any) -> None:
        """Append a record or ``dict`` to a JSON-lines file and force it to disk.

        Raises:
            OSError: it could not be written; the lines before it are kept, and no piece of it.
        """
        line = _line(record).encode()
        path = self.path / name
        size = None
        try:
            with open(path, "ab", buffering=0, opener=open_own) as file:
                size = os.fstat(file.fileno()).st_size
                left = memoryview(line)
                while left:  # where the disk becomes full within the line, the next turn says so
                    left = left[file.write(left) :]
                os.fsync(file.fileno())
        except OSError as error:
            if size is not None:
                with contextlib.suppress(OSError):
                    os.truncate(path, size) if size else path.unlink()
            raise failed_write(path, error) from error
        if not size:
            sync_folder(self.path)

    def drop_json_lines(self, name: str, key: str, last: int) -> None:
        """Drop the records whose ``key`` is above ``last``, and what a crash left of a last line.

        A resumed run repeats the steps after its last checkpoint and reports them again. Records
        without ``key`` stay. The file is replaced atomically, and only if something is dropped;
        nothing happens where there is none. Errors are those of :meth:`read_json`.
        """
        path = self.path / name
        if not os.path.lexists(path):
            return
        lines = list(read_lines(path))
        kept = [
            line
            for number, line in enumerate(lines, start=1)
            if line.endswith(b"\n")
            and not parse_object(path, line, lambda value: _above(value.get(key), last), number)
        ]
        if len(kept) < len(lines):
            with atomic_file(path) as file:
                file.writelines(kept)


def _line(record: Any) -> str:
    return json.dumps(record, allow_nan=False, default=asdict) + "\n"


def _cut_torn_line(path: Path) -> None:
    with open(path, "r+b") as file:
        start = max(0, file.seek(0, os.SEEK_END) - LONGEST_LINE)
        file.seek(start)
        before, line_break, torn = file.read().rpartition(b"\n")
        if torn and (line_break or not start):
            file.truncate(start + len(before + line_break))


def _above(value: object, last: int) -> bool:
    return isinstance(value, int | float) and value > last


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Keep other processes out of a folder; a process that dies gives it back.

    Raises:
        BlockingIOError: another process has it, or had it and removed it just now.
    """
    if os.name == "nt":  # it opens no folders: nobody is kept out
        yield
        return
    descriptor = os.open(path, os.O_RDONLY)  # the folder itself: no file is left behind
    try:
        lock(descriptor)
        if not path.exists() or not os.path.samestat(os.fstat(descriptor), os.stat(path)):
            raise BlockingIOError
    except BlockingIOError:
        os.close(descriptor)
        raise BlockingIOError(
            errno.EWOULDBLOCK,
            "another process is writing to this run; wait for it, or end it",
            str(path),
        ) from None
    try:
        yield
    finally:
        os.close(descriptor)


def environment(threads: int) -> dict[str, Any]:
    """What a number may depend on besides the config: versions, processor, threads, time."""
    import torch

    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpus": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": threads,
        "versions": {name: _version(name) for name in _PACKAGES},
        "argv": sys.argv[1:],
        "folder": _current_folder(),  # where relative paths start
    }


def _current_folder() -> str | None:
    try:
        return os.getcwd()
    except OSError:  # it was removed
        return None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:  # not Linux
        pass
    return platform.processor() or platform.machine()


def _make_numbered(path: Path) -> Path:
    number = 1
    while True:
        candidate = path if number == 1 else path.with_name(f"{path.name}-{number}")
        try:
            candidate.mkdir(parents=True)
            return candidate
        except FileExistsError:
            number += 1
