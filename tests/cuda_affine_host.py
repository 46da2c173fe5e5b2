"""The affine ops on CPU tensors: their CUDA kernels on the host (tests/cpp/cuda_host)."""

from __future__ import annotations

from typing import Any

import cuda_host_build
import pytest
import torch
from loss_backends import SMALL_GPU, host_array
from torch import Tensor
from truth import HALF_ROUNDING, HALF_TINY

from ueo_fast.reference import compute_dtype


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _empty_as(x: Tensor, needed: bool = True) -> Tensor:
    """Not initialised: NaN shows where a kernel leaves something out."""
    return torch.full_like(x, torch.nan) if needed else x.new_empty(0)


def _numbers(x: Tensor, *shape: int) -> Tensor:
    return torch.full(shape, torch.nan, dtype=compute_dtype(x.dtype))


def _contiguous(values: Tensor | None) -> Any:
    return None if values is None else host_array(values.detach().contiguous())


def _rows(x: Tensor) -> Tensor:
    adjacent = x.stride(1) == 1 or x.shape[1] == 1
    return x.detach() if adjacent else x.detach().contiguous()


class CudaAffineHost:
    """The ops as csrc/cuda/channel_affine.cpp and layer_norm.cpp have them.

    Args:
        properties: of the made-up GPU, where it differs from ``loss_backends.SMALL_GPU``.
    """

    launches: int
    """Of the latest channel_affine."""

    def __init__(self, **properties: Any) -> None:
        self.module = cuda_host_build.cuda_affine_on_host()
        self.device = self.module.Device(**(SMALL_GPU | properties))

    def channel_affine_forward(
        self,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor | None,
        var: Tensor | None,
        eps: float,
        residual: Tensor | None,
        dim: int,
        relu: bool,
    ) -> tuple[Tensor, Tensor]:
        out = _empty_as(x)
        with_bits = relu and residual is not None
        bits = torch.full(((x.numel() + 7) // 8 if with_bits else 0,), 0xFF, dtype=torch.uint8)
        if x.numel() == 0:
            return out, bits
        self.launches = self.module.channel_affine_forward(
            self.device,
            self.module.channel_layout(x.shape, x.stride(), dim),
            _name(x.dtype),
            host_array(x.detach()),
            [_contiguous(values) for values in (weight, bias, mean, var)],
            eps,
            host_array(None if residual is None else residual.detach()),
            relu,
            host_array(out),
            host_array(bits) if with_bits else None,
        )
        return out, bits

    def channel_affine_backward(
        self,
        grad_out: Tensor,
        x: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor | None,
        var: Tensor | None,
        eps: float,
        bits: Tensor,
        dim: int,
        relu: bool,
        needs_x: bool,
        needs_weight: bool,
        needs_bias: bool,
        needs_residual: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        grad_x = _empty_as(grad_out, needs_x)
        grad_residual = _empty_as(grad_out, needs_residual)
        grad_weight, grad_bias = (
            _empty_as(values) if needed and values is not None else grad_out.new_empty(0)
            for values, needed in ((weight, needs_weight), (bias, needs_bias))
        )
        if grad_out.numel() == 0:
            return grad_x, grad_weight.zero_(), grad_bias.zero_(), grad_residual
        self.launches = self.module.channel_affine_backward(
            self.device,
            self.module.channel_layout(grad_out.shape, grad_out.stride(), dim),
            _name(grad_out.dtype),
            host_array(grad_out.detach()),
            host_array(None if x is None else x.detach()),
            [_contiguous(values) for values in (weight, bias, mean, var)],
            eps,
            host_array(bits) if relu and bits.numel() else None,
            relu,
            host_array(grad_x) if needs_x else None,
            host_array(grad_weight) if needs_weight else None,
            host_array(grad_bias) if needs_bias else None,
            host_array(grad_residual) if needs_residual else None,
        )
        return grad_x, grad_weight, grad_bias, grad_residual

    def layer_norm_forward(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        out = torch.full(x.shape, torch.nan, dtype=x.dtype)
        mean, rstd = _numbers(x, x.shape[0]), _numbers(x, x.shape[0])
        if x.numel() == 0:
            return out, mean.zero_(), rstd.zero_()
        self.module.layer_norm_forward(
            self.device,
            _name(x.dtype),
            host_array(_rows(x)),
            _contiguous(weight),
            _contiguous(bias),
            eps,
            *map(host_array, (out, mean, rstd)),
        )
        return out, mean, rstd

    def layer_norm_backward(
        self,
        grad_out: Tensor,
        x: Tensor,
        mean: Tensor,
        rstd: Tensor,
        weight: Tensor | None,
        needs_x: bool,
        needs_sums: bool,
    ) -> tuple[Tensor, Tensor]:
        grad_x = torch.full(x.shape if needs_x else (0,), torch.nan, dtype=x.dtype)
        sums = _numbers(x, *((2, x.shape[1]) if needs_sums else (0,)))
        if x.numel() == 0:
            return grad_x, sums.zero_()
        self.module.layer_norm_backward(
            self.device,
            _name(x.dtype),
            host_array(_rows(grad_out)),
            host_array(_rows(x)),
            _contiguous(mean),
            _contiguous(rstd),
            _contiguous(weight),
            host_array(grad_x) if needs_x else None,
            host_array(sums) if needs_sums else None,
        )
        return grad_x, sums


def kernels(name: str) -> Any:
    """The op of this name, for ``Ops.define_in_python``."""
    return getattr(CudaAffineHost(), name)


# ---- What the tests of both ops share ------------------------------------------------------------

DTYPES = {torch.float32: 4, torch.float64: 8, torch.float16: 2, torch.bfloat16: 2}
TOLERANCE = {torch.float64: 1e-14, torch.float32: 5e-7}
"""Relative to the norm of the truth, which in float64 has an error of its own."""
KIB = 1 << 10
H100 = {"multiprocessors": 132, "l2_bytes": 50 << 20}
SMALLEST = {  # compute capability 8.6, 8.9, 12.0
    "multiprocessors": 20,
    "threads_per_multiprocessor": 1536,
    "shared_per_block": 99 * KIB,
    "shared_per_multiprocessor": 100 * KIB,
}

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def make_randn(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)


def as_close_as_eager(ours, eager, truth):
    """The rule of tests/truth.py; ``eager`` is computed in the compute dtype and not rounded."""
    assert ours.shape == truth.shape
    if ours.dtype == eager.dtype:
        error, theirs = ((value.double() - truth).norm() for value in (ours, eager))
        assert error <= theirs + TOLERANCE[ours.dtype] * truth.norm(), f"{error} > {theirs}"
        return
    allowed = HALF_ROUNDING[ours.dtype] * truth.abs() * 1.001 + HALF_TINY[ours.dtype]
    allowed += (eager.double() - truth).abs() + 1e-6 * truth.abs().amax()
    assert ((ours.double() - truth).abs() <= allowed).all()
