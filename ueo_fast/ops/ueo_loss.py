"""The loss as compiled ops: fake kernels for torch.compile, and the autograd function.

The gradient is computed in backward from the statistics that forward saved, never in forward:
docs/math.md, "Where the gradient is computed", has the measurement.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ueo_fast.ops import registry
from ueo_fast.reference import compute_dtype

ROW_STATS = 5  # csrc/ueo_loss.h, enum RowStat
SUMMARY = 5  # csrc/ueo_loss.h, enum Summary


def _forward_fake(
    logits: Tensor,
    confidence: Tensor | None,
    marginal_weights: Tensor | None,
    trade_off: float,
    confidence_scale: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, columns = logits.shape
    dtype = compute_dtype(logits.dtype)
    return (
        logits.new_empty((), dtype=dtype),
        logits.new_empty(SUMMARY, dtype=dtype),
        logits.new_empty(columns, dtype=dtype),
        logits.new_empty(rows, ROW_STATS, dtype=dtype),
    )


def _backward_fake(
    grad_loss: Tensor,
    logits: Tensor,
    summary: Tensor,
    marginal: Tensor,
    row_stats: Tensor,
    trade_off: float,
    eps: float,
) -> Tensor:
    return logits.new_empty(logits.shape)


def _loss_and_grad_fake(
    logits: Tensor,
    confidence: Tensor | None,
    marginal_weights: Tensor | None,
    trade_off: float,
    confidence_scale: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    loss, summary, marginal, _ = _forward_fake(
        logits, confidence, marginal_weights, trade_off, confidence_scale, eps
    )
    return loss, summary, marginal, logits.new_empty(logits.shape)


def _max_softmax_fake(logits: Tensor, scale: float) -> Tensor:
    return logits.new_empty(logits.shape[0], dtype=compute_dtype(logits.dtype))


OPS = registry.Ops(
    "ueo_loss",
    {
        "ueo_loss_forward": _forward_fake,
        "ueo_loss_backward": _backward_fake,
        "ueo_loss_and_grad": _loss_and_grad_fake,
        "max_softmax": _max_softmax_fake,
    },
)


def forward(
    backend: str,
    logits: Tensor,
    confidence: Tensor | None,
    marginal_weights: Tensor | None,
    trade_off: float,
    confidence_scale: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss without autograd: loss, summary (5,), marginal (C,), row statistics (B, 5)."""
    return registry.of(backend).ueo_loss_forward(
        logits, confidence, marginal_weights, trade_off, confidence_scale, eps
    )


def backward(
    backend: str,
    grad_loss: Tensor,
    logits: Tensor,
    summary: Tensor,
    marginal: Tensor,
    row_stats: Tensor,
    trade_off: float,
    eps: float,
) -> Tensor:
    """The gradient (B, C) in the logits' dtype, from what :func:`forward` returned."""
    return registry.of(backend).ueo_loss_backward(
        grad_loss, logits, summary, marginal, row_stats, trade_off, eps
    )


def loss_and_grad(
    backend: str,
    logits: Tensor,
    confidence: Tensor | None,
    marginal_weights: Tensor | None,
    trade_off: float,
    confidence_scale: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, summary (5,), marginal (C,), and the gradient (B, C) for an upstream gradient of 1."""
    return registry.of(backend).ueo_loss_and_grad(
        logits, confidence, marginal_weights, trade_off, confidence_scale, eps
    )


def max_softmax(backend: str, logits: Tensor, scale: float) -> Tensor:
    """max_c softmax(scale * logits)_c, (B,), without autograd."""
    return registry.of(backend).max_softmax(logits, scale)


class UEOLossFunction(torch.autograd.Function):
    """Returns the loss, and with ``return_stats`` the summary and the marginal as well.

    Only the loss, and only by the logits, is differentiable. ``forward`` takes ``ctx`` (no
    ``setup_context``): that halves the cost of a call, which is most of the time of a small loss.
    """

    @staticmethod
    def forward(
        ctx: Any,
        backend: str,
        logits: Tensor,
        confidence: Tensor | None,
        marginal_weights: Tensor | None,
        trade_off: float,
        confidence_scale: float,
        eps: float,
        return_stats: bool,
    ) -> Any:
        loss, summary, marginal, row_stats = forward(
            backend, logits, confidence, marginal_weights, trade_off, confidence_scale, eps
        )
        ctx.save_for_backward(logits, summary, marginal, row_stats)
        ctx.backend = backend
        ctx.options = (trade_off, eps)
        if not return_stats:
            return loss
        ctx.set_materialize_grads(False)
        # Copies: writing to a statistic must not touch what backward needs.
        stats = summary.clone(), marginal.clone()
        ctx.mark_non_differentiable(*stats)
        return loss, *stats

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        nothing = (None,) * 6
        if grad_loss is None:  # the loss is not part of what is differentiated
            return None, None, *nothing
        compute = _OnceDifferentiable.apply if torch.is_grad_enabled() else backward
        grad = compute(ctx.backend, grad_loss, *ctx.saved_tensors, *ctx.options)
        return None, grad, *nothing


class _OnceDifferentiable(torch.autograd.Function):
    """The gradient under ``create_graph=True``: part of the graph, so that using it says why not.

    PyTorch's ``once_differentiable`` marks a gradient only where the upstream gradient itself
    requires grad; after ``loss.backward(create_graph=True)`` a gradient penalty would silently be
    a constant.
    """

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        return backward(*args)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise RuntimeError(
            "the compiled ueo_loss is differentiable once: "
            "use backend='reference' for second derivatives"
        )
