"""The loss as a module."""

from __future__ import annotations

from torch import Tensor, nn

from ueo_fast.functional import UEOStats, ueo_loss


class UEOLoss(nn.Module):
    """:func:`ueo_fast.ueo_loss` with its options fixed at construction.

    Args:
        trade_off, confidence_scale, eps, return_stats, backend: as in :func:`ueo_fast.ueo_loss`.

    Shape:
        logits (B, C), confidence (B,) or None, marginal_weights (B,) or None; returns the 0-d
        loss, or ``(loss, UEOStats)`` with ``return_stats``.
    """

    def __init__(
        self,
        trade_off: float = 1.0,
        *,
        confidence_scale: float = 1.0,
        eps: float = 0.0,
        return_stats: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.trade_off = trade_off
        self.confidence_scale = confidence_scale
        self.eps = eps
        self.return_stats = return_stats
        self.backend = backend

    def forward(
        self,
        logits: Tensor,
        confidence: Tensor | None = None,
        *,
        marginal_weights: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, UEOStats]:
        return ueo_loss(
            logits,
            confidence,
            marginal_weights=marginal_weights,
            trade_off=self.trade_off,
            confidence_scale=self.confidence_scale,
            eps=self.eps,
            return_stats=self.return_stats,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return (
            f"trade_off={self.trade_off}, confidence_scale={self.confidence_scale}, "
            f"eps={self.eps}, return_stats={self.return_stats}, backend={self.backend!r}"
        )
