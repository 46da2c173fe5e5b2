"""Convolutions and average pools that save no input for backward.

A convolution does so while its weight is frozen. If it is 1 x 1 and widens its input, the batch
norm after it can join it in one call, which saves the narrow input rather than the wide output.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ueo_fast import backends
from ueo_fast.ops.frozen import saves_nothing
from ueo_fast.ops.frozen_convolution import frozen_convolution
from ueo_fast.ops.frozen_convolution_norm import frozen_convolution_norm
from ueo_fast.ops.frozen_pooling import frozen_adaptive_avg_pool2d, frozen_avg_pool2d
from ueo_fast.patch.norms import PatchedBatchNorm, batch_norm_is_fused, is_plain_relu
from ueo_fast.patch.patched import Patched, is_observed


class PatchedConvolution(Patched):
    """``nn.Conv1d``, ``2d`` and ``3d``; the original if the weight is trained.

    With ``padding_mode`` "reflect" or "replicate", the padding still saves the input.
    """

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        conv: Any = self
        if not saves_nothing(input, weight) or weight.dim() != len(conv.kernel_size) + 2:
            return super()._conv_forward(input, weight, bias)  # type: ignore[misc]
        padding = conv.padding
        if conv.padding_mode != "zeros":
            sides = conv._reversed_padding_repeated_twice
            input = F.pad(input, sides, mode=conv.padding_mode)
            padding = 0
        return frozen_convolution(
            input, weight, bias, conv.stride, padding, conv.dilation, conv.groups
        )


class PatchedAvgPool2d(Patched):
    """``nn.AvgPool2d``."""

    def forward(self, input: Tensor) -> Tensor:
        pool: Any = self
        if not saves_nothing(input):
            return super().forward(input)  # type: ignore[misc]
        return frozen_avg_pool2d(
            input,
            pool.kernel_size,
            pool.stride,
            pool.padding,
            pool.ceil_mode,
            pool.count_include_pad,
            pool.divisor_override,
        )


class PatchedAdaptiveAvgPool2d(Patched):
    """``nn.AdaptiveAvgPool2d``."""

    def forward(self, input: Tensor) -> Tensor:
        pool: Any = self
        if not saves_nothing(input):
            return super().forward(input)  # type: ignore[misc]
        return frozen_adaptive_avg_pool2d(input, pool.output_size)


def widens(conv: Any, norm: Any) -> bool:
    """Whether saving the convolution's input rather than its output halves what is saved, or more.

    Only for 1 x 1 convolutions: backward computes the output again, and larger ones cost too much.
    """
    if not (isinstance(conv, PatchedConvolution) and isinstance(norm, PatchedBatchNorm)):
        return False
    module: Any = conv
    return (
        all(size == 1 for size in module.kernel_size)
        and len(module.stride) == len(module.dilation) == len(module.kernel_size)
        and all(step > 0 for step in (*module.stride, *module.dilation))
        and 2 * module.in_channels * math.prod(module.stride) <= module.out_channels
        and module.padding in ("valid", "same", (0,) * len(module.stride))
        and module.bias is None
    )


def can_join(conv: Any, norm: Any, x: Tensor) -> bool:
    """Whether ``norm(conv(x))`` may become one call that saves ``x``."""
    return (
        widens(conv, norm)
        and saves_nothing(x, conv.weight)
        # With a frozen weight the norm saves nothing either way.
        and norm.weight is not None
        and norm.weight.requires_grad
        and x.dim() == conv.weight.dim() == len(conv.kernel_size) + 2
        and x.shape[1] == conv.weight.shape[1] * conv.groups
        and (x.dtype == conv.weight.dtype or torch.is_autocast_enabled(x.device.type))
        and not is_observed(conv)
        and not is_observed(norm)
        and batch_norm_is_fused(norm, x, _elements_of_output(conv, x), conv.out_channels)
    )


def _elements_of_output(conv: Any, x: Tensor) -> int:
    """For a convolution that :func:`widens`; ignores pixels that its stride leaves over."""
    return x.numel() // conv.in_channels // math.prod(conv.stride) * int(conv.out_channels)


def join(conv: Any, norm: Any, x: Tensor, relu: nn.Module | None = None) -> Tensor:
    """``norm(conv(x))``, with the ReLU after it if there is one."""
    norm._check_input_dim(x)  # a 1 x 1 convolution keeps the number of dimensions
    fuses_relu = relu is not None and is_plain_relu(relu)
    y = frozen_convolution_norm(
        backends.choose("auto", x),
        x,
        conv.weight,
        (conv.stride, (0,) * len(conv.stride), conv.dilation, conv.groups),
        norm.weight,
        norm.bias,
        norm.running_mean,
        norm.running_var,
        norm.eps,
        fuses_relu,
    )
    return y if relu is None or fuses_relu else relu(y)
