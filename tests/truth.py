"""The float64 truth of the loss, and the rule by which errors are judged against it.

Rule: |ours - truth| <= |eager in the same dtype - truth| + a stated tolerance.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ueo_fast import reference

LOSS_TOLERANCE = {torch.float64: 1e-14, torch.float32: 1e-6}
GRAD_TOLERANCE = {torch.float64: 1e-13, torch.float32: 3e-6}
"""Relative to the norm of the gradient; half inputs are judged element by element instead."""

HALF_ROUNDING = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
"""Half a unit in the last place, relative: one rounding, on the store."""

HALF_TINY = {torch.float16: 2.0**-25, torch.bfloat16: 2.0**-134}
"""Half the smallest subnormal number: the rounding error near zero."""


@dataclass
class Result:
    loss: Tensor
    grad: Tensor


def differentiate(logits: Tensor, dtype: torch.dtype, upstream: float, **options: Any) -> Result:
    """The reference's loss and upstream * gradient, computed in ``dtype``."""
    weights = {
        name: value.to(dtype) if isinstance(value, Tensor) else value
        for name, value in options.items()
    }
    leaf = logits.detach().to(dtype).clone().requires_grad_()
    loss = reference.ueo_loss(leaf, **weights)
    (grad,) = torch.autograd.grad(loss * upstream, leaf)
    return Result(loss.detach(), grad)


def assert_exact(
    loss: Tensor, grad: Tensor | None, logits: Tensor, upstream: float = 1.0, **options: Any
) -> None:
    """Holds a loss and its gradient to the rule above."""
    compute = reference.compute_dtype(logits.dtype)
    assert loss.dtype == compute
    truth = differentiate(logits, torch.float64, upstream, **options)
    eager = differentiate(logits, compute, upstream, **options)

    def close(ours: Tensor, theirs: Tensor, true: Tensor, tolerance: float, floor: float) -> None:
        error = (ours.double() - true).norm().item()
        allowed = (theirs.double() - true).norm().item()
        allowed += tolerance * true.norm().item() + floor
        assert error <= allowed, f"error {error:.3g} > allowed {allowed:.3g}"

    tolerance = LOSS_TOLERANCE[compute]
    close(loss, eager.loss, truth.loss, tolerance, floor=tolerance)
    if grad is None:
        return
    assert grad.dtype == logits.dtype
    assert grad.shape == logits.shape
    # The two terms of the gradient, each of order 1 / B, may cancel (one row, one class).
    terms = max(1.0, abs(options.get("trade_off", 1.0))) * abs(upstream) / max(logits.shape[0], 1)
    floor = 0.1 * GRAD_TOLERANCE[compute] * terms
    if logits.dtype == compute:
        close(grad, eager.grad, truth.grad, GRAD_TOLERANCE[compute], floor)
        return
    error = (grad.double() - truth.grad).abs()
    allowed = HALF_ROUNDING[logits.dtype] * truth.grad.abs() * 1.001 + HALF_TINY[logits.dtype]
    allowed += (eager.grad.double() - truth.grad).abs() + 2e-6 * truth.grad.abs().amax() + floor
    worst = (error - allowed).amax().item() if error.numel() else 0.0
    assert worst <= 0, f"an element is off by {worst:.3g} more than allowed"
