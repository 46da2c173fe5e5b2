"""A convolution with a frozen weight that saves no input for backward.

PyTorch's saves its input whether or not the weight needs a gradient, although the input's gradient
depends on the weight alone: Bhatia and Dangel, "Lowering PyTorch's Memory Consumption for Selective
Differentiation", 2024.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ueo_fast.ops.frozen import dense_strides, saves_nothing, stand_in

_ORDINARY = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}  # by the weight's number of dimensions


def _tuple(value: int | Sequence[int], length: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * length if len(values) == 1 else values


def _keeps_size(padding: str, stride: int | Sequence[int]) -> bool:
    """Whether it is ``"same"`` where PyTorch takes it."""
    return padding == "same" and all(step == 1 for step in _tuple(stride, 1))


def autocast(x: Tensor) -> tuple[Tensor, bool]:
    """``x`` as autocast hands it to a convolution, and whether the weight is to follow."""
    device = x.device.type
    # float64 is nothing that autocast touches.
    if not torch.is_autocast_enabled(device) or x.dtype == torch.float64:
        return x, False
    return x.to(torch.get_autocast_dtype(device)), True


class FrozenConvolutionFunction(torch.autograd.Function):
    """Gradients of ``x`` and ``bias``; the weight is a constant."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride: int | Sequence[int],
        padding: int | Sequence[int],
        dilation: int | Sequence[int],
        groups: int,
        casts: bool,
    ) -> Tensor:
        # The ordinary function checks all arguments, and casts under autocast.
        y = _ORDINARY[weight.dim()](x, weight, bias, stride, padding, dilation, groups)
        spatial = weight.dim() - 2
        ctx.layout = x.shape, dense_strides(x), x.dtype
        ctx.geometry = (*(_tuple(value, spatial) for value in (stride, padding, dilation)), groups)
        ctx.casts = casts
        ctx.bias = None if bias is None else (bias.shape, bias.dtype)
        # The parameter itself, also where a cast of it is used: casting again in backward costs
        # less than holding the copies of all layers until then.
        ctx.save_for_backward(weight)
        return y

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        shape, strides, dtype = ctx.layout
        stride, padding, dilation, groups = ctx.geometry
        if ctx.casts:
            weight = weight.to(dtype)
        needs_x, _, needs_bias, *_ = ctx.needs_input_grad
        grad_x, _, grad_bias = torch.ops.aten.convolution_backward(
            grad_out,
            stand_in(shape, strides, dtype, grad_out.device),
            weight,
            None if ctx.bias is None else ctx.bias[0],
            stride,
            padding,
            dilation,
            False,
            (0,) * len(stride),
            groups,
            (needs_x, False, needs_bias),
        )
        if needs_bias:
            grad_bias = grad_bias.to(ctx.bias[1])
        return grad_x, None, grad_bias, None, None, None, None, None


def frozen_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """``F.conv1d``, ``F.conv2d`` or ``F.conv3d``, holding no input where the weight is frozen.

    Same values, same gradients, same layouts, autocast included; differentiable twice. Where the
    weight needs a gradient, where ``x`` needs none, and under torch.func, forward-mode
    differentiation and tracing it *is* the ordinary function.

    Args:
        x: (N, C, ...) or (C, ...); the rest as ``F.conv2d``, ``padding`` ``"same"`` and
            ``"valid"`` included.
    """
    ordinary = _ORDINARY[weight.dim()]
    known = not isinstance(padding, str) or padding == "valid" or _keeps_size(padding, stride)
    if not (known and saves_nothing(x, weight)):
        return ordinary(x, weight, bias, stride, padding, dilation, groups)
    x, casts = autocast(x)
    if padding == "valid":
        padding = 0
    elif padding == "same":
        steps = _tuple(dilation, weight.dim() - 2)
        total = [d * (k - 1) for d, k in zip(steps, weight.shape[2:], strict=True)]
        padding = [pixels // 2 for pixels in total]
        odd = [pixels % 2 for pixels in total]
        if any(odd):  # one more behind; F.pad counts from the last dimension
            x = F.pad(x, [side for extra in reversed(odd) for side in (0, extra)])
    single = x.dim() == weight.dim() - 1
    y: Tensor = FrozenConvolutionFunction.apply(
        x.unsqueeze(0) if single else x,
        weight,
        bias,
        stride,
        padding,
        dilation,
        groups,
        casts,
    )
    return y.squeeze(0) if single else y
