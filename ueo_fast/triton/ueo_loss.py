"""The loss in Triton: two launches forward, one backward, no wait for the device."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor

from ueo_fast.triton import ueo_loss_kernels as held
from ueo_fast.triton import ueo_loss_tiled_kernels as tiled
from ueo_fast.triton.autotune import with_best_plan
from ueo_fast.triton.launch import DTYPES, compute_dtype, on_device, processors_of, split
from ueo_fast.triton.tuning import TUNING, Plan

ROW_STATS = 5  # ueo_loss_math.py says what they are
SUMMARY = 5
CHUNK_SUMS = 5


def _prepare(logits: Tensor) -> Tensor:
    """Logits (B, C) with adjacent columns: others are copied once."""
    if logits.ndim != 2 or logits.shape[1] == 0:
        raise RuntimeError(f"ueo_fast: logits must have shape (B, C), got {tuple(logits.shape)}")
    if logits.dtype not in DTYPES:
        raise RuntimeError("ueo_fast: logits must be float64, float32, float16 or bfloat16")
    return logits if logits.stride(1) == 1 or logits.shape[1] == 1 else logits.contiguous()


def _check_weights(name: str, weights: Tensor | None, logits: Tensor) -> Tensor | None:
    if weights is None:
        return None
    if weights.shape != logits.shape[:1]:
        raise RuntimeError(f"ueo_fast: {name} must have shape ({logits.shape[0]},)")
    if weights.dtype != compute_dtype(logits) or weights.device != logits.device:
        raise RuntimeError(f"ueo_fast: {name} must have the compute dtype and the logits' device")
    return weights.contiguous()


def _saved_size(logits: Tensor) -> int:
    """Numbers that forward keeps for backward: ``saved_parts`` in ueo_loss_math.py."""
    rows, columns = logits.shape
    return rows * ROW_STATS + columns + SUMMARY


def _check_saved(grad_loss: Tensor | None, logits: Tensor, saved: Tensor) -> None:
    """Refuses what backward would read beyond its end."""
    dtype = compute_dtype(logits)
    if grad_loss is not None and (grad_loss.ndim != 0 or grad_loss.dtype != dtype):
        raise RuntimeError("ueo_fast: grad_loss must be 0-d with the dtype of the loss")
    size = _saved_size(logits)
    if saved.shape != (size,) or saved.dtype != dtype or not saved.is_contiguous():
        raise RuntimeError(
            f"ueo_fast: saved must be that of ueo_loss_forward: {size} adjacent numbers in the "
            "dtype of the loss"
        )


def _tile(plan: Plan, logits: Tensor) -> dict[str, int]:
    """The tile of a kernel, as its compile-time parameters."""
    if not plan.tiled:
        return {"ROWS": plan.block_rows, "COLUMNS": plan.block_columns}
    # What Triton knows of a number is whether 16 divides it, and without that no vector is sure to
    # be aligned and inside the row.
    vector = logits.shape[1] % 16 == 0 and logits.stride(0) % 16 == 0
    wider = 2 if vector and logits.element_size() == 2 else 1
    return {
        "ROWS": plan.block_rows,
        "COLUMNS": plan.block_columns * wider,
        "SLOT": plan.slot * wider,
        "VECTOR": vector,
    }


def _forward_with(
    plan: Plan,
    logits: Tensor,
    confidence: Tensor | None,
    marginal_weights: Tensor | None,
    trade_off: float,
    confidence_scale: float,
    eps: float,
) -> tuple[Tensor, Tensor]:
    rows, columns = logits.shape
    loss = logits.new_empty((), dtype=compute_dtype(logits))
    saved = loss.new_empty(_saved_size(logits))
    finish_chunks, finish_columns = plan.finish_tile
    tiles = triton.cdiv(columns, finish_columns)
    column_sums = loss.new_empty(plan.chunks, columns)
    chunk_sums = loss.new_empty(plan.chunks, CHUNK_SUMS)
    entropies = loss.new_empty(tiles)
    counter = loss.new_empty(1, dtype=torch.int32)
    kernel = tiled.forward_tiled_kernel if plan.tiled else held.forward_kernel
    kernel[(plan.chunks,)](
        logits,
        confidence,
        marginal_weights,
        saved,  # which begins with the row statistics
        column_sums,
        chunk_sums,
        counter,
        rows,
        columns,
        logits.stride(0),
        plan.chunk_rows,
        *split(confidence_scale * math.log2(math.e)),
        *split(eps),
        **_tile(plan, logits),
        SCALED=confidence is None and confidence_scale != 1,
        EPS=eps != 0,
        WEIGHTS=TUNING.weights_block,
        num_warps=plan.warps,
    )
    held.finish_kernel[(tiles,)](
        column_sums,
        chunk_sums,
        entropies,
        counter,
        saved,
        loss,
        rows,
        columns,
        plan.chunks,
        *split(trade_off),
        *split(eps),
        CHUNKS=finish_chunks,
        COLUMNS=finish_columns,
        EPS=eps != 0,
        num_warps=TUNING.finish_warps,
    )
    return loss, saved


@on_device
def ueo_loss_forward(
    logits: Tensor,
    confidence: Tensor | None,
    marginal_weights: Tensor | None,
    trade_off: float,
    confidence_scale: float,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Loss (), and what backward needs (5 B + C + 5,), in the compute dtype."""
    logits = _prepare(logits)
    confidence = _check_weights("confidence", confidence, logits)
    marginal_weights = _check_weights("marginal_weights", marginal_weights, logits)
    rows, columns = logits.shape
    if rows == 0:
        loss = logits.new_zeros((), dtype=compute_dtype(logits))
        return loss, loss.new_zeros(_saved_size(logits))

    def run(plan: Plan) -> tuple[Tensor, Tensor]:
        weights = confidence, marginal_weights
        return _forward_with(plan, logits, *weights, trade_off, confidence_scale, eps)

    shape = rows, columns
    processors = processors_of(logits.device)
    return with_best_plan("forward", logits.device, shape, logits.dtype, processors, run)


@on_device
def ueo_loss_backward(
    grad_loss: Tensor | None,
    logits: Tensor,
    saved: Tensor,
    trade_off: float,
    eps: float,
) -> Tensor:
    """The gradient (B, C), contiguous in the logits' dtype, from what forward returned.

    ``grad_loss`` None stands for 1, without a launch that would write it.
    """
    logits = _prepare(logits)
    _check_saved(grad_loss, logits, saved)
    rows, columns = logits.shape
    grad = torch.empty((rows, columns), dtype=logits.dtype, device=logits.device)
    if rows == 0:
        return grad

    def run(plan: Plan) -> None:
        kernel = tiled.backward_tiled_kernel if plan.tiled else held.backward_kernel
        kernel[(plan.chunks,)](
            grad_loss,
            logits,
            saved,
            grad,
            rows,
            columns,
            logits.stride(0),
            plan.chunk_rows,
            *split(trade_off),
            *split(eps),
            **_tile(plan, logits),
            EPS=eps != 0,
            num_warps=plan.warps,
        )

    shape = rows, columns
    processors = processors_of(logits.device)
    with_best_plan("backward", logits.device, shape, logits.dtype, processors, run)
    return grad


@on_device
def ueo_loss_and_grad(
    logits: Tensor,
    confidence: Tensor | None,
    marginal_weights: Tensor | None,
    trade_off: float,
    confidence_scale: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, what forward keeps, and the gradient (B, C) for an upstream gradient of 1."""
    logits = _prepare(logits)
    loss, saved = ueo_loss_forward(
        logits, confidence, marginal_weights, trade_off, confidence_scale, eps
    )
    return loss, saved, ueo_loss_backward(None, logits, saved, trade_off, eps)


@on_device
def max_softmax(logits: Tensor, scale: float) -> Tensor:
    """max_c softmax(scale * logits)_c, (B,) in the compute dtype."""
    logits = _prepare(logits)
    rows, columns = logits.shape
    out = torch.empty(rows, dtype=compute_dtype(logits), device=logits.device)
    if rows == 0:
        return out

    def run(plan: Plan) -> None:
        kernel = tiled.max_softmax_tiled_kernel if plan.tiled else held.max_softmax_kernel
        kernel[(triton.cdiv(rows, plan.block_rows),)](
            logits,
            out,
            rows,
            columns,
            logits.stride(0),
            *split(scale * math.log2(math.e)),
            **_tile(plan, logits),
            num_warps=plan.warps,
        )

    shape = rows, columns
    processors = processors_of(logits.device)
    with_best_plan("max_softmax", logits.device, shape, logits.dtype, processors, run)
    return out


KERNELS: dict[str, Callable[..., Any]] = {
    "ueo_loss_forward": ueo_loss_forward,
    "ueo_loss_backward": ueo_loss_backward,
    "ueo_loss_and_grad": ueo_loss_and_grad,
    "max_softmax": max_softmax,
}
"""Each op by its name, called by position with the arguments of its fake (ueo_fast/ops)."""
