"""Average pools that hold no input for backward."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ueo_fast.ops.frozen import saves_nothing
from ueo_fast.ops.frozen_pooling import frozen_adaptive_avg_pool2d, frozen_avg_pool2d
from ueo_fast.patch.patched import Patched


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
