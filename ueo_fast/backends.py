"""Which implementations can run, why the others cannot, and which one to take."""

from __future__ import annotations

import torch

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


def choose(backend: str, device: torch.device) -> str:
    """The backend to run on ``device``: ``auto`` becomes the fastest one that can.

    Raises:
        ValueError: the name is unknown, or the backend does not serve the device.
        RuntimeError: an explicit backend cannot run; the message says why and what to install.
    """
    if backend == "auto":
        return "cpp" if device.type == "cpu" and _extension.cpu_error is None else "reference"
    if backend == "reference":
        return backend
    if backend != "cpp":
        raise ValueError(f"backend={backend!r} is unknown: choose one of {', '.join(BACKENDS)}")
    reason = unavailable_reason(backend)
    if reason is not None:
        raise RuntimeError(f"backend='cpp' cannot run: {reason}; or use backend='auto'")
    if device.type != "cpu":
        raise ValueError(
            f"backend='cpp' runs on the CPU, but logits are on {device}: "
            "move them with logits.cpu(), or use backend='auto'"
        )
    return backend
