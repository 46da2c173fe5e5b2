"""Finds and loads the compiled libraries, and keeps the reason where one cannot be loaded."""

from __future__ import annotations

import json
from pathlib import Path

import torch

OLDEST_TORCH = (2, 10)
INTERFACE = 6
"""Of the ops that this Python code calls; kInterface in csrc/interface.h."""

REBUILD = "pip install --no-build-isolation -e . (in a clone), or reinstall the ueo_fast wheel"
_FOLDER = Path(__file__).parent


def _load(name: str, device: str) -> str | None:
    """Load ``ueo_fast/_<device>.so``; None on success, else why it could not be loaded."""
    path = _FOLDER / f"_{device}.so"
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if version < OLDEST_TORCH:
        oldest = ".".join(map(str, OLDEST_TORCH))
        return f"torch {torch.__version__} is older than {oldest}: upgrade torch"
    if not path.exists():
        return f"{path.name} was not built: {REBUILD}"
    try:
        torch.ops.load_library(str(path))
        interface = getattr(torch.ops.ueo_fast, name)()
    except (OSError, RuntimeError, AttributeError) as error:
        return f"{path.name} did not load ({error}): {REBUILD}"
    if interface != INTERFACE:
        return f"{path.name} was built from another version of the sources: {REBUILD}"
    return None


def _cuda_build() -> dict[str, str]:
    """What CMake wrote next to ``_cuda.so``: ``cuda`` (toolkit version) and ``architectures``."""
    path = _FOLDER / "_cuda.json"
    build: dict[str, str] = json.loads(path.read_text()) if path.exists() else {}
    return build


def _load_cuda() -> str | None:
    if cpu_error is not None:
        return f"it needs _cpu.so: {cpu_error}"  # which holds the schemas of all ops
    torch_cuda = torch.version.cuda
    built_for = cuda_build.get("cuda")
    if built_for is None:
        return (
            "_cuda.so was not built (an in-place build needs nvcc and a GPU; with CUDA=1 nvcc "
            f"alone): {REBUILD}"
        )
    if torch_cuda is None:
        return f"_cuda.so was built for CUDA {built_for}, torch {torch.__version__} without CUDA"
    if torch_cuda.split(".")[0] != built_for.split(".")[0]:
        return (
            f"_cuda.so was built for CUDA {built_for}, torch for CUDA {torch_cuda}: "
            f"rebuild it with a CUDA {torch_cuda.split('.')[0]} toolkit: {REBUILD}"
        )
    return _load("cuda_interface_number", "cuda")


cpu_error: str | None = _load("interface_number", "cpu")
"""Why the CPU library is not there; None if it is."""

cuda_build = _cuda_build()
"""Toolkit and architectures of the CUDA library; empty if it was not built."""

cuda_error: str | None = _load_cuda()
"""Why the CUDA library is not there; None if it is. Says nothing about the presence of a GPU."""
