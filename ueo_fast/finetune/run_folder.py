"""One folder per run, in which nothing is ever half-written."""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

_PACKAGES = ("ueo_fast", "torch", "numpy", "open_clip_torch", "scikit-learn", "torchmetrics")


class RunFolder:
    """Config, environment, metrics and results of one run.

    Files appear whole or not at all (written beside their place, then renamed); lines are appended
    to ``*.jsonl`` in one write each and forced to disk, so a run that is killed keeps every line
    that it had reported.

    Args:
        path: an existing folder; :meth:`create` makes one.
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

    def write_text(self, name: str, text: str) -> Path:
        """Write a whole file, or replace one, atomically."""
        path = self.path / name
        partial = path.with_name(f".{name}.partial")
        with open(partial, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        return path

    def write_json(self, name: str, value: Any) -> Path:
        """Write ``value`` as indented JSON, atomically; NaN is an error, not a number."""
        return self.write_text(name, json.dumps(value, indent=2, allow_nan=False) + "\n")

    def write_environment(self, *, command: str, seeds: Sequence[int], threads: int) -> Path:
        """Write ``environment.json``: see :func:`environment`."""
        values = environment(threads)
        return self.write_json(
            "environment.json", {"command": command, "seeds": list(seeds), **values}
        )

    def append_json_line(self, name: str, record: dict[str, Any]) -> None:
        """Append one record to a JSON-lines file and force it to disk."""
        line = json.dumps(record, allow_nan=False) + "\n"
        with open(self.path / name, "ab") as file:
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())

    def read_json_lines(self, name: str) -> list[dict[str, Any]]:
        """The records of a JSON-lines file, in order.

        A last line without its line break was cut off by a crash and is left out.
        """
        text = (self.path / name).read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def environment(threads: int) -> dict[str, Any]:
    """What a number may depend on besides the config: versions, processor, threads, time."""
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpus": os.cpu_count(),
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
