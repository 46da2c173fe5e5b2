"""Batch norms that use running statistics, with the activation after them, and layer norms."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ueo_fast import backends
from ueo_fast.normalization import frozen_batch_norm, layer_norm
from ueo_fast.ops.frozen import is_traced
from ueo_fast.patch.patched import Patched, defines, is_observed

MIN_ELEMENTS = 400_000
"""Calls on a CPU with fewer elements run the original. A fused call has some 40 microseconds more
overhead in Python and autograd. At this size it is faster in all layouts and dtypes, except for the
addition in float32, where both take the same time (docs/performance.md)."""
_OWN = "_ueo_min_elements"  # of a module for which another number was asked


class PatchedBatchNorm(Patched):
    """``nn.BatchNorm1d``, ``2d``, ``3d`` and ``nn.SyncBatchNorm``.

    In training mode, without running statistics, and for small inputs it is the original.
    """

    _ueo_options = (_OWN,)

    def forward(self, input: Tensor) -> Tensor:
        norm: Any = self
        if not batch_norm_is_fused(norm, input):
            return super().forward(input)  # type: ignore[misc]
        return normalize(norm, input)


class PatchedBatchNormAct(Patched):
    """timm's ``BatchNormAct2d``: normalisation, dropout (if any), activation (if any)."""

    _ueo_options = (_OWN,)

    def forward(self, x: Tensor) -> Tensor:
        norm: Any = self
        if not batch_norm_is_fused(norm, x) or x.dim() != 4:
            return super().forward(x)  # type: ignore[misc]
        drops = type(norm.drop) is not nn.Identity or is_observed(norm.drop)
        if not drops and is_plain_relu(norm.act):
            return normalize(norm, x, activation="relu")
        x = normalize(norm, x)
        return norm.act(norm.drop(x))


def is_plain_relu(module: nn.Module) -> bool:
    """Whether a module does what the fused activation does, and nobody watches it."""
    return type(module) is nn.ReLU and not is_observed(module)


def set_min_elements(norm: nn.Module, elements: int) -> None:
    """Replace :data:`MIN_ELEMENTS` for a patched norm, its copies and its pickles."""
    vars(norm)[_OWN] = elements


def batch_norm_is_fused(
    norm: Any, x: Tensor, elements: int | None = None, channels: int | None = None
) -> bool:
    """Whether a batch norm uses its running statistics and a compiled kernel is to run on ``x``.

    Without a kernel (an unknown device, torch.func, tracing) the original is faster and saves less
    than our reference. The original also runs on input that it might refuse, for its errors.

    Args:
        norm: the module.
        x: its input, or the tensor that its input is computed from.
        elements: of its input, if that is not ``x``.
        channels: of its input, if that is not ``x``.
    """
    if norm.training or norm.running_mean is None or norm.running_var is None:
        return False
    if is_traced(x) or not x.is_floating_point() or x.dim() < 2:
        return False
    if _is_small(norm, x, x.numel() if elements is None else elements):
        return False
    values = norm.running_mean, norm.running_var, norm.weight, norm.bias
    plain = _are_plain(x, x.shape[1] if channels is None else channels, *values)
    if not plain or not _is_plain_eps(norm.eps) or norm.running_mean.requires_grad:
        return False
    return backends.choose("auto", x, norm.weight, norm.bias) != "reference"


def _are_plain(x: Tensor, channels: int, *values: Tensor | None) -> bool:
    """Whether PyTorch's norms take ``values``, one per channel, together with ``x``."""
    given = [value for value in values if value is not None]
    dtypes = {value.dtype for value in given} or {x.dtype}
    widened = x.dtype in (torch.float16, torch.bfloat16) and dtypes == {torch.float32}
    if channels == 0 or not (widened or dtypes == {x.dtype}):
        return False
    return all(value.shape == (channels,) and value.device == x.device for value in given)


def _is_plain_eps(eps: object) -> bool:
    """Whether our kernels take an eps; PyTorch's take any number."""
    return isinstance(eps, float) and (eps == 0 or 1e-30 <= eps <= 1e30)


def _is_small(norm: Any, x: Tensor, elements: int) -> bool:
    # A compiled graph has no Python overhead, and must not depend on a size.
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    return elements < int(vars(norm).get(_OWN, MIN_ELEMENTS))


def normalize(
    norm: Any, x: Tensor, *, activation: str = "none", residual: Tensor | None = None
) -> Tensor:
    """:func:`ueo_fast.frozen_batch_norm` with a module's parameters and statistics."""
    norm._check_input_dim(x)
    return frozen_batch_norm(
        x,
        norm.weight,
        norm.bias,
        norm.running_mean,
        norm.running_var,
        norm.eps,
        activation=activation,
        residual=residual,
    )


def _can_fuse(norm: nn.Module, relu: nn.Module, x: Tensor) -> bool:
    """Whether a batch norm and the ReLU after it may become one call, which bypasses no hook."""
    return (
        isinstance(norm, PatchedBatchNorm)
        and is_plain_relu(relu)
        and not is_observed(norm)
        and batch_norm_is_fused(norm, x)
    )


def norm_relu(norm: nn.Module, relu: nn.Module, x: Tensor) -> Tensor:
    """``relu(norm(x))``."""
    if _can_fuse(norm, relu, x):
        return normalize(norm, x, activation="relu")
    return relu(norm(x))


def can_add(norm: nn.Module, relu: nn.Module, x: Tensor, residual: Tensor) -> bool:
    """Whether ``relu(norm(x) + residual)`` may become one call."""
    if not _can_fuse(norm, relu, x):
        return False
    # Otherwise the sum broadcasts or promotes, which is left to PyTorch.
    same = residual.shape == x.shape and residual.dtype == x.dtype
    return same and residual.device == x.device


class LayerNormRule(NamedTuple):
    """How a class computes.

    Attributes:
        restores: its result has the dtype of its input even under autocast, which lets the plain
            ``F.layer_norm`` return float32.
        channels_first: it normalises the channels of (N, C, H, W).
    """

    restores: bool = False
    channels_first: bool = False


LAYER_NORMS = {
    "torch.nn.modules.normalization.LayerNorm": LayerNormRule(),
    "open_clip.transformer.LayerNorm": LayerNormRule(restores=True),
    "open_clip.transformer.LayerNormFp32": LayerNormRule(restores=True),
    "timm.layers.norm.LayerNorm": LayerNormRule(),
    "timm.layers.norm.LayerNormFp32": LayerNormRule(restores=True),
    "timm.layers.norm.LayerNorm2d": LayerNormRule(channels_first=True),
    "timm.layers.norm.LayerNorm2dFp32": LayerNormRule(restores=True, channels_first=True),
}
"""By the class that defines ``forward``; names, so that nothing has to be imported."""


class PatchedLayerNorm(Patched):
    """A layer norm over the last dimension, or over the channels of (N, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        norm: Any = self
        # Decided in every call: a model may be patched first and moved to a GPU later.
        if not layer_norm_is_fused(norm, x):
            return super().forward(x)  # type: ignore[misc]
        rule = _rule_of(norm)
        if rule.channels_first:
            x = x.permute(0, 2, 3, 1)
        # The kernels compute in float32 for every input, so a half input whose result is half
        # as well is not widened first.
        autocast = torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64
        if autocast and not rule.restores:
            x = x.float()
        y = layer_norm(x, norm.weight, norm.bias, norm.eps)
        return y.permute(0, 3, 1, 2) if rule.channels_first else y


def _rule_of(norm: Any) -> LayerNormRule:
    return LAYER_NORMS[defines(type(norm)._ueo_original, "forward")]


def layer_norm_is_fused(norm: Any, x: Tensor) -> bool:
    """Whether a kernel is to run on ``x``: never on the CPU, nor where there is none."""
    if is_traced(x) or x.device.type in ("cpu", "meta") or not x.is_floating_point():
        return False
    channels_first = _rule_of(norm).channels_first
    if x.dim() < 1 or (channels_first and x.dim() != 4):
        return False
    channels = norm.normalized_shape[0]
    if x.shape[1 if channels_first else -1] != channels or not _is_plain_eps(norm.eps):
        return False
    # Under autocast F.layer_norm widens input and affines.
    autocast = torch.is_autocast_enabled(x.device.type)
    if not autocast and not _are_plain(x, channels, norm.weight, norm.bias):
        return False
    return backends.choose("auto", x, norm.weight, norm.bias) != "reference"
