"""A 1 x 1 convolution that widens its input, and the batch norm after it, as one call."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ueo_fast import backends
from ueo_fast.ops import frozen
from ueo_fast.ops.frozen_convolution_norm import frozen_convolution_norm
from ueo_fast.patch.batch_norm import PatchedBatchNorm, is_plain_relu, runs_fused
from ueo_fast.patch.convolution import PatchedConvolution
from ueo_fast.patch.hooks import is_observed


def widens(conv: Any, norm: Any) -> bool:
    """Whether holding the convolution's input rather than its output saves half or more.

    Only for 1 x 1 convolutions: what is not held is computed again, and larger ones cost too much.
    """
    if not isinstance(conv, PatchedConvolution) or not isinstance(norm, PatchedBatchNorm):
        return False
    return _is_wide(conv)


def _is_wide(conv: Any) -> bool:
    return (
        all(size == 1 for size in conv.kernel_size)
        and len(conv.stride) == len(conv.dilation) == len(conv.kernel_size)
        and all(step > 0 for step in (*conv.stride, *conv.dilation))
        and 2 * conv.in_channels * math.prod(conv.stride) <= conv.out_channels
        and conv.padding in ("valid", "same", (0,) * len(conv.stride))
        and conv.bias is None
    )


def can_join(conv: Any, norm: Any, x: Tensor) -> bool:
    """Whether ``norm(conv(x))`` may become one call that holds ``x``."""
    return (
        widens(conv, norm)
        and frozen.saves_nothing(x, conv.weight)
        # Otherwise the norm holds nothing.
        and norm.weight is not None
        and norm.weight.requires_grad
        and x.dim() == conv.weight.dim() == len(conv.kernel_size) + 2
        and x.shape[1] == conv.weight.shape[1] * conv.groups
        and (x.dtype == conv.weight.dtype or torch.is_autocast_enabled(x.device.type))
        and not is_observed(conv)
        and not is_observed(norm)
        and runs_fused(norm, x, _elements_of_output(conv, x), conv.out_channels)
    )


def _elements_of_output(conv: Any, x: Tensor) -> int:
    """Of a convolution for which :func:`widens` holds; up to what its stride leaves over."""
    return x.numel() // conv.in_channels // math.prod(conv.stride) * int(conv.out_channels)


def join(conv: Any, norm: Any, x: Tensor, relu: nn.Module | None = None) -> Tensor:
    """``norm(conv(x))``, with the ReLU after it if there is one."""
    norm._check_input_dim(x)  # a convolution of one pixel changes no number of dimensions
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
