"""Universal entropy optimization in plain PyTorch: the equations of docs/math.md, line for line."""

from __future__ import annotations

import torch
from torch import Tensor


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of all arithmetic: float64 for float64 inputs, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def max_softmax(logits: Tensor, scale: float = 1.0) -> Tensor:
    """Largest softmax probability of each row (docs/math.md, step 2).

    Args:
        logits: (B, C), any floating dtype.
        scale: multiplies the logits before the softmax.

    Returns:
        (B,) in float32 (float64 for float64 logits).
    """
    scaled = logits.to(compute_dtype(logits.dtype)) * scale
    return torch.softmax(scaled, dim=1).amax(dim=1)


def _shares(weights: Tensor) -> Tensor:
    """Weights divided by their sum, which must not overflow: scaled to at most 1 before."""
    scaled = weights / weights.amax()
    return scaled / scaled.sum()


def _plogp(p: Tensor, log_p: Tensor) -> Tensor:
    """p log p with 0 log 0 = 0, and no NaN from 0 * inf in any order of derivative."""
    return p * log_p.masked_fill(p == 0, 0.0)


def _safe_log(p: Tensor, eps: float) -> Tensor:
    return torch.log(p.masked_fill(p == 0, 1.0)) if eps == 0 else torch.log(p + eps)


def ueo_terms(
    logits: Tensor,
    confidence: Tensor | None = None,
    *,
    marginal_weights: Tensor | None = None,
    confidence_scale: float = 1.0,
    eps: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The parts of the loss: conditional entropy, marginal entropy, mean confidence, marginal.

    Arguments as :func:`ueo_loss`. Returns three 0-d tensors and ``q`` of shape (C,).
    """
    z = logits.to(compute_dtype(logits.dtype))
    if z.shape[0] == 0:  # An empty batch has no entropy; `z.sum()` keeps it part of the graph.
        zero = z.sum()
        return zero, zero, zero.detach(), z.sum(dim=0)
    log_p = torch.log_softmax(z, dim=1)  # step 1
    p = torch.exp(log_p)
    if confidence is None:  # step 2: a constant of the method, hence detached
        w = max_softmax(z.detach(), confidence_scale)
    else:
        w = confidence.detach().to(z.dtype)
    # Any multiple of 1 / w will do; this one cannot overflow.
    v = w.amin() / w if marginal_weights is None else marginal_weights.detach().to(z.dtype)
    a = _shares(w)  # step 3
    b = _shares(v)
    row_entropy = -_plogp(p, log_p if eps == 0 else torch.log(p + eps)).sum(dim=1)  # step 4
    conditional = (a * row_entropy).sum()
    q = (b[:, None] * p).sum(dim=0)  # step 5
    marginal_entropy = -_plogp(q, _safe_log(q, eps)).sum()  # step 6
    return conditional, marginal_entropy, (w / w.amax()).mean() * w.amax(), q


def ueo_loss(
    logits: Tensor,
    confidence: Tensor | None = None,
    *,
    marginal_weights: Tensor | None = None,
    trade_off: float = 1.0,
    confidence_scale: float = 1.0,
    eps: float = 0.0,
) -> Tensor:
    """Confidence-weighted conditional entropy minus ``trade_off`` times the marginal entropy.

    This is the truth that every faster backend is tested against. It holds several (B, C)
    temporaries and is differentiable twice.

    Args:
        logits: (B, C), any floating dtype; arithmetic in float32 (float64 for float64).
        confidence: (B,) positive weights ``w``; ``None`` computes the maximum softmax probability
            of ``confidence_scale * logits``.
        marginal_weights: (B,) weights ``v`` of the marginal; ``None`` means ``1 / w``.
        trade_off: λ, the weight of the marginal entropy.
        confidence_scale: multiplies the logits before the softmax that gives ``w``.
        eps: added inside every logarithm; 0 is the paper's entropy, 1e-5 the authors' code.

    Returns:
        The loss, 0-d, float32 (float64 for float64 logits).

    Source: Liang et al., *Realistic Unsupervised CLIP Fine-tuning with Universal Entropy
    Optimization*, ICML 2024, arXiv 2308.12919, section 3.3.
    """
    conditional, marginal_entropy, _, _ = ueo_terms(
        logits,
        confidence,
        marginal_weights=marginal_weights,
        confidence_scale=confidence_scale,
        eps=eps,
    )
    return conditional - trade_off * marginal_entropy  # step 7
