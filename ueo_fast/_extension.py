"""Finds and loads the compiled libraries, and keeps the reason where one cannot be loaded."""

from __future__ import annotations

from pathlib import Path

import torch

OLDEST_TORCH = (2, 10)
INTERFACE = 1
"""Of the ops that this Python code calls; kInterface in csrc/cpu/ueo_loss.cpp."""

REBUILD = "pip install --no-build-isolation -e . (in a clone), or reinstall the ueo_fast wheel"


def _load(name: str) -> str | None:
    """Load ``ueo_fast/<name>.so``; None on success, else why it could not be loaded."""
    path = Path(__file__).parent / f"{name}.so"
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if version < OLDEST_TORCH:
        oldest = ".".join(map(str, OLDEST_TORCH))
        return f"torch {torch.__version__} is older than {oldest}: upgrade torch"
    if not path.exists():
        return f"{path.name} was not built: {REBUILD}"
    try:
        torch.ops.load_library(str(path))
        interface = torch.ops.ueo_fast.interface_number()
    except (OSError, RuntimeError, AttributeError) as error:
        return f"{path.name} did not load ({error}): {REBUILD}"
    if interface != INTERFACE:
        return f"{path.name} was built from another version of the sources: {REBUILD}"
    return None


cpu_error: str | None = _load("_cpu")
"""Why the CPU library is not there; None if it is."""
