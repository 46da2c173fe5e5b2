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
    """``act(batch_norm(convolution(x)))``; the convolution's weight and statistics are constants.

    ``weight`` to ``eps`` as in :class:`ueo_fast.ops.channel_affine.ChannelAffineFunction`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        backend: str,
        x: Tensor,
        conv_weight: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        var: Tensor,
        eps: float,
        geometry: tuple[Numbers, Numbers, Numbers, int],
        relu: bool,
    ) -> Tensor:
        wide = _convolution(x, conv_weight, geometry)
        out, bits = channel_affine.forward(
            backend, wide, weight, bias, mean, var, eps, None, 1, relu
        )
        bias = channel_affine.kept_bias(bias, is_read=relu)
        ctx.save_for_backward(x, conv_weight, weight, bias, mean, var, bits)
        ctx.set_materialize_grads(False)
        ctx.options = backend, eps, geometry, relu
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_out is None:  # the result is not part of what is differentiated
            return (None,) * 10
        x, conv_weight, *parameters, bits = ctx.saved_tensors
        backend, eps, geometry, relu = ctx.options
        _, needs_x, _, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        wide = _convolution(x, conv_weight, geometry)
        grad_wide, by_weight, by_bias, _ = channel_affine.gradients(
            backend,
            grad_out,
            wide,
            *parameters,
            bits,
            eps,
            wide.stride(),
            1,
            relu,
            (needs_x, needs_weight, needs_bias, False),
        )
        grad_x = None
        if needs_x:
            stride, padding, dilation, groups = geometry
            grad_x, _, _ = torch.ops.aten.convolution_backward(
                grad_wide,
                x,
                conv_weight.to(x.dtype),
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
            by_weight if needs_weight else None,
            by_bias if needs_bias else None,
            None,
            None,
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
    weight, bias, mean, var = (
        channel_affine.parameter(values, x) for values in (weight, bias, running_mean, running_var)
    )
    y: Tensor = ConvolutionNormFunction.apply(
        backend, x, conv_weight, weight, bias, mean, var, eps, geometry, relu
    )
    return y
