"""Checks what users pass: every error names the argument, its value and the way out."""

from __future__ import annotations

import math
import numbers

import torch
from torch import Tensor

from ueo_fast.reference import compute_dtype

_FLOATING = frozenset({torch.float32, torch.float16, torch.bfloat16, torch.float64})


def check_matrix(name: str, value: Tensor) -> None:
    """A dense floating (B, C) tensor with C > 0, in this process."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if type(value).__name__ == "DTensor":
        raise TypeError(
            f"{name} is a DTensor, whose rows live in several processes: "
            f"pass the rows of this process with {name}.to_local()"
        )
    if value.dtype not in _FLOATING:
        raise TypeError(
            f"{name} must be float64, float32, float16 or bfloat16, got {value.dtype}: "
            f"convert with {name}.float()"
        )
    if value.layout is not torch.strided:
        raise TypeError(
            f"{name} must be a dense tensor, got {value.layout}: convert with {name}.to_dense()"
        )
    if value.ndim != 2:
        raise ValueError(
            f"{name} must have shape (B, C), got {tuple(value.shape)}: "
            f"flatten leading dimensions with {name}.flatten(0, -2), "
            f"or add the batch with {name}.unsqueeze(0)"
        )
    if value.shape[1] == 0:
        raise ValueError(
            f"{name} must have at least one class, got shape {tuple(value.shape)}: "
            "check the list of class names"
        )


def check_weights(
    name: str, value: Tensor | None, logits: Tensor, *, positive: bool
) -> Tensor | None:
    """Constant weights of the rows in the compute dtype; ``positive`` forbids zeros."""
    if value is None:
        return None
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor or None, got {type(value).__name__}")
    if value.dtype not in _FLOATING:
        raise TypeError(
            f"{name} must be floating point, got {value.dtype}: convert with {name}.float()"
        )
    if value.shape != logits.shape[:1]:
        raise ValueError(
            f"{name} must have shape (B,) = ({logits.shape[0]},) to match logits "
            f"{tuple(logits.shape)}, got {tuple(value.shape)}"
        )
    if value.device != logits.device:
        raise ValueError(
            f"{name} is on {value.device} but logits are on {logits.device}: "
            f"move it with {name}.to(logits.device)"
        )
    if value.requires_grad:
        raise ValueError(
            f"{name} requires grad, but it is a constant of the method: pass {name}.detach()"
        )
    # Values are looked at only where that needs no device sync and nothing is being traced.
    if value.device.type == "cpu" and value.shape[0] > 0 and not torch.compiler.is_compiling():
        _check_values(name, value, positive)
    return value.to(compute_dtype(logits.dtype))


def _check_values(name: str, value: Tensor, positive: bool) -> None:
    low, high = (float(extreme) for extreme in torch.aminmax(value))  # NaN wins both
    above = low > 0 if positive else low >= 0 and high > 0
    if above and high < math.inf:
        return
    wanted = "positive and finite" if positive else "finite, not negative and not all zero"
    raise ValueError(
        f"{name} must be {wanted}, got values from {low} to {high}: "
        f"bound it with {name}.clamp(min=1e-6), or look for the NaN where it was computed"
    )


def check_number(
    name: str, value: float, *, above: float = -math.inf, or_equal: bool = False
) -> float:
    """A finite number greater than ``above`` (``or_equal``: or equal to it)."""
    if torch.compiler.is_compiling():  # may be symbolic; eager calls have checked it
        return value
    if type(value) is not float:
        if not isinstance(value, numbers.Real) or isinstance(value, bool):
            kind = type(value).__name__
            raise TypeError(f"{name} must be a number, got {kind} {value!r}: convert with float()")
        value = float(value)
    if math.isfinite(value) and (value > above or (or_equal and value == above)):
        return value
    bound = "" if above == -math.inf else f" and {'>=' if or_equal else '>'} {above:g}"
    raise ValueError(f"{name} must be finite{bound}, got {value}")
