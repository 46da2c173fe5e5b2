"""Frozen normalisation and affine modulation in plain PyTorch: the truth of the tests."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ueo_fast.reference.ueo_loss import compute_dtype


def _by_channel(values: Tensor, x: Tensor, dim: int) -> Tensor:
    shape = [1] * x.dim()
    shape[dim] = -1
    return values.to(compute_dtype(x.dtype)).reshape(shape)


def channel_affine(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    dim: int = 1,
    *,
    activation: str = "none",
    residual: Tensor | None = None,
) -> Tensor:
    """``act(x * scale + shift (+ residual))``, one scale and shift per channel.

    Args:
        x: any floating dtype; channels in dimension ``dim``.
        scale: (channels,).
        shift: (channels,).
        activation: ``none`` or ``relu``.
        residual: shape of ``x``, added before the activation.

    Returns:
        The shape and dtype of ``x``; arithmetic in float32 (float64 for float64), rounded once.
    """
    y = x.to(compute_dtype(x.dtype)) * _by_channel(scale, x, dim) + _by_channel(shift, x, dim)
    if residual is not None:
        y = y + residual.to(y.dtype)
    if activation == "relu":
        y = torch.relu(y)
    return y.to(x.dtype)


def frozen_batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float = 1e-5,
    *,
    activation: str = "none",
    residual: Tensor | None = None,
) -> Tensor:
    """Batch normalisation by its running statistics, channels in dimension 1.

    ``act((x - mean) * rsqrt(var + eps) * weight + bias (+ residual))``; arguments as
    :func:`channel_affine` and ``torch.nn.functional.batch_norm``.
    """
    dtype = compute_dtype(x.dtype)
    scale = torch.rsqrt(running_var.to(dtype) + eps)
    if weight is not None:
        scale = weight.to(dtype) * scale
    shift = -running_mean.to(dtype) * scale
    if bias is not None:
        shift = bias.to(dtype) + shift
    return channel_affine(x, scale, shift, 1, activation=activation, residual=residual)


def layer_norm(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """Layer normalisation over the last dimension, in float32 (float64), rounded once."""
    dtype = compute_dtype(x.dtype)
    weight, bias = (None if v is None else v.to(dtype) for v in (weight, bias))
    return F.layer_norm(x.to(dtype), x.shape[-1:], weight, bias, eps).to(x.dtype)
