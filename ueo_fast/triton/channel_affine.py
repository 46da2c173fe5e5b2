"""Scale and shift per channel in Triton: one launch forward, backward one or (sums) two."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor

from ueo_fast.triton import channel_affine_kernels as kernels
from ueo_fast.triton.affine_tuning import AFFINE, flat_groups, make_affine_plan
from ueo_fast.triton.launch import DTYPES, compute_dtype, on_device, processors_of, split
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


def _parameters(
    x: Tensor,
    channels: int,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    eps: float,
) -> tuple[Any, ...]:
    """As the kernels take them."""
    dtypes = x.dtype, compute_dtype(x)
    given = {"weight": weight, "bias": bias, "mean": mean, "var": var}
    for name, value in given.items():
        if value is None:
            continue
        if value.shape != (channels,) or value.dtype not in dtypes or value.device != x.device:
            raise RuntimeError(
                f"ueo_fast: {name} must have shape ({channels},), x's device, and its dtype or "
                "the compute dtype"
            )
    adjacent = (None if value is None else value.contiguous() for value in given.values())
    return *adjacent, *split(eps)


def _check_like(name: str, tensor: Tensor, x: Tensor) -> None:
    """Refuses a tensor whose elements do not lie in the order of those of x."""
    same = tensor.shape == x.shape and tensor.dtype == x.dtype and tensor.device == x.device
    strides = zip(tensor.stride(), x.stride(), tensor.shape, strict=False)
    if not same or any(mine != other for mine, other, size in strides if size > 1):
        raise RuntimeError(f"ueo_fast: {name} must have the shape, strides and dtype of x")


def add_partials(
    partials: Tensor,
    first: Tensor | None,
    second: Tensor | None,
    var: Tensor | None = None,
    eps_high: float = 0.0,
    eps_low: float = 0.0,
) -> None:
    """Adds partial sums (chunks, 2, n), n > 0, up in a fixed order.

    Args:
        partials: of both sums.
        first, second: (n,), or None: where the sums go.
        var, eps_high, eps_low: what the second sum is then divided by the root of.
    """
    chunks, _, columns = partials.shape
    few = chunks <= TUNING.finish_few_chunks
    tile_chunks = TUNING.finish_few_chunks if few else TUNING.finish_chunks
    tile_columns = TUNING.finish_few_columns if few else TUNING.finish_columns
    kernels.finish_sums_kernel[(triton.cdiv(2 * columns, tile_columns),)](
        partials,
        first,
        second,
        var,
        eps_high,
        eps_low,
        chunks,
        columns,
        CHUNKS=tile_chunks,
        COLUMNS=tile_columns,
        num_warps=TUNING.finish_warps,
    )


@on_device
def channel_affine_forward(
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
    """out in the layout of x, and with relu and a residual a bit per element, else (0,).

    Args:
        x: dense, float64, float32, float16 or bfloat16.
        weight, bias, mean, var: (channels,), in the dtype of x or the compute dtype, or None.
        eps: added to the variance.
        residual: as x, or None.
        dim: of the channels.
        relu: whether what is not positive becomes 0.
    """
    _, channels, inner = memory_shape(x, dim)
    parameters = _parameters(x, channels, weight, bias, mean, var, eps)
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
        *parameters,
        out,
        bits if keeps_bits else None,
        elements,
        channels,
        inner,
        RELU=relu,
        SHORT=inner < block,
        NARROW=channels < block,
        ALIGNED=inner % AFFINE.bits_per_byte == 0,
        GROUPS=groups,
        num_warps=AFFINE.warps,
    )
    return out, bits


@on_device
def channel_affine_backward(
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
    """grad_x, grad_weight, grad_bias and grad_residual; (0,) for what is not needed.

    Args:
        grad_out: dense, in the layout of x.
        x: forward's, or None where neither sums nor the mask need it.
        weight, bias, mean, var, eps: forward's.
        bits: forward's mask, or (0,).
        dim: of the channels.
        relu: whether the gradient stops where out is not positive.
        needs_x, needs_weight, needs_bias, needs_residual: what to compute.
    """
    outer, channels, inner = memory_shape(grad_out, dim)
    weights, biases, means, variances, *split_eps = _parameters(
        grad_out, channels, weight, bias, mean, var, eps
    )
    needs_sums = needs_weight or needs_bias
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
    grad_weight, grad_bias = (
        grad_out.new_empty(0) if values is None or not needed else values.new_empty(channels)
        for values, needed in ((weight, needs_weight), (bias, needs_bias))
    )
    if elements == 0 or not (needs_x or needs_sums or needs_residual):
        return grad_x, grad_weight.zero_(), grad_bias.zero_(), grad_residual

    double = grad_out.dtype == torch.float64
    plan = make_affine_plan(outer, channels, inner, double, processors_of(grad_out.device))
    inner_tiles = triton.cdiv(inner, plan.inner)
    shape, dtype = (plan.chunks, 2, channels), compute_dtype(grad_out)
    partials = grad_out.new_empty(shape, dtype=dtype) if needs_sums else None
    kernels.backward_kernel[(plan.chunks * plan.channel_tiles,)](
        grad_out,
        x if needs_sums or from_x else None,
        weights if needs_x or from_x else None,
        biases if from_x else None,
        means if needs_sums or from_x else None,
        variances if needs_x or from_x else None,
        *split_eps,
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
    if partials is not None:
        add_partials(
            partials,
            grad_bias if needs_bias else None,
            grad_weight if needs_weight else None,
            variances,
            *split_eps,
        )
    return grad_x, grad_weight, grad_bias, grad_residual


KERNELS: dict[str, Callable[..., Any]] = {
    "channel_affine_forward": channel_affine_forward,
    "channel_affine_backward": channel_affine_backward,
}
"""Each op by its name, called by position with the arguments of its fake (ueo_fast/ops)."""
