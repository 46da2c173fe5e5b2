"""A frozen convolution and the batch norm after it, of which only the convolution's input is held.

The norm's gradient by its weight needs the norm's input. Where a 1 x 1 convolution widens its input
(the shortcuts of a residual network), that is the larger of the two tensors, and the convolution is
cheap to run again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ueo_fast.ops import channel_affine
from ueo_fast.ops.frozen_convolution import autocast

Numbers = tuple[int, ...]


class ConvolutionNormFunction(torch.autograd.Function):
    """``act(convolution(x, weight) * scale + shift)``; the weight and ``center`` are constants.

    ``scale``, ``shift`` and ``center`` as in
    :class:`ueo_fast.ops.channel_affine.ChannelAffineFunction`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        backend: str,
        x: Tensor,
        weight: Tensor,
        scale: Tensor,
        shift: Tensor,
        center: Tensor,
        geometry: tuple[Numbers, Numbers, Numbers, int],
        relu: bool,
    ) -> Tensor:
        wide = _convolution(x, weight, geometry)
        out, bits = channel_affine.forward(backend, wide, scale, shift, None, 1, relu)
        ctx.save_for_backward(x, weight, scale, shift, center, bits)
        ctx.set_materialize_grads(False)
        ctx.options = backend, geometry, relu
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_out is None:  # the result is not part of what is differentiated
            return (None,) * 8
        x, weight, scale, shift, center, bits = ctx.saved_tensors
        backend, geometry, relu = ctx.options
        _, needs_x, _, needs_scale, needs_shift, *_ = ctx.needs_input_grad
        wide = _convolution(x, weight, geometry)
        compute = (
            channel_affine.OnceDifferentiable.apply
            if torch.is_grad_enabled()
            else channel_affine.backward
        )
        needs_sums = needs_scale or needs_shift
        grad_wide, sums, _ = compute(
            backend,
            grad_out,
            wide,
            scale,
            shift,
            center,
            bits,
            wide.stride(),
            1,
            relu,
            needs_x,
            needs_sums,
            False,
        )
        grad_x = None
        if needs_x:
            stride, padding, dilation, groups = geometry
            grad_x, _, _ = torch.ops.aten.convolution_backward(
                grad_wide,
                x,
                weight.to(x.dtype),
                None,
                stride,
                padding,
                dilation,
                False,
                (0,) * len(stride),
                groups,
                (True, False, False),
            )
        return (
            None,
            grad_x,
            None,
            sums[1] if needs_scale else None,
            sums[0] if needs_shift else None,
            None,
            None,
            None,
        )


def _convolution(
    x: Tensor, weight: Tensor, geometry: tuple[Numbers, Numbers, Numbers, int]
) -> Tensor:
    stride, padding, dilation, groups = geometry
    return torch.ops.aten.convolution(
        x,
        weight.to(x.dtype),
        None,
        stride,
        padding,
        dilation,
        False,
        (0,) * len(stride),
        groups,
    )


def frozen_convolution_norm(
    backend: str,
    x: Tensor,
    conv_weight: Tensor,
    geometry: tuple[Numbers, Numbers, Numbers, int],
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
    relu: bool,
) -> Tensor:
    """``act(batch_norm(convolution(x)))`` by running statistics, holding ``x`` for backward.

    Args:
        backend: a compiled one.
        x: (N, C, ...).
        conv_weight: needs no gradient.
        geometry: stride, padding, dilation (one number per spatial dimension) and groups.
        weight, bias, running_mean, running_var, eps: as in
            :func:`ueo_fast.normalization.frozen_batch_norm`.
        relu: whether a ReLU follows.
    """
    x, _ = autocast(x)
    scale = torch.rsqrt(running_var.to(_compute(x)) + eps)
    if weight is not None:
        scale = weight.to(scale.dtype) * scale
    center = running_mean.to(scale.dtype)
    # Detached: the gradient by scale knows of the mean, which is subtracted from x itself.
    shift = -center * scale.detach()
    if bias is not None:
        shift = bias.to(scale.dtype) + shift
    y: Tensor = ConvolutionNormFunction.apply(
        backend, x, conv_weight, scale, shift, center, geometry, relu
    )
    return y


def _compute(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
