"""One folder per run, in which nothing is ever half-written."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ueo_fast.finetune.files.atomic import atomic_file, failed_write, lock, sync_folder
from ueo_fast.finetune.files.tensor_file import read_tensors, write_tensors

if TYPE_CHECKING:
    from torch import Tensor

CONFIG = "config.json"
_PACKAGES = (
    "ueo_fast",
    "torch",
    "torchvision",
    "numpy",
    "pillow",
    "open_clip_torch",
    "safetensors",
    "scikit-learn",
    "torchmetrics",
)


class RunFolder:
    """Config, environment, metrics and results of one run.

    Files appear whole or not at all (written beside their place, then renamed); lines are appended
    to ``*.jsonl`` in one write each and forced to disk, so a run that is killed keeps every line
    that it had reported. An error of the system (full disk, read-only folder) is raised as the
    ``OSError`` that it is, names the file, and leaves what was there before.

    Args:
        path: an existing folder; :meth:`create` makes one, :meth:`open` checks that one is a run,
            and :meth:`resume` makes it ready to go on.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(cls, out: str | os.PathLike[str] | None, *, prefix: str) -> RunFolder:
        """Make the folder.

        Args:
            out: a folder that does not exist yet or is empty; ``None`` makes
                ``runs/<prefix>-<date>-<time>`` in the current folder, numbered where two runs
                start in the same second.
            prefix: what the run is.

        Raises:
            FileExistsError: ``out`` is a file, or has something in it.
        """
        if out is None:
            return cls(_make_numbered(Path("runs") / time.strftime(f"{prefix}-%Y%m%d-%H%M%S")))
        path = Path(out)
        if path.exists() and not path.is_dir():
            raise FileExistsError(f"{path} is a file; --out names a folder")
        if path.is_dir() and any(path.iterdir()):
            raise FileExistsError(
                f"{path} is not empty, and nothing is overwritten: choose another --out, or leave "
                "it out for a new folder under runs/"
            )
        path.mkdir(parents=True, exist_ok=True)
        return cls(path)

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
            raise FileNotFoundError(f"there is no folder {folder}; give the folder of a run")
        if not (folder / CONFIG).is_file():
            found = sorted(entry.name for entry in folder.iterdir())
            shown = ", ".join(found[:5]) + (f" and {len(found) - 5} more" if found[5:] else "")
            raise FileNotFoundError(
                f"{folder} is not the folder of a run: it has no {CONFIG} "
                f"(found: {shown or 'nothing'})"
            )
        return cls(folder)

    @classmethod
    def resume(cls, path: str | os.PathLike[str]) -> RunFolder:
        """An existing run, to be written to again.

        What a kill left behind is cleared away: partial files are removed, and a last line that
        was cut off is cut from its ``*.jsonl``, so that the next one begins a line of its own. Take
        :meth:`lock` first where two processes could resume the same run.

        Raises:
            OSError: as :meth:`open`, or the folder cannot be written to.
        """
        folder = cls.open(path)
        for partial in folder.path.glob(".*.partial"):
            partial.unlink(missing_ok=True)
        for lines in folder.path.glob("*.jsonl"):
            whole = lines.read_bytes().rpartition(b"\n")
            if whole[2]:
                os.truncate(lines, len(whole[0] + whole[1]))
        return folder

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Be the only process that writes to the folder; a process that dies gives it back.

        Raises:
            BlockingIOError: another process has it.
        """
        if os.name == "nt":  # it opens no folders: nobody is kept out
            yield
            return
        descriptor = os.open(self.path, os.O_RDONLY)  # the folder itself: no file is left behind
        try:
            lock(descriptor)
        except BlockingIOError as error:
            os.close(descriptor)
            raise BlockingIOError(
                error.errno,
                "another process is writing to this run; wait for it, or end it",
                str(self.path),
            ) from error
        try:
            yield
        finally:
            os.close(descriptor)

    def remove_if_unused(self) -> None:
        """Remove the folder if there is nothing in it, so that a failed start leaves none."""
        with contextlib.suppress(OSError):
            self.path.rmdir()  # refuses a folder that is not empty

    def write_text(self, name: str, text: str) -> Path:
        """Write a whole file, or replace one, atomically."""
        path = self.path / name
        with atomic_file(path) as file:
            file.write(text.encode())
        return path

    def write_json(self, name: str, value: Any) -> Path:
        """Write ``value`` as indented JSON, atomically; NaN is an error, not a number."""
        return self.write_text(name, json.dumps(value, indent=2, allow_nan=False) + "\n")

    def read_json(self, name: str) -> Any:
        """What :meth:`write_json` wrote.

        Raises:
            FileNotFoundError: the run has no such file.
            ValueError: it is not JSON; the message names it and the line.
        """
        path = self.path / name
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:  # UnicodeDecodeError and JSONDecodeError are some
            raise ValueError(f"{path} is not JSON ({error}); was it edited?") from error

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

    def write_tensors(
        self, name: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
    ) -> Path:
        """Write tensors and text as safetensors, atomically."""
        return write_tensors(self.path / name, tensors, metadata)

    def read_tensors(self, name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
        """What :meth:`write_tensors` wrote: tensors on the CPU, and metadata.

        Raises:
            FileNotFoundError: the run has no such file.
            TensorFileError: it is damaged; the message names it.
        """
        return read_tensors(self.path / name)

    def write_environment(self, *, command: str, seeds: Sequence[int], threads: int) -> Path:
        """Write ``environment.json``: see :func:`environment`."""
        values = environment(threads)
        return self.write_json(
            "environment.json", {"command": command, "seeds": list(seeds), **values}
        )

    def append_json_line(self, name: str, record: Mapping[str, Any]) -> None:
        """Append one record to a JSON-lines file and force it to disk.

        Raises:
            OSError: it could not be written; the lines before it are kept, and no piece of it.
        """
        line = (json.dumps(record, allow_nan=False) + "\n").encode()
        path = self.path / name
        is_new = not path.exists()
        size = 0 if is_new else path.stat().st_size
        try:
            with open(path, "ab", buffering=0) as file:
                if file.write(line) != len(line):  # the disk became full within the line
                    file.write(line)
                os.fsync(file.fileno())
        except OSError as error:
            with contextlib.suppress(OSError):
                path.unlink() if is_new else os.truncate(path, size)
            raise failed_write(path, error) from error
        if is_new:
            sync_folder(self.path)

    def read_json_lines(self, name: str) -> list[dict[str, Any]]:
        """The records of a JSON-lines file, in order.

        A last line without its line break was cut off by a crash and is left out.

        Raises:
            FileNotFoundError: the run has no such file.
            ValueError: another line is not JSON; the message names file and line.
        """
        path = self.path / name
        records: list[dict[str, Any]] = []
        try:
            for line in path.read_bytes().split(b"\n")[:-1]:
                records.append(json.loads(line))  # noqa: PERF401 - its length is the line's number
        except ValueError as error:
            raise ValueError(f"{path}, line {len(records) + 1} is not JSON ({error})") from error
        return records

    def keep_json_lines(self, name: str, keep: Callable[[dict[str, Any]], bool]) -> None:
        """Rewrite a JSON-lines file, atomically, with those records that ``keep`` says yes to.

        A resumed run repeats the steps after its last checkpoint, so it drops their lines first.
        Nothing happens where there is no such file.
        """
        if not (self.path / name).exists():
            return
        kept = [record for record in self.read_json_lines(name) if keep(record)]
        lines = [json.dumps(record, allow_nan=False) + "\n" for record in kept]
        self.write_text(name, "".join(lines))


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
    }


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
