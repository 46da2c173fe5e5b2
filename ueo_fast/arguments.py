"""Checks what users pass: every error names the argument, its value and the way out."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ueo_fast import backends
from ueo_fast.reference import compute_dtype

_FLOATING = frozenset({torch.float32, torch.float16, torch.bfloat16, torch.float64})


def check_dense(name: str, value: Tensor, *, padded: str = "(0.0)") -> None:
    """A strided floating tensor, in this process; ``padded`` goes with a nested or masked one."""
    if type(value) is not Tensor:
        _check_kind(name, value, padded)
    if value.is_nested:
        raise TypeError(
            f"{name} is a nested tensor: pass a dense one, e.g. {name}.to_padded_tensor{padded}"
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


def _check_kind(name: str, value: Tensor, padded: str) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    kind = type(value).__name__
    if kind == "DTensor":
        raise TypeError(
            f"{name} is a DTensor, whose rows live in several processes: "
            f"pass the rows of this process with {name}.to_local()"
        )
    if kind == "MaskedTensor":
        raise TypeError(
            f"{name} is a masked tensor: pass a dense one, e.g. {name}.to_tensor{padded}"
        )


def check_matrix(name: str, value: Tensor) -> None:
    """A dense floating (B, C) tensor with C > 0, in this process."""
    check_dense(name, value, padded="(float('-inf')), whose padding counts as masked classes")
    shape = value.shape
    if len(shape) != 2:
        raise ValueError(
            f"{name} must have shape (B, C), got {tuple(shape)}: "
            f"flatten leading dimensions with {name}.flatten(0, -2), "
            f"or add the batch with {name}.unsqueeze(0)"
        )
    if shape[1] == 0:
        raise ValueError(
            f"{name} must have at least one class, got shape {tuple(shape)}: "
            "check the list of class names"
        )


def check_values(name: str, value: Tensor, x: Tensor, dim: int, *, constant: bool = False) -> None:
    """One value per channel of ``x`` in dimension ``dim``."""
    check_dense(name, value)
    if value.shape != (x.shape[dim],):
        raise ValueError(
            f"{name} must have shape ({x.shape[dim]},), one value per channel of x "
            f"{tuple(x.shape)} in dimension {dim}, got {tuple(value.shape)}"
        )
    if value.device != x.device:
        raise ValueError(
            f"{name} is on {value.device} but x is on {x.device}: move it with {name}.to(x.device)"
        )
    if constant and value.requires_grad:
        raise ValueError(
            f"{name} requires grad, but the statistics are frozen: pass {name}.detach()"
        )
    backends.check_memory(name, value)


def check_weights(name: str, value: Tensor, logits: Tensor) -> Tensor:
    """Constant weights of the rows, converted to the compute dtype."""
    check_dense(name, value, padded="(1.0)")
    shape = value.shape
    if len(shape) != 1 or shape[0] != logits.shape[0]:
        raise ValueError(
            f"{name} must have shape (B,) = ({logits.shape[0]},) to match logits "
            f"{tuple(logits.shape)}, got {tuple(shape)}"
        )
    if not (value.is_cpu and logits.is_cpu) and value.device != logits.device:
        raise ValueError(
            f"{name} is on {value.device} but logits are on {logits.device}: "
            f"move it with {name}.to(logits.device)"
        )
    if value.requires_grad:
        raise ValueError(
            f"{name} requires grad, but it is a constant of the method: pass {name}.detach()"
        )
    dtype = compute_dtype(logits.dtype)
    if value.dtype == dtype:
        return value
    backends.check_memory(name, value)
    return value.to(dtype)


def check_contents(name: str, value: Tensor | None, *, positive: bool) -> None:
    """The memory and the values of weights, which ``check_weights`` leaves alone.

    The C++ op checks both itself, as it reads the values anyway: a call of PyTorch's costs as much
    as the op. ``positive`` forbids zeros.
    """
    if value is None:
        return
    backends.check_memory(name, value)
    # Values are looked at only where that needs no device sync and nothing is being traced.
    if value.is_cpu and value.shape[0] > 0 and not torch.compiler.is_compiling():
        _check_range(name, value, positive)


def _check_range(name: str, value: Tensor, positive: bool) -> None:
    try:
        low, high = (float(extreme) for extreme in torch.aminmax(value))  # NaN wins both
    except RuntimeError:  # under vmap, make_fx or a fake mode there are no values to look at
        return
    above = low > 0 if positive else low >= 0 and high > 0
    if above and high < math.inf:
        return
    wanted = "positive and finite" if positive else "finite, not negative and not all zero"
    dtype = str(value.dtype).removeprefix("torch.")
    raise ValueError(
        f"{name} must be {wanted} in {dtype}, got values from {low} to {high}: "
        f"bound it with {name}.clamp(1e-6, 1e6), or look for the NaN where it was computed"
    )
