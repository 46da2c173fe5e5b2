"""The backends that the loss's tests run on, and what some of them are spared.

``cuda_host`` is a backend of the tests: the CUDA kernels on the host (tests/cpp/cuda_host), for a
small GPU that is made up here. ``triton`` runs on its interpreter where there is no GPU
(tests/conftest.py sees to it).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import cuda_host_build
import pytest
import torch
from torch import Tensor

from ueo_fast import backends
from ueo_fast.ops import ueo_loss as op
from ueo_fast.reference import compute_dtype


class LossBackend(str):
    """A backend's name, as ``ueo_loss`` takes it, and the device that tests give it tensors on."""

    device: str

    def __new__(cls, name: str, device: str) -> LossBackend:
        backend = super().__new__(cls, name)
        backend.device = device
        return backend

    @property
    def ops(self) -> Any:
        """Its ops, as ``torch.ops.<namespace>``."""
        return getattr(torch.ops, (backends.COMPILED | {"cuda_host": CUDA_HOST})[self].namespace)


def shrink(tensor: Tensor, left: int = 0) -> Tensor:
    """A copy whose storage then loses all but ``left`` bytes, as FSDP frees a parameter's."""
    copy = tensor.detach().clone()
    copy.untyped_storage().resize_(left)
    return copy


# ---- cuda_host -----------------------------------------------------------------------------------

SMALL_GPU = {
    "multiprocessors": 8,
    "threads_per_multiprocessor": 2048,
    "shared_per_block": 227 << 10,
    "shared_per_multiprocessor": 228 << 10,
    "l2_bytes": 1 << 20,  # so that a gradient above it is stored past the cache
}


def host_array(tensor: Tensor | None) -> Any:
    """The tensor's memory as a numpy array, half and bfloat16 as 16-bit patterns."""
    if tensor is None:
        return None
    half = tensor.dtype in (torch.float16, torch.bfloat16)
    return (tensor.view(torch.int16) if half else tensor).numpy()


def _logits(logits: Tensor) -> tuple[Tensor, str]:
    """With adjacent columns, as csrc/logits.h does it; and the dtype's name."""
    adjacent = logits.stride(1) == 1 or logits.shape[1] == 1
    name = str(logits.dtype).removeprefix("torch.")
    return logits.detach() if adjacent else logits.detach().contiguous(), name


def _empty(logits: Tensor, *shape: int) -> Tensor:
    """Not initialised: NaN shows where a kernel leaves something out."""
    return torch.full(shape, torch.nan, dtype=compute_dtype(logits.dtype))


def _contiguous(weights: Tensor | None) -> Any:
    return None if weights is None else host_array(weights.contiguous())


def _parts(saved: Tensor, logits: Tensor) -> tuple[Any, Any, Any]:
    """Summary, marginal and row statistics of one buffer: csrc/ueo_loss.h, ``Saved``."""
    rows, columns = logits.shape
    row_stats, marginal, summary = saved.split([rows * op.ROW_STATS, columns, op.SUMMARY])
    return host_array(summary), host_array(marginal), host_array(row_stats)


class CudaHost:
    """The ops on CPU tensors, for a GPU that has ``properties``."""

    def __init__(self, **properties: Any) -> None:
        self.module = cuda_host_build.cuda_on_host()
        self.device = self.module.Device(**(SMALL_GPU | properties))
        self.launches = 0
        """Of kernels, by all calls so far."""

    def ueo_loss_forward(
        self,
        logits: Tensor,
        confidence: Tensor | None,
        marginal_weights: Tensor | None,
        trade_off: float,
        confidence_scale: float,
        eps: float,
    ) -> tuple[Tensor, Tensor]:
        loss, saved = _empty(logits), _empty(logits, op.saved_size(*logits.shape))
        if logits.shape[0] == 0:
            return loss.zero_(), saved.zero_()
        logits, dtype = _logits(logits)
        weights = _contiguous(confidence), _contiguous(marginal_weights)
        options = trade_off, confidence_scale, eps
        outputs = host_array(loss), *_parts(saved, logits)
        self.launches += self.module.forward(
            self.device, host_array(logits), dtype, *weights, *options, *outputs
        )
        return loss, saved

    def ueo_loss_backward(
        self,
        grad_loss: Tensor,
        logits: Tensor,
        saved: Tensor,
        trade_off: float,
        eps: float,
    ) -> Tensor:
        grad = torch.full(logits.shape, torch.nan, dtype=logits.dtype)
        if logits.shape[0] == 0:
            return grad
        logits, dtype = _logits(logits)
        self.launches += self.module.backward(
            self.device,
            host_array(grad_loss.contiguous()),
            host_array(logits),
            dtype,
            *_parts(saved, logits),
            trade_off,
            eps,
            host_array(grad),
        )
        return grad

    def ueo_loss_and_grad(
        self,
        logits: Tensor,
        confidence: Tensor | None,
        marginal_weights: Tensor | None,
        trade_off: float,
        confidence_scale: float,
        eps: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        loss, saved = _empty(logits), _empty(logits, op.saved_size(*logits.shape))
        grad = torch.full(logits.shape, torch.nan, dtype=logits.dtype)
        if logits.shape[0] == 0:
            return loss.zero_(), saved.zero_(), grad
        logits, dtype = _logits(logits)
        weights = _contiguous(confidence), _contiguous(marginal_weights)
        options = trade_off, confidence_scale, eps
        summary, marginal, _ = _parts(saved, logits)  # those of the rows: scratch
        outputs = host_array(loss), summary, marginal, host_array(grad)
        self.launches += self.module.loss_and_grad(
            self.device, host_array(logits), dtype, *weights, *options, *outputs
        )
        return loss, saved, grad

    def max_softmax(self, logits: Tensor, scale: float) -> Tensor:
        out = _empty(logits, logits.shape[0])
        if logits.shape[0] > 0:
            logits, dtype = _logits(logits)
            self.launches += self.module.max_softmax(
                self.device, host_array(logits), dtype, scale, host_array(out)
            )
        return out


def _cuda_host_kernels(name: str) -> Callable[..., Any]:
    kernel: Callable[..., Any] = getattr(CudaHost(), name)
    return kernel


CUDA_HOST = backends.Backend("cuda_host", "cpu", "ueo_fast_cuda_host")
"""In ``backends.COMPILED``, at its end, only while a test runs on it: tests/conftest.py."""

op.OPS.define_in_python(CUDA_HOST.namespace, _cuda_host_kernels)


# ---- Which tests run on what ---------------------------------------------------------------------


def _device(name: str) -> str:
    on_gpu = name == "cuda" or (name == "triton" and not backends.is_triton_interpreted())
    return "cuda" if on_gpu else "cpu"


def backend_param(name: str) -> Any:
    reason = backends.unavailable_reason(name)
    brief = str(reason).split(":")[0].split(" (")[0]  # the whole is in `python -m ueo_fast.info`
    marks = [pytest.mark.skip(reason=f"{name}: {brief}")] if reason is not None else []
    return pytest.param(LossBackend(name, _device(name)), id=name, marks=marks)


COMPILED = [backend_param(name) for name in ("cpp", "cuda", "triton", "cuda_host")]
BACKENDS = [*COMPILED, backend_param("reference")]

SPARED_DTYPES = {("triton", torch.bfloat16): "the interpreter has no bfloat16"}
SPARED_TESTS = (
    # backend, pattern of the test's id, reason
    ("triton", r"\(70000, 7\)", "thousands of programs, a millisecond each on the interpreter"),
    (
        "triton",
        r"\(3, 50000\)-float",
        "test_triton_interpreter.py has rows of several tiles",
    ),
    ("triton", r"streamed_past_the_cache", "the interpreter has no cache"),
    ("cuda_host", r"refuse_what_would_read_foreign", "its ops are the tests' own, without checks"),
)
"""What a backend is spared where it runs without its GPU; on a GPU everything runs."""


def spared_reason(backend: LossBackend, test_id: str = "", *values: Any) -> str | None:
    """Why a test with these parameters is not run on ``backend`` here; None if it is."""
    if backend.device != "cpu":
        return None
    dtypes = [value for value in values if isinstance(value, torch.dtype)]
    reasons = [SPARED_DTYPES.get((str(backend), dtype)) for dtype in dtypes]
    reasons += [
        reason
        for name, pattern, reason in SPARED_TESTS
        if name == backend and re.search(pattern, test_id)
    ]
    return next((reason for reason in reasons if reason is not None), None)
