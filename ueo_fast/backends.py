"""Which implementations can run, why the others cannot, and which one to take."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import os
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from ueo_fast import _extension
from ueo_fast.ranges import check_one_of

CAPABILITIES = ("base", "avx2", "avx512")

OLDEST_TRITON = (3, 6)
"""The oldest whose compilation of every kernel was tested; PyTorch 2.10 and 2.11 install it."""
OLDEST_GPU = (8, 0)
"""Compute capability from which our GPU kernels run (asynchronous copies, bfloat16)."""


@dataclass(frozen=True)
class Backend:
    """One compiled implementation of the ops."""

    name: str
    device: str  # type of the tensors that it serves
    namespace: str  # of its ops below torch.ops


COMPILED = {
    backend.name: backend
    for backend in (  # the fastest first
        Backend("cpp", "cpu", "ueo_fast"),
        Backend("cuda", "cuda", "ueo_fast"),
        Backend("triton", "cuda", "ueo_fast_triton"),
    )
}


def names() -> tuple[str, ...]:
    """What users may ask for."""
    return ("auto", *COMPILED, "reference")


def is_triton_interpreted() -> bool:
    """Whether Triton kernels run as plain Python on the CPU (tests do that)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _triton_error() -> str | None:
    """Why Triton cannot be used; found out without importing it, which takes a while."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install triton"
    for distribution in ("triton", "triton-rocm", "pytorch-triton-rocm", "pytorch-triton"):
        try:
            version = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
        if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_TRITON:
            oldest = ".".join(map(str, OLDEST_TRITON))
            return f"Triton {version} is older than {oldest}: pip install -U {distribution}"
        break
    return None


triton_error: str | None = _triton_error()
"""Why Triton is not there; None if it is. A constant, so that torch.compile can follow."""


def _library_error(backend: str) -> str | None:
    """Why the code of ``backend`` is not there, whatever the device; None if it is."""
    if backend == "triton":
        return triton_error
    if backend == "cuda":
        return _extension.cuda_error
    return _extension.cpu_error if backend == "cpp" else None


@functools.lru_cache(maxsize=64)
def _device_error(backend: str, index: int) -> str | None:
    """Why the GPU cannot run the kernels; None if it can."""
    if torch.version.hip is not None:
        return None if backend == "triton" else "it is for NVIDIA GPUs, torch is built for ROCm"
    capability = torch.cuda.get_device_capability(index)
    if capability >= OLDEST_GPU:
        return None
    oldest, found = (".".join(map(str, version)) for version in (OLDEST_GPU, capability))
    return f"it needs a GPU of compute capability {oldest} or newer, cuda:{index} has {found}"


# What torch.compiler.assume_constant_result does, without importing the whole compiler for it: a
# graph need not know how the answer was found.
_device_error._dynamo_marked_constant = True  # type: ignore[attr-defined]


def unavailable_reason(backend: str) -> str | None:
    """Why ``backend`` cannot run on this machine; None if it can."""
    error = _library_error(backend)
    if error is not None or backend not in COMPILED or COMPILED[backend].device == "cpu":
        return error
    if backend == "triton" and is_triton_interpreted():
        return None
    if not torch.cuda.is_available():
        return "no GPU is present that torch can use (torch.cuda.is_available() is False)"
    return _device_error(backend, torch.cuda.current_device())


def cpu_capability() -> str | None:
    """Instruction set of the C++ loops: base, avx2 or avx512; None without the library."""
    if _extension.cpu_error is not None:
        return None
    return CAPABILITIES[torch.ops.ueo_fast.cpu_capability()]


def device_type(tensor: Tensor) -> str:
    """``tensor.device.type``, faster on the CPU: PyTorch makes a new string of the enum each time,
    which takes as long as the checks of a whole call."""
    return "cpu" if tensor.is_cpu else tensor.device.type


_is_functorch_wrapped = torch._C._functorch.is_functorch_wrapped_tensor


def is_transformed(*tensors: Tensor | None) -> bool:
    """Whether torch.func or forward-mode differentiation follows what happens to the tensors.

    They would take the compiled ops for constants: a silent derivative of 0.
    """
    if torch.compiler.is_compiling():
        return False
    if forward_ad._current_level >= 0:
        return True
    for tensor in tensors:  # noqa: SIM110 - a generator expression costs more than the checks
        if tensor is not None and _is_functorch_wrapped(tensor):
            return True
    return False


def check_memory(name: str, tensor: Tensor) -> None:
    """Refuse a tensor whose storage ends before its elements do, as ``csrc/checks.h`` does.

    For what PyTorch's own operations are to read: many of them crash on such a tensor.

    Raises:
        RuntimeError: the storage was freed or shrunk.
    """
    if torch.compiler.is_compiling():
        return
    try:
        held = tensor.untyped_storage().nbytes()
    except (RuntimeError, NotImplementedError):  # it wraps others, or is sparse
        return
    extent = tensor.numel()
    if not tensor.is_contiguous():
        extent = 1 + sum(
            (n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True)
        )
    needed = (tensor.storage_offset() + extent) * tensor.element_size()
    if needed <= held or tensor.numel() == 0 or not _owns_memory(tensor):
        return
    raise RuntimeError(
        f"{name} needs {needed} bytes of memory, but its storage holds {held}: it was freed or "
        "shrunk (untyped_storage().resize_, as FSDP does between uses); make the call while the "
        "tensor has its memory"
    )


def _owns_memory(tensor: Tensor) -> bool:
    """Whether it is a plain tensor: those of tracers and transforms stand for others."""
    if torch._is_functional_tensor(tensor) or is_transformed(tensor):
        return False
    return type(tensor) in (Tensor, nn.Parameter)


def _error(backend: str, device: torch.device) -> str | None:
    """Why ``backend``, which serves the device's type, cannot run there; None if it can."""
    error = _library_error(backend)
    if error is not None or COMPILED[backend].device == "cpu":
        return error
    return _device_error(
        backend, torch.cuda.current_device() if device.index is None else device.index
    )


def _automatic(tensor: Tensor, others: tuple[Tensor | None, ...]) -> str:
    if is_transformed(tensor, *others):
        return "reference"
    wanted = device_type(tensor)
    for name, backend in COMPILED.items():
        if backend.device == wanted and _error(name, tensor.device) is None:
            return name
    return "reference"


def choose(backend: str, tensor: Tensor, *others: Tensor | None, name: str = "logits") -> str:
    """The backend to run on ``tensor``: ``auto`` becomes the fastest one that can.

    ``others`` are arguments on the same device that may be differentiated too; ``name`` is what
    the user calls ``tensor``.

    Raises:
        ValueError: the name is unknown, or the backend does not serve the device.
        RuntimeError: an explicit backend cannot run; the message says why and what to install.
    """
    known = isinstance(backend, str)  # other objects may have no hash, or an == of their own
    if known and backend == "auto":
        return _automatic(tensor, others)
    if known and backend == "reference":
        return backend
    check_one_of("backend", backend, names())
    error = _library_error(backend)
    if error is not None:
        raise RuntimeError(f"backend={backend!r} cannot run: {error}; or use backend='auto'")
    found = device_type(tensor)
    wanted = COMPILED[backend].device
    interpreted = backend == "triton" and is_triton_interpreted() and found == "cpu"
    if found != wanted and not interpreted:
        raise ValueError(
            f"backend={backend!r} runs on {wanted} tensors, got {name} on {tensor.device}: "
            f"move with {name}.{wanted}(), or use backend='auto'"
        )
    if not interpreted and (error := _error(backend, tensor.device)) is not None:
        raise RuntimeError(f"backend={backend!r} cannot run: {error}; or use backend='auto'")
    if is_transformed(tensor, *others):
        raise RuntimeError(
            f"backend={backend!r} has no rules for torch.func transforms and forward-mode "
            "differentiation: use backend='reference' or 'auto'"
        )
    return backend
