"""Which implementations can run, why the others cannot, and which one to take."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ueo_fast import _extension

BACKENDS = ("auto", "cpp", "reference")
CAPABILITIES = ("base", "avx2", "avx512")


def unavailable_reason(backend: str) -> str | None:
    """Why ``backend`` cannot run on this machine; None if it can."""
    return _extension.cpu_error if backend == "cpp" else None


def cpu_capability() -> str | None:
    """Instruction set of the C++ loops: base, avx2 or avx512; None without the library."""
    if _extension.cpu_error is not None:
        return None
    return CAPABILITIES[torch.ops.ueo_fast.cpu_capability()]


def _is_transformed(tensor: Tensor) -> bool:
    """Whether torch.func or forward-mode differentiation follows what happens to the tensor.

    They would take the compiled ops for constants: a silent derivative of 0.
    """
    if torch.compiler.is_compiling():
        return False
    wrapped: bool = torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    return wrapped or forward_ad._current_level >= 0


def choose(backend: str, tensor: Tensor) -> str:
    """The backend to run on ``tensor``: ``auto`` becomes the fastest one that can.

    Raises:
        ValueError: the name is unknown, or the backend does not serve the device.
        RuntimeError: an explicit backend cannot run; the message says why and what to install.
    """
    if backend == "reference":
        return backend
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is unknown: choose one of {', '.join(BACKENDS)}")
    on_cpu = tensor.device.type == "cpu"
    if backend == "auto":
        can_run = on_cpu and _extension.cpu_error is None and not _is_transformed(tensor)
        return "cpp" if can_run else "reference"
    if _extension.cpu_error is not None:
        raise RuntimeError(
            f"backend='cpp' cannot run: {_extension.cpu_error}; or use backend='auto'"
        )
    if not on_cpu:
        raise ValueError(
            f"backend='cpp' runs on the CPU, but logits are on {tensor.device}: "
            "move them with logits.cpu(), or use backend='auto'"
        )
    if _is_transformed(tensor):
        raise RuntimeError(
            "backend='cpp' has no rules for torch.func transforms and forward-mode "
            "differentiation: use backend='reference' or 'auto'"
        )
    return backend
