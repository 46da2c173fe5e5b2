"""Convolutions that hold no input for backward while their weight is frozen."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ueo_fast.ops.frozen import saves_nothing
from ueo_fast.ops.frozen_convolution import frozen_convolution
from ueo_fast.patch.patched import Patched


class PatchedConvolution(Patched):
    """``nn.Conv1d``, ``2d`` and ``3d``; the original where the weight is trained.

    With ``padding_mode`` "reflect" or "replicate" it is the padding that holds the input.
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
