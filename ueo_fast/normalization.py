"""Normalisation layers whose statistics are frozen and whose affine parameters are trained."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ueo_fast import backends, reference
from ueo_fast.arguments import check_dense, check_values
from ueo_fast.ops import channel_affine as affine_op
from ueo_fast.ops import layer_norm as layer_norm_op
from ueo_fast.ranges import check_number, check_one_of

ACTIVATIONS = ("none", "relu")


def _check_residual(residual: Tensor | None, x: Tensor) -> None:
    if residual is None:
        return
    check_dense("residual", residual)
    if residual.shape != x.shape:
        raise ValueError(
            f"residual must have the shape of x, {tuple(x.shape)}, got {tuple(residual.shape)}: "
            "broadcast it with residual.expand_as(x)"
        )
    if residual.dtype != x.dtype:
        raise TypeError(
            f"residual must have the dtype of x, {x.dtype}, got {residual.dtype}: "
            "convert with residual.to(x.dtype)"
        )
    if residual.device != x.device:
        raise ValueError(
            f"residual is on {residual.device} but x is on {x.device}: "
            "move it with residual.to(x.device)"
        )
    backends.check_memory("residual", residual)


def _dimension(dim: int, x: Tensor) -> int:
    """``dim`` counted from the front."""
    if not isinstance(dim, int) or isinstance(dim, bool):
        raise TypeError(f"dim must be an int, got {type(dim).__name__} {dim!r}")
    if not -x.dim() <= dim < x.dim():
        raise ValueError(
            f"dim must be a dimension of x {tuple(x.shape)}, from {-x.dim()} to {x.dim() - 1}, "
            f"got {dim}"
        )
    return dim % x.dim()


def _apply(
    chosen: str,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    eps: float,
    residual: Tensor | None,
    dim: int,
    relu: bool,
) -> Tensor:
    if not affine_op.is_dense(x):
        x = x.clone()  # dense, its dimensions in the same order
    weight, bias, mean, var = (
        affine_op.parameter(values, x) for values in (weight, bias, mean, var)
    )
    arguments = (chosen, x, weight, bias, mean, var, eps, residual, dim, relu)
    differentiable = (x, weight, bias, residual)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in differentiable):
        return affine_op.ChannelAffineFunction.apply(*arguments)
    return affine_op.forward(*arguments)[0]


def channel_affine(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    dim: int = 1,
    *,
    activation: str = "none",
    residual: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """``act(x * scale + shift (+ residual))``, one scale and one shift per channel.

    Args:
        x: float64, float32, float16 or bfloat16, any shape with at least one dimension and any
            strides. Arithmetic is float32 (float64 for float64), rounded once.
        scale: (channels,), any of these dtypes.
        shift: (channels,).
        dim: of the channels: 1 for (N, C, ...), -1 for (N, L, C).
        activation: ``none`` or ``relu``.
        residual: shape and dtype of ``x``, added before the activation.
        backend: ``auto``, ``cpp`` (CPU), ``cuda`` or ``triton`` (GPU), or ``reference`` (plain
            PyTorch, any device, differentiable twice, and under ``torch.func`` transforms).
            ``auto`` takes the first of them that can run on the device of ``x``.

    Returns:
        Shape and dtype of ``x``, and its strides where it is dense. A compiled backend keeps only
        ``x`` for backward (and one bit per element where ``relu`` meets a residual): not even
        that where neither scale nor shift needs a gradient and there is no ``relu`` of ``x``
        alone. It gives the same bits for the same input; ``cpp`` on any number of threads.

    Raises:
        TypeError, ValueError: an argument is unusable; the message says which, and the way out.
        RuntimeError: an explicit backend cannot run on this machine.
    """
    check_dense("x", x)
    backends.check_memory("x", x)
    dim = _dimension(dim, x)
    check_one_of("activation", activation, ACTIVATIONS)
    _check_residual(residual, x)
    check_values("scale", scale, x, dim)
    check_values("shift", shift, x, dim)
    chosen = backends.choose(backend, x, scale, shift, residual, name="x")
    if chosen == "reference":
        return reference.channel_affine(
            x, scale, shift, dim, activation=activation, residual=residual
        )
    relu = activation == "relu"
    return _apply(chosen, x, scale, shift, None, None, 0.0, residual, dim, relu)


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
    backend: str = "auto",
) -> Tensor:
    """Batch normalisation by frozen statistics, with what follows it in a residual network.

    ``act((x - mean) / sqrt(var + eps) * weight + bias (+ residual))``: batch normalisation in
    evaluation mode, whose affine parameters can be trained.

    Args:
        x: (N, C) or (N, C, ...), float64, float32, float16 or bfloat16; any strides,
            channels_last as well as contiguous. Arithmetic is float32 (float64 for float64),
            rounded once.
        weight: (C,), any of these dtypes; None means 1.
        bias: (C,); None means 0.
        running_mean: (C,), a constant.
        running_var: (C,), a constant.
        eps: added to the variance.
        activation: ``none`` or ``relu``.
        residual: shape and dtype of ``x``, added before the activation.
        backend: as in :func:`channel_affine`, where also what is kept for backward is told.

    Returns:
        Shape and dtype of ``x``, and its strides where it is dense.

    Raises:
        TypeError, ValueError: an argument is unusable; the message says which, and the way out.
        RuntimeError: an explicit backend cannot run on this machine.

    Source: Ioffe and Szegedy, *Batch Normalization*, ICML 2015, algorithm 2.
    """
    check_dense("x", x)
    backends.check_memory("x", x)
    if x.dim() < 2:
        raise ValueError(
            f"x must have shape (N, C) or (N, C, ...), got {tuple(x.shape)}: "
            "add the batch with x.unsqueeze(0)"
        )
    check_one_of("activation", activation, ACTIVATIONS)
    _check_residual(residual, x)
    eps = check_number("eps", eps, sign="not negative")
    check_values("running_mean", running_mean, x, 1, constant=True)
    check_values("running_var", running_var, x, 1, constant=True)
    if weight is not None:
        check_values("weight", weight, x, 1)
    if bias is not None:
        check_values("bias", bias, x, 1)
    chosen = backends.choose(
        backend, x, weight, bias, running_mean, running_var, residual, name="x"
    )
    if chosen == "reference":
        return reference.frozen_batch_norm(
            x,
            weight,
            bias,
            running_mean,
            running_var,
            eps,
            activation=activation,
            residual=residual,
        )
    relu = activation == "relu"
    return _apply(chosen, x, weight, bias, running_mean, running_var, eps, residual, 1, relu)


def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    backend: str = "auto",
) -> Tensor:
    """Layer normalisation over the last dimension.

    On the CPU this is ``torch.nn.functional.layer_norm``, which is near the limit there, under
    ``auto`` and under ``cpp``; a GPU has fused kernels.

    Args:
        x: (..., C) with C > 0, float64, float32, float16 or bfloat16; any strides. Arithmetic is
            float32 (float64 for float64), rounded once, but PyTorch's gradient by ``weight`` of a
            bfloat16 ``x`` rounds within its sums.
        weight: (C,), any of these dtypes; None means 1.
        bias: (C,); None means 0.
        eps: added to the variance.
        backend: as in :func:`channel_affine`.

    Returns:
        Shape and dtype of ``x``. A fused backend keeps ``x`` and two numbers per row for
        backward.

    Raises:
        TypeError, ValueError: an argument is unusable; the message says which, and the way out.
        RuntimeError: an explicit backend cannot run on this machine.

    Source: Ba, Kiros and Hinton, *Layer Normalization*, arXiv 1607.06450.
    """
    check_dense("x", x)
    backends.check_memory("x", x)
    if x.dim() < 1 or x.shape[-1] == 0:
        raise ValueError(
            f"x must have shape (..., C) with C > 0, got {tuple(x.shape)}: there is nothing to "
            "normalise"
        )
    eps = check_number("eps", eps, sign="not negative")
    if weight is not None:
        check_values("weight", weight, x, -1)
    if bias is not None:
        check_values("bias", bias, x, -1)
    chosen = backends.choose(backend, x, weight, bias, name="x")
    if x.device.type == "cpu" and (chosen == "cpp" or backend == "auto"):
        return _layer_norm_of_torch(x, weight, bias, eps)
    if chosen == "reference":
        return reference.layer_norm(x, weight, bias, eps)
    dtype = reference.compute_dtype(x.dtype)
    weight, bias = (None if value is None else value.to(dtype) for value in (weight, bias))
    rows = x.reshape(-1, x.shape[-1])
    if rows.stride(1) != 1 and rows.shape[1] > 1:
        rows = rows.contiguous()
    differentiable = (rows, weight, bias)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in differentiable):
        out = layer_norm_op.LayerNormFunction.apply(chosen, rows, weight, bias, eps)
    else:
        out = layer_norm_op.forward(chosen, rows, weight, bias, eps)[0]
    return out.reshape(x.shape)


def _layer_norm_of_torch(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    # It takes parameters in the dtype of x, or all in float32 with a half x (but then not a bias
    # alone: its backward fails).
    if any(value is not None and value.dtype != x.dtype for value in (weight, bias)):
        if weight is None:
            return reference.layer_norm(x, weight, bias, eps)
        dtype = reference.compute_dtype(x.dtype)
        weight, bias = (None if value is None else value.to(dtype) for value in (weight, bias))
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
