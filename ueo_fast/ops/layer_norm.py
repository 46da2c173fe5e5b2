"""Layer normalisation as compiled ops (on GPUs): fake kernels and the autograd function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ueo_fast.ops import registry
from ueo_fast.reference import compute_dtype


def _forward_fake(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = compute_dtype(x.dtype)
    rows = x.shape[0]
    return (
        x.new_empty(x.shape),
        x.new_empty(rows, dtype=dtype),
        x.new_empty(rows, dtype=dtype),
    )


def _backward_fake(
    grad_out: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    needs_x: bool,
    needs_sums: bool,
) -> tuple[Tensor, Tensor]:
    return (
        x.new_empty(x.shape) if needs_x else x.new_empty(0),
        mean.new_empty(2, x.shape[1]) if needs_sums else mean.new_empty(0),
    )


OPS = registry.Ops(
    "layer_norm", {"layer_norm_forward": _forward_fake, "layer_norm_backward": _backward_fake}
)


def forward(
    backend: str, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Without autograd: result (rows, columns) contiguous, mean (rows,), 1 / deviation (rows,)."""
    return registry.of(backend).layer_norm_forward(x, weight, bias, eps)


def backward(
    backend: str,
    grad_out: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    needs_x: bool,
    needs_sums: bool,
) -> tuple[Tensor, Tensor]:
    """The gradient by x (rows, columns) and the sums (2, columns): see csrc/library.cpp."""
    return registry.of(backend).layer_norm_backward(
        grad_out.contiguous(), x, mean, rstd, weight, needs_x, needs_sums
    )


class LayerNormFunction(torch.autograd.Function):
    """Rows of ``x`` (rows, columns) normalised; its columns are adjacent.

    ``weight`` and ``bias`` are (columns,) in the compute dtype, or None.
    """

    @staticmethod
    def forward(
        ctx: Any, backend: str, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> Tensor:
        out, mean, rstd = forward(backend, x, weight, bias, eps)
        ctx.save_for_backward(x, mean, rstd, weight)
        ctx.set_materialize_grads(False)
        ctx.backend = backend
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_out is None:  # the result is not part of what is differentiated
            return (None,) * 5
        _, needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        needs_sums = needs_weight or needs_bias
        compute: Any = _OnceDifferentiable.apply if torch.is_grad_enabled() else backward
        grad_x, sums = compute(ctx.backend, grad_out, *ctx.saved_tensors, needs_x, needs_sums)
        return (
            None,
            grad_x if needs_x else None,
            sums[0] if needs_weight else None,
            sums[1] if needs_bias else None,
            None,
        )


class _OnceDifferentiable(torch.autograd.Function):
    """The gradients under ``create_graph=True``: see ueo_fast/ops/ueo_loss.py."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        return backward(*args)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise RuntimeError(
            "the compiled layer_norm is differentiable once: "
            "use backend='reference' for second derivatives"
        )
