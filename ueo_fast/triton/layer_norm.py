"""Layer normalisation in Triton: one launch forward, one or (sums) two backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor

from ueo_fast.triton import layer_norm_kernels as kernels
from ueo_fast.triton.affine_tuning import layer_norm_backward_plan
from ueo_fast.triton.autotune import with_best_plan
from ueo_fast.triton.channel_affine import add_partials
from ueo_fast.triton.launch import DTYPES, compute_dtype, on_device, processors_of, split
from ueo_fast.triton.tuning import Plan


def _check_rows(x: Tensor) -> None:
    if x.ndim != 2:
        raise RuntimeError(f"ueo_fast: x must have shape (rows, columns), got {tuple(x.shape)}")
    if x.dtype not in DTYPES:
        raise RuntimeError("ueo_fast: x must be float64, float32, float16 or bfloat16")


def _adjacent(x: Tensor) -> Tensor:
    """With adjacent columns: others are copied once."""
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def _check_vector(name: str, vector: Tensor | None, x: Tensor, size: int) -> Tensor | None:
    if vector is None:
        return None
    same = vector.dtype == compute_dtype(x) and vector.device == x.device
    if vector.shape != (size,) or not same:
        raise RuntimeError(
            f"ueo_fast: {name} must have shape ({size},), the compute dtype and x's device"
        )
    return vector.contiguous()


@on_device
def layer_norm_forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """out (rows, columns) contiguous, and mean and 1 / deviation (rows,) in the compute dtype.

    Args:
        x: (rows, columns), float64, float32, float16 or bfloat16.
        weight, bias: (columns,) in the compute dtype, or None.
        eps: added to the variance.
    """
    _check_rows(x)
    rows, columns = x.shape
    weight = _check_vector("weight", weight, x, columns)
    bias = _check_vector("bias", bias, x, columns)
    out = x.new_empty(rows, columns)
    if x.numel() == 0:
        nothing = x.new_zeros(rows, dtype=compute_dtype(x))
        return out, nothing, nothing.clone()
    x = _adjacent(x)
    mean = x.new_empty(rows, dtype=compute_dtype(x))
    rstd = torch.empty_like(mean)

    def run(plan: Plan) -> None:
        kernel = kernels.forward_tiled_kernel if plan.tiled else kernels.forward_kernel
        kernel[(triton.cdiv(rows, plan.block_rows),)](
            x,
            weight,
            bias,
            out,
            mean,
            rstd,
            rows,
            columns,
            x.stride(0),
            *split(eps),
            ROWS=plan.block_rows,
            COLUMNS=plan.block_columns,
            num_warps=plan.warps,
        )

    shape, processors = (rows, columns), processors_of(x.device)
    with_best_plan("layer_norm_forward", x.device, shape, x.dtype, processors, run)
    return out, mean, rstd


@on_device
def layer_norm_backward(
    grad_out: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    needs_x: bool,
    needs_sums: bool,
) -> tuple[Tensor, Tensor]:
    """grad_x (rows, columns) contiguous and sums (2, columns); (0,) for what is not needed.

    Args:
        grad_out, x: (rows, columns) in the same dtype.
        mean, rstd: (rows,), from forward.
        weight: (columns,) in the compute dtype, or None.
        needs_x, needs_sums: what to compute.
    """
    _check_rows(x)
    rows, columns = x.shape
    if grad_out.shape != x.shape or grad_out.dtype != x.dtype or grad_out.device != x.device:
        raise RuntimeError("ueo_fast: grad_out must have the shape, dtype and device of x")
    weight = _check_vector("weight", weight, x, columns)
    means = _check_vector("mean", mean, x, rows)
    rstds = _check_vector("rstd", rstd, x, rows)
    grad_x = x.new_empty(rows, columns) if needs_x else x.new_empty(0)
    if x.numel() == 0 or not (needs_x or needs_sums):
        return grad_x, mean.new_zeros(2, columns) if needs_sums else mean.new_empty(0)
    x, grad_out = _adjacent(x), _adjacent(grad_out)

    def run(plan: Plan) -> Tensor:
        plan = layer_norm_backward_plan(plan, rows)
        partials = mean.new_empty(plan.chunks, 2, columns) if needs_sums else None
        kernel = kernels.backward_tiled_kernel if plan.tiled else kernels.backward_kernel
        kernel[(plan.chunks,)](
            grad_out,
            x,
            means,
            rstds,
            weight,
            grad_x if needs_x else None,
            partials,
            rows,
            columns,
            grad_out.stride(0),
            x.stride(0),
            plan.chunk_rows,
            ROWS=plan.block_rows,
            COLUMNS=plan.block_columns,
            num_warps=plan.warps,
        )
        if partials is None:
            return mean.new_empty(0)
        if plan.chunks == 1:
            return partials[0]
        sums = torch.empty_like(partials[0])
        add_partials(partials, sums[0], sums[1])
        return sums

    shape, processors = (rows, columns), processors_of(x.device)
    sums = with_best_plan("layer_norm_backward", x.device, shape, x.dtype, processors, run)
    return grad_x, sums


KERNELS: dict[str, Callable[..., Any]] = {
    "layer_norm_forward": layer_norm_forward,
    "layer_norm_backward": layer_norm_backward,
}
"""Each op by its name, called by position with the arguments of its fake (ueo_fast/ops)."""
