"""Layer normalisation by the fused kernels of a GPU; on the CPU PyTorch's own stays."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ueo_fast import backends
from ueo_fast.normalization import layer_norm
from ueo_fast.ops.frozen import is_traced
from ueo_fast.patch.batch_norm import are_plain, is_plain_eps
from ueo_fast.patch.patched import Patched, defines


class Rule(NamedTuple):
    """How a class computes.

    Attributes:
        restores: its result has the dtype of its input even under autocast, which lets the plain
            ``F.layer_norm`` return float32.
        channels_first: it normalises the channels of (N, C, H, W).
    """

    restores: bool = False
    channels_first: bool = False


RULES = {
    "torch.nn.modules.normalization.LayerNorm": Rule(),
    "open_clip.transformer.LayerNorm": Rule(restores=True),
    "open_clip.transformer.LayerNormFp32": Rule(restores=True),
    "timm.layers.norm.LayerNorm": Rule(),
    "timm.layers.norm.LayerNormFp32": Rule(restores=True),
    "timm.layers.norm.LayerNorm2d": Rule(channels_first=True),
    "timm.layers.norm.LayerNorm2dFp32": Rule(restores=True, channels_first=True),
}
"""By the class that defines ``forward``; names, so that nothing has to be imported."""


class PatchedLayerNorm(Patched):
    """A layer norm over the last dimension, or over the channels of (N, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        norm: Any = self
        # Looked at in every call: a model may be patched first and moved to a GPU later.
        if not runs_fused(norm, x):
            return super().forward(x)  # type: ignore[misc]
        rule = RULES[defines(type(norm)._ueo_original, "forward")]
        if rule.channels_first:
            x = x.permute(0, 2, 3, 1)
        # The kernels compute in float32 whatever comes in, so a half input that is to be returned
        # as such is not widened first.
        autocast = torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64
        if autocast and not rule.restores:
            x = x.float()
        y = layer_norm(x, norm.weight, norm.bias, norm.eps)
        return y.permute(0, 3, 1, 2) if rule.channels_first else y


def runs_fused(norm: Any, x: Tensor) -> bool:
    """Whether a kernel is to run on ``x``: not on the CPU, nor where there is none."""
    if is_traced(x) or x.device.type in ("cpu", "meta") or not x.is_floating_point():
        return False
    channels_first = RULES[defines(type(norm)._ueo_original, "forward")].channels_first
    if x.dim() < 1 or (channels_first and x.dim() != 4):
        return False
    channels = norm.normalized_shape[0]
    if x.shape[1 if channels_first else -1] != channels or not is_plain_eps(norm.eps):
        return False
    # Under autocast F.layer_norm widens them all.
    if torch.is_autocast_enabled(x.device.type):
        return backends.choose("auto", x, norm.weight, norm.bias) != "reference"
    if not are_plain(x, channels, norm.weight, norm.bias):
        return False
    return backends.choose("auto", x, norm.weight, norm.bias) != "reference"
