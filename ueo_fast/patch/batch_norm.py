"""Batch normalisation by running statistics, fused with the activation that follows it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ueo_fast import backends
from ueo_fast.normalization import frozen_batch_norm
from ueo_fast.ops.frozen import is_traced
from ueo_fast.patch.hooks import is_observed
from ueo_fast.patch.patched import Patched

MIN_ELEMENTS = 400_000
"""Elements of a call on a CPU below which the originals run. A fused call costs some 40
microseconds of Python and autograd more than theirs; at this size it has won them back in all
layouts and dtypes but the addition in float32, which is even (docs/performance.md)."""
_OWN = "_ueo_min_elements"  # of a module for which another number was asked


class PatchedBatchNorm(Patched):
    """``nn.BatchNorm1d``, ``2d``, ``3d`` and ``nn.SyncBatchNorm``.

    In training mode, without running statistics, and for small inputs it is the original.
    """

    _ueo_options = (_OWN,)

    def forward(self, input: Tensor) -> Tensor:
        norm: Any = self
        if not runs_fused(norm, input):
            return super().forward(input)  # type: ignore[misc]
        return normalize(norm, input)


class PatchedBatchNormAct(Patched):
    """timm's ``BatchNormAct2d``: normalisation, dropout (if any), activation (if any)."""

    _ueo_options = (_OWN,)

    def forward(self, x: Tensor) -> Tensor:
        norm: Any = self
        if not runs_fused(norm, x) or x.dim() != 4:
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
    """Another number than :data:`MIN_ELEMENTS` for a patched norm, its copies and its pickles."""
    vars(norm)[_OWN] = elements


def runs_fused(
    norm: Any, x: Tensor, elements: int | None = None, channels: int | None = None
) -> bool:
    """Whether a batch norm uses its running statistics and a compiled kernel is to run on ``x``.

    Without a kernel (an unknown device, torch.func, tracing) the original is faster and holds less
    than our reference. It also runs on what it might refuse, for its errors.

    Args:
        norm: the module.
        x: its input, or what its input is made of.
        elements: of its input, where that is not ``x``.
        channels: of its input, where that is not ``x``.
    """
    if norm.training or norm.running_mean is None or norm.running_var is None:
        return False
    if is_traced(x) or not x.is_floating_point() or x.dim() < 2:
        return False
    if _is_small(norm, x, x.numel() if elements is None else elements):
        return False
    values = norm.running_mean, norm.running_var, norm.weight, norm.bias
    plain = are_plain(x, x.shape[1] if channels is None else channels, *values)
    if not plain or not is_plain_eps(norm.eps) or norm.running_mean.requires_grad:
        return False
    return backends.choose("auto", x, norm.weight, norm.bias) != "reference"


def are_plain(x: Tensor, channels: int, *values: Tensor | None) -> bool:
    """Whether PyTorch's norms take ``values``, one per channel, together with ``x``."""
    given = [value for value in values if value is not None]
    dtypes = {value.dtype for value in given} or {x.dtype}
    widened = x.dtype in (torch.float16, torch.bfloat16) and dtypes == {torch.float32}
    if channels == 0 or not (widened or dtypes == {x.dtype}):
        return False
    return all(value.shape == (channels,) and value.device == x.device for value in given)


def is_plain_eps(eps: object) -> bool:
    """Whether ours takes an eps, as PyTorch's does with any number."""
    return isinstance(eps, float) and (eps == 0 or 1e-30 <= eps <= 1e30)


def _is_small(norm: Any, x: Tensor, elements: int) -> bool:
    # A compiled graph has no Python to spare, and is not to be tied to a size.
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


def can_fuse(norm: nn.Module, relu: nn.Module, x: Tensor) -> bool:
    """Whether a batch norm and the ReLU after it may become one call.

    Not where a hook on either of them would be bypassed.
    """
    return (
        isinstance(norm, PatchedBatchNorm)
        and is_plain_relu(relu)
        and not is_observed(norm)
        and runs_fused(norm, x)
    )


def norm_relu(norm: nn.Module, relu: nn.Module, x: Tensor) -> Tensor:
    """``relu(norm(x))``."""
    if can_fuse(norm, relu, x):
        return normalize(norm, x, activation="relu")
    return relu(norm(x))


def can_add(norm: nn.Module, relu: nn.Module, x: Tensor, residual: Tensor) -> bool:
    """Whether ``relu(norm(x) + residual)`` may become one call."""
    if not can_fuse(norm, relu, x):
        return False
    # Otherwise the sum broadcasts or promotes, which is left to PyTorch.
    same = residual.shape == x.shape and residual.dtype == x.dtype
    return same and residual.device == x.device
