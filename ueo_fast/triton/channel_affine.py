"""Scale and shift per channel in Triton: one launch forward, backward one or (sums) two."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor

from ueo_fast.triton import channel_affine_kernels as kernels
from ueo_fast.triton.affine_tuning import AFFINE, flat_groups, make_affine_plan
from ueo_fast.triton.launch import DTYPES, compute_dtype, on_device, processors_of
from ueo_fast.triton.tuning import TUNING


def memory_shape(x: Tensor, dim: int) -> tuple[int, int, int]:
    """(outer, channels, inner) in the order of memory, of a dense x with channels in ``dim``."""
    if x.dtype not in DTYPES:
        raise RuntimeError("ueo_fast: x must be float64, float32, float16 or bfloat16")
    if not -x.ndim <= dim < x.ndim:
        raise RuntimeError(f"ueo_fast: dim={dim} is not a dimension of {tuple(x.shape)}")
    channels = x.shape[dim]
    if x.numel() == 0:
        return 0, channels, 0
    adjacent = 1
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1 and stride != adjacent:
            raise RuntimeError("ueo_fast: x must fill its memory without gaps")
        adjacent *= size if size > 1 else 1
    if channels == 1:  # its stride says nothing
        return 1, 1, x.numel()
    inner = x.stride(dim)
    return x.numel() // (channels * inner), channels, inner


def _check_channels(x: Tensor, channels: int, **values: Tensor) -> None:
    dtype = compute_dtype(x)
    for name, value in values.items():
        if value.shape != (channels,) or value.dtype != dtype or value.device != x.device:
            raise RuntimeError(
                f"ueo_fast: {name} must have shape ({channels},), the compute dtype and x's device"
            )


def _check_like(name: str, tensor: Tensor, x: Tensor) -> None:
    """Refuses a tensor whose elements do not lie in the order of those of x."""
    same = tensor.shape == x.shape and tensor.dtype == x.dtype and tensor.device == x.device
    strides = zip(tensor.stride(), x.stride(), tensor.shape, strict=False)
    if not same or any(mine != other for mine, other, size in strides if size > 1):
        raise RuntimeError(f"ueo_fast: {name} must have the shape, strides and dtype of x")


def add_partials(partials: Tensor) -> Tensor:
    """Sums (2, n) in a fixed order of partial sums (chunks, 2, n), n > 0."""
    chunks, columns = partials.shape[0], partials[0].numel()
    if chunks == 1:
        return partials[0]
    few = chunks <= TUNING.finish_few_chunks
    tile_chunks = TUNING.finish_few_chunks if few else TUNING.finish_chunks
    tile_columns = TUNING.finish_few_columns if few else TUNING.finish_columns
    sums = torch.empty_like(partials[0])
    kernels.finish_sums_kernel[(triton.cdiv(columns, tile_columns),)](
        partials,
        sums,
        chunks,
        columns,
        CHUNKS=tile_chunks,
        COLUMNS=tile_columns,
        num_warps=TUNING.finish_warps,
    )
    return sums


@on_device
def channel_affine_forward(
    x: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None, dim: int, relu: bool
) -> tuple[Tensor, Tensor]:
    """out in the layout of x, and with relu and a residual a bit per element, else (0,).

    Args:
        x: dense, float64, float32, float16 or bfloat16.
        scale, shift: (channels,) in the compute dtype.
        residual: as x, or None.
        dim: of the channels.
        relu: whether what is not positive becomes 0.
    """
    _, channels, inner = memory_shape(x, dim)
    _check_channels(x, channels, scale=scale, shift=shift)
    if residual is not None:
        _check_like("residual", residual, x)
    elements = x.numel()
    out = torch.empty_like(x)
    keeps_bits = relu and residual is not None
    size = triton.cdiv(elements, AFFINE.bits_per_byte) if keeps_bits else 0
    bits = torch.empty(size, dtype=torch.uint8, device=x.device)
    if elements == 0:
        return out, bits
    groups = flat_groups(x.dtype == torch.float64)
    block = groups * AFFINE.bits_per_byte
    kernels.forward_kernel[(triton.cdiv(elements, block),)](
        x,
        residual,
        scale.contiguous(),
        shift.contiguous(),
        out,
        bits if keeps_bits else None,
        elements,
        channels,
        inner,
        RELU=relu,
        SHORT=inner < block,
        NARROW=channels < block,
        GROUPS=groups,
        num_warps=AFFINE.warps,
    )
    return out, bits


@on_device
def channel_affine_backward(
    grad_out: Tensor,
    x: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    center: Tensor,
    bits: Tensor,
    dim: int,
    relu: bool,
    needs_x: bool,
    needs_sums: bool,
    needs_residual: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """grad_x, sums (2, channels) and grad_residual; (0,) for what is not needed.

    Args:
        grad_out: dense, in the layout of x.
        x: forward's, or None where neither sums nor the mask need it.
        scale, shift, center: (channels,) in the compute dtype.
        bits: forward's mask, or (0,).
        dim: of the channels.
        relu: whether the gradient stops where out is not positive.
        needs_x, needs_sums, needs_residual: what to compute.
    """
    outer, channels, inner = memory_shape(grad_out, dim)
    _check_channels(grad_out, channels, scale=scale, shift=shift, center=center)
    if x is not None:
        _check_like("x", x, grad_out)
    elements = grad_out.numel()
    has_bits = relu and bits.numel() > 0
    if has_bits and (
        bits.numel() != triton.cdiv(elements, AFFINE.bits_per_byte)
        or bits.dtype != torch.uint8
        or not bits.is_contiguous()
    ):
        raise RuntimeError("ueo_fast: bits must be those of channel_affine_forward")
    from_x = relu and not has_bits
    if x is None and (needs_sums or from_x) and elements > 0:
        raise RuntimeError("ueo_fast: x is needed for sums, and for relu without bits")
    grad_x = torch.empty_like(grad_out) if needs_x else grad_out.new_empty(0)
    grad_residual = torch.empty_like(grad_out) if needs_residual else grad_out.new_empty(0)
    if elements == 0 or not (needs_x or needs_sums or needs_residual):
        sums = scale.new_zeros(2, channels) if needs_sums else scale.new_empty(0)
        return grad_x, sums, grad_residual

    double = grad_out.dtype == torch.float64
    plan = make_affine_plan(outer, channels, inner, double, processors_of(grad_out.device))
    inner_tiles = triton.cdiv(inner, plan.inner)
    partials = scale.new_empty(plan.chunks, 2, channels) if needs_sums else None
    kernels.backward_kernel[(plan.chunks * plan.channel_tiles,)](
        grad_out,
        x if needs_sums or from_x else None,
        scale.contiguous(),
        shift.contiguous() if from_x else None,
        center.contiguous() if needs_sums else None,
        bits if has_bits else None,
        grad_x if needs_x else None,
        grad_residual if needs_residual else None,
        partials,
        outer,
        channels,
        inner // plan.unit,
        plan.channel_tiles,
        inner_tiles,
        triton.cdiv(outer, plan.outer) * inner_tiles,
        plan.chunk_tiles,
        FROM_X=from_x,
        UNIT=plan.unit,
        OUTER=plan.outer,
        CHANNELS=plan.channels,
        INNER=plan.inner,
        num_warps=plan.warps,
    )
    sums = scale.new_empty(0) if partials is None else add_partials(partials)
    return grad_x, sums, grad_residual


KERNELS: dict[str, Callable[..., Any]] = {
    "channel_affine_forward": channel_affine_forward,
    "channel_affine_backward": channel_affine_backward,
}
"""Each op by its name, called by position with the arguments of its fake (ueo_fast/ops)."""
