"""Average pooling that saves no input for backward: its gradient needs the input's shape only.

PyTorch's saves the input itself (``avg_pool2d``, ``adaptive_avg_pool2d``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ueo_fast.ops import frozen

Numbers = tuple[int, int]


class AveragePoolFunction(torch.autograd.Function):
    """``avg_pool2d``."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        kernel_size: Numbers,
        stride: Numbers,
        padding: Numbers,
        ceil_mode: bool,
        count_include_pad: bool,
        divisor_override: int | None,
    ) -> Tensor:
        ctx.layout = x.shape, frozen.dense_strides(x), x.dtype, x.device
        ctx.options = kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override
        return torch.ops.aten.avg_pool2d(x, *ctx.options)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        grad_x = torch.ops.aten.avg_pool2d_backward(
            grad_out, frozen.stand_in(*ctx.layout), *ctx.options
        )
        return grad_x, None, None, None, None, None, None


class AdaptiveAveragePoolFunction(torch.autograd.Function):
    """``adaptive_avg_pool2d``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, output_size: Numbers) -> Tensor:
        ctx.layout = x.shape, frozen.dense_strides(x), x.dtype, x.device
        return torch.ops.aten._adaptive_avg_pool2d(x, output_size)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        stand_in = frozen.stand_in(*ctx.layout)
        return torch.ops.aten._adaptive_avg_pool2d_backward(grad_out, stand_in), None


def _pair(value: int | Sequence[int]) -> Numbers:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values[0], values[-1]


def frozen_avg_pool2d(
    x: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    """``F.avg_pool2d`` without holding ``x``: same arguments, values, gradients and layouts.

    Differentiable twice. Where ``x`` needs no gradient, and under torch.func, forward-mode
    differentiation and tracing it *is* ``F.avg_pool2d``.
    """
    kernel_size, padding = _pair(kernel_size), _pair(padding)
    stride = _pair(stride) if stride else kernel_size
    options = kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override
    if not frozen.saves_nothing(x):
        return F.avg_pool2d(x, *options)
    y: Tensor = AveragePoolFunction.apply(x, *options)
    return y


def frozen_adaptive_avg_pool2d(x: Tensor, output_size: int | Sequence[int | None] | None) -> Tensor:
    """``F.adaptive_avg_pool2d`` without holding ``x``; see :func:`frozen_avg_pool2d`."""
    wanted = (output_size, output_size) if isinstance(output_size, int) else output_size
    wanted = (None, None) if wanted is None else tuple(wanted)
    height, width = (
        size if new is None else new for new, size in zip(wanted, x.shape[-2:], strict=True)
    )
    sizes = height, width
    # To one pixel it is a mean, which saves the shape.
    if sizes == (1, 1) or not frozen.saves_nothing(x):
        return F.adaptive_avg_pool2d(x, sizes)
    y: Tensor = AdaptiveAveragePoolFunction.apply(x, sizes)
    return y
