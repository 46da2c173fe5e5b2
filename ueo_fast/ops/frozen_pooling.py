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
        kernel_size: Any,
        stride: Any,
        padding: Any,
        ceil_mode: bool,
        count_include_pad: bool,
        divisor_override: int | None,
    ) -> Tensor:
        rest = ceil_mode, count_include_pad, divisor_override
        y = F.avg_pool2d(x, kernel_size, stride, padding, *rest)  # checks them all
        ctx.layout = x.shape, frozen.dense_strides(x), x.dtype, x.device
        kernel = _pair(kernel_size)
        ctx.options = kernel, _pair(stride) if stride else kernel, _pair(padding), *rest
        return y

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        grad_x = torch.ops.aten.avg_pool2d_backward(
            grad_out, frozen.stand_in(*ctx.layout), *ctx.options
        )
        return grad_x, None, None, None, None, None, None


class AdaptiveAveragePoolFunction(torch.autograd.Function):
    """``adaptive_avg_pool2d``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, output_size: Any) -> Tensor:
        y = F.adaptive_avg_pool2d(x, output_size)
        ctx.layout = x.shape, frozen.dense_strides(x), x.dtype, x.device
        return y

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
    """``F.avg_pool2d`` without holding ``x``: same arguments, values, gradients, layouts, errors.

    Differentiable twice. Where ``x`` needs no gradient, and under torch.func, forward-mode
    differentiation and tracing it *is* ``F.avg_pool2d``.
    """
    options: Any = kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override
    if not frozen.saves_nothing(x):
        return F.avg_pool2d(x, *options)
    y: Tensor = AveragePoolFunction.apply(x, *options)
    return y


def frozen_adaptive_avg_pool2d(x: Tensor, output_size: int | Sequence[int | None] | None) -> Tensor:
    """``F.adaptive_avg_pool2d`` without holding ``x``; see :func:`frozen_avg_pool2d`."""
    # To one pixel it is a mean, which saves the shape.
    if not frozen.saves_nothing(x) or _is_one_pixel(x, output_size):
        return F.adaptive_avg_pool2d(x, output_size)  # type: ignore[arg-type]
    y: Tensor = AdaptiveAveragePoolFunction.apply(x, output_size)
    return y


def _is_one_pixel(x: Tensor, output_size: int | Sequence[int | None] | None) -> bool:
    if not isinstance(output_size, Sequence):
        return output_size == 1
    return all(
        new == 1 or (new is None and size == 1)
        for new, size in zip(output_size, x.shape[-2:], strict=False)
    )
