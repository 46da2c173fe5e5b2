"""What a result must say about where it was made."""

from __future__ import annotations

import datetime
import platform
from pathlib import Path

import torch

import ueo_fast
from ueo_fast.backends import cpu_capability


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def describe(**more: str) -> dict[str, str]:
    """Machine, versions and date, then whatever else is given."""
    return {
        "date": datetime.date.today().isoformat(),
        "processor": _processor(),
        "instruction set": str(cpu_capability()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "ueo_fast": ueo_fast.__version__,
        **more,
    }
