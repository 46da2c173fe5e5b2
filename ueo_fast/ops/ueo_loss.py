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


def saved_size(rows: int, columns: int) -> int:
    """Numbers that forward keeps for backward: csrc/ueo_loss.h, ``Saved``."""
    return rows * ROW_STATS + columns + SUMMARY


def statistics(saved: Tensor, columns: int) -> Tensor:
    """Copy the marginal (C,), then the summary (5,).

    A copy, so that writing to it does not corrupt backward and keeping one statistic does not keep
    those of all rows.
    """
    count = columns + SUMMARY
    return saved.narrow_copy(0, saved.shape[0] - count, count)


def _forward_fake(
    logits: Tensor,
    confidence: Tensor | None,
    marginal_weights: Tensor | None,
    trade_off: float,
    confidence_scale: float,
    eps: float,
) -> tuple[Tensor, Tensor]:
    dtype = compute_dtype(logits.dtype)
    saved = logits.new_empty(saved_size(*logits.shape), dtype=dtype)
    return logits.new_empty((), dtype=dtype), saved


def _backward_fake(
    grad_loss: Tensor,
    logits: Tensor,
    saved: Tensor,
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
) -> tuple[Tensor, Tensor, Tensor]:
    loss, saved = _forward_fake(
        logits, confidence, marginal_weights, trade_off, confidence_scale, eps
    )
    return loss, saved, logits.new_empty(logits.shape)


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
) -> tuple[Tensor, Tensor]:
    """The loss without autograd, and what backward and :func:`statistics` need."""
    return registry.of(backend).ueo_loss_forward(
        logits, confidence, marginal_weights, trade_off, confidence_scale, eps
    )


def loss_and_grad(
    backend: str,
    logits: Tensor,
    confidence: Tensor | None,
    marginal_weights: Tensor | None,
    trade_off: float,
    confidence_scale: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, what :func:`statistics` needs, and the gradient for an upstream gradient of 1."""
    return registry.of(backend).ueo_loss_and_grad(
        logits, confidence, marginal_weights, trade_off, confidence_scale, eps
    )


def max_softmax(backend: str, logits: Tensor, scale: float) -> Tensor:
    """max_c softmax(scale * logits)_c, (B,), without autograd."""
    return registry.of(backend).max_softmax(logits, scale)


class UEOLossFunction(torch.autograd.Function):
    """Returns the loss, and with ``return_stats`` the :func:`statistics` as well.

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
        loss, saved = registry.of(backend).ueo_loss_forward(
            logits, confidence, marginal_weights, trade_off, confidence_scale, eps
        )
        ctx.save_for_backward(logits, saved)
        ctx.options = backend, trade_off, eps
        if not return_stats:
            return loss
        ctx.set_materialize_grads(False)
        stats = statistics(saved, logits.shape[1])
        ctx.mark_non_differentiable(stats)
        return loss, stats

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        grad = None
        if grad_loss is not None:  # None: the loss is not part of what is differentiated
            chosen, trade_off, eps = ctx.options
            logits, saved = ctx.saved_tensors
            if torch.is_grad_enabled():
                grad = _OnceDifferentiable.apply(chosen, grad_loss, logits, saved, trade_off, eps)
            else:
                grad = registry.of(chosen).ueo_loss_backward(
                    grad_loss, logits, saved, trade_off, eps
                )
        return None, grad, None, None, None, None, None, None


class _OnceDifferentiable(torch.autograd.Function):
    """The gradient under ``create_graph=True``: part of the graph, so that using it says why not.

    PyTorch's ``once_differentiable`` marks a gradient only where the upstream gradient itself
    requires grad; after ``loss.backward(create_graph=True)`` a gradient penalty would silently be
    a constant.
    """

    @staticmethod
    def forward(ctx: Any, backend: str, *args: Any) -> Tensor:
        grad: Tensor = registry.of(backend).ueo_loss_backward(*args)
        return grad

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise RuntimeError(
            "the compiled ueo_loss is differentiable once: "
            "use backend='reference' for second derivatives"
        )
