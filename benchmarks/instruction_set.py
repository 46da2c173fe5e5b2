"""Measure as on a processor with a lower instruction set: ours, PyTorch and torch.compile.

`python -m benchmarks loss --instruction-set avx2` calls :func:`restrict`; every process that
measures inherits the environment and calls :func:`verify`.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

from ueo_fast.backends import CAPABILITIES, cpu_capability

RESTRICTIONS = {
    "avx2": {
        "UEO_FAST_CPU_CAPABILITY": "avx2",
        "ATEN_CPU_CAPABILITY": "avx2",  # PyTorch's kernels, and the vectors of torch.compile
        "TORCHINDUCTOR_CPP_MARCH": "x86-64-v3",  # instead of native: the rest of what it compiles
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    }
}
"""By name: environment variables that keep all contenders to an instruction set."""

AVX512 = {"avx512f", "avx512bw", "avx512vl", "avx512dq"}  # csrc/cpu/capability.cpp


def restrict(name: str) -> None:
    """Restrict processes that this one starts to an instruction set."""
    os.environ.update(RESTRICTIONS[name])


def verify() -> None:
    """Raise if PyTorch, torch.compile or ours would exceed UEO_FAST_CPU_CAPABILITY."""
    wanted = os.environ.get("UEO_FAST_CPU_CAPABILITY")
    if wanted not in RESTRICTIONS:
        return
    import torch._inductor.config as inductor
    from torch._inductor.cpu_vec_isa import pick_vec_isa

    found = {
        "ueo_fast": str(cpu_capability()),
        "PyTorch": torch.backends.cpu.get_cpu_capability().lower(),
        "torch.compile": str(pick_vec_isa()).split()[0],
        "torch.compile's -march": str(getattr(inductor.cpp, "march", "native")),
    }
    march = RESTRICTIONS[wanted]["TORCHINDUCTOR_CPP_MARCH"]
    others = [f"{key} {value}" for key, value in found.items() if value not in (wanted, march)]
    if others:
        raise RuntimeError(
            f"instruction set {wanted} was asked for, but this process runs {', '.join(others)}: "
            "use a processor that has it and the PyTorch of constraints.txt"
        )


def describe() -> str:
    """The instruction set in use and, if the processor has a higher one, that of the processor."""
    used = str(cpu_capability())
    flags: set[str] = set()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("flags"):
            flags = set(line.split(":", 1)[1].split())
            break
    best = "avx512" if flags >= AVX512 else "avx2" if flags >= {"avx2", "fma"} else "base"
    lower = used in CAPABILITIES and CAPABILITIES.index(used) < CAPABILITIES.index(best)
    return f"{used} (of a processor that has {best})" if lower else used
