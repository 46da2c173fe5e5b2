"""What this installation is and what it can do: `ueo-fast info`, `python -m ueo_fast.info`."""

from __future__ import annotations

import importlib.metadata
import os
import platform

import torch

import ueo_fast
from ueo_fast import _extension, backends

_OPTIONAL = ("open_clip_torch", "torchvision", "triton", "scikit-learn", "numpy")
_CAPABILITY_VARIABLE = "UEO_FAST_CPU_CAPABILITY"


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _capability() -> str:
    chosen = backends.cpu_capability()
    if chosen is None:
        return "none: the C++ library could not be loaded"
    wanted = os.environ.get(_CAPABILITY_VARIABLE)
    if not wanted or wanted == chosen:
        return chosen
    if wanted in backends.CAPABILITIES:
        return f"{chosen} ({_CAPABILITY_VARIABLE}={wanted}, but this machine cannot run it)"
    known = ", ".join(backends.CAPABILITIES)
    return f"{chosen} ({_CAPABILITY_VARIABLE}={wanted} ignored: not one of {known})"


def _cuda_library() -> str:
    build = _extension.cuda_build
    if not build:
        return "not built"
    return f"built with CUDA {build['cuda']} for {build['architectures']}"


def _automatic() -> str:
    devices = ["cpu"] + ["cuda"] * torch.cuda.is_available()
    chosen = {device: backends.choose("auto", torch.empty(0, device=device)) for device in devices}
    return ", ".join(f"{backend} on {device}" for device, backend in chosen.items())


def collect() -> dict[str, str]:
    """Names and values, in the order in which they are printed."""
    facts = {
        "ueo_fast": ueo_fast.__version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        "torch CUDA": torch.version.cuda or "built without CUDA",
    }
    facts |= {name: _version(name) for name in _OPTIONAL}
    facts["CUDA library"] = _cuda_library()
    facts["threads"] = str(torch.get_num_threads())
    facts["instruction set"] = _capability()
    facts["devices"] = ", ".join(
        ["cpu"] + [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    )
    for backend in backends.names():
        if backend == "auto":
            facts["backend auto"] = _automatic()
        else:
            reason = backends.unavailable_reason(backend)
            facts[f"backend {backend}"] = "ready" if reason is None else f"unavailable: {reason}"
    return facts


def main() -> int:
    facts = collect()
    width = max(map(len, facts))
    for name, value in facts.items():
        print(f"{name:{width}}  {value}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
