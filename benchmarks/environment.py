"""The facts that a result states about the machine and the versions that made it."""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

import torch

import ueo_fast
from benchmarks import instruction_set

ROOT = Path(__file__).resolve().parents[1]


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def describe(**more: str) -> dict[str, str]:
    """Machine, versions and date, then ``more``."""
    return {
        "date": datetime.date.today().isoformat(),
        "processor": _processor(),
        "instruction set": instruction_set.describe(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "ueo_fast": ueo_fast.__version__,
        **more,
    }


def _output(*command: str) -> str | None:
    """The output of a program; None if it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _sources() -> str:
    """A fingerprint of the measured code, as a copy of the tree may lack git."""
    digest = hashlib.sha256()
    files = [*(ROOT / "csrc").rglob("*"), *(ROOT / "ueo_fast").rglob("*.py")]
    for path in sorted(path for path in files if path.is_file()):
        digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def _commit() -> str:
    commit = _output("git", "rev-parse", "--short", "HEAD")
    if commit is None:
        return f"unknown (sources {_sources()})"
    changed = _output("git", "status", "--porcelain", "csrc", "ueo_fast")
    return f"{commit} with changes (sources {_sources()})" if changed else commit


def _nvcc() -> str:
    text = _output(os.environ.get("CUDACXX", "nvcc"), "--version") or ""
    releases = [line.split("release ")[1].split(",")[0] for line in text.splitlines()
                if "release " in line]  # fmt: skip
    return releases[0] if releases else "not found"


def _triton() -> str:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _gpu(device: torch.device) -> dict[str, str]:
    if device.type == "cpu":
        return {"gpu": "none: a dry run"} | dict.fromkeys(("driver", "multiprocessors", "L2"), "-")
    properties = torch.cuda.get_device_properties(device)
    query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {
        "gpu": properties.name,
        "driver": (_output(*query) or "unknown").splitlines()[0],
        "multiprocessors": str(properties.multi_processor_count),
        "L2": f"{properties.L2_cache_size / 2**20:.0f} MiB",
    }


def describe_gpu(device: torch.device, **more: str) -> dict[str, str]:
    """As :func:`describe`, for a result from ``device``."""
    return {
        "date": datetime.date.today().isoformat(),
        **_gpu(device),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _triton(),
        "nvcc": _nvcc(),
        "ueo_fast": ueo_fast.__version__,
        "commit": _commit(),
        **more,
    }
