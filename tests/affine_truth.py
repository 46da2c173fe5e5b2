"""Results and gradients of the affine functions held to their float64 truth.

Rule: |ours - truth| <= |eager in the compute dtype - truth| + a stated tolerance (tests/truth.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from truth import HALF_ROUNDING, HALF_TINY

from ueo_fast.reference import compute_dtype

TOLERANCE = {torch.float64: 1e-14, torch.float32: 1e-6}
"""Relative to the norm; half results are judged element by element instead."""

Function = Callable[..., Tensor]
Arguments = Mapping[str, Tensor | None]


def differentiate(function: Function, arguments: Arguments, grad_out: Tensor) -> dict[str, Tensor]:
    """``out``, and by name the gradient of each argument that requires grad."""
    leaves = {name: value for name, value in arguments.items() if value is not None}
    leaves = {name: value for name, value in leaves.items() if value.requires_grad}
    out = function(**arguments)
    grads = torch.autograd.grad(out, list(leaves.values()), grad_out) if leaves else ()
    return {"out": out.detach(), **dict(zip(leaves, grads, strict=True))}


def _converted(arguments: Arguments, dtype: torch.dtype) -> dict[str, Tensor | None]:
    return {
        name: None
        if value is None
        else value.detach().to(dtype).clone().requires_grad_(value.requires_grad)
        for name, value in arguments.items()
    }


def assert_exact(
    ours: Mapping[str, Tensor], reference: Function, arguments: Arguments, grad_out: Tensor
) -> None:
    """Holds what :func:`differentiate` returned to the rule above."""
    compute = compute_dtype(grad_out.dtype)
    truth, eager = (
        differentiate(reference, _converted(arguments, dtype), grad_out.to(dtype))
        for dtype in (torch.float64, compute)
    )
    assert ours.keys() == truth.keys()
    for name, got in ours.items():
        true = truth[name]
        like = grad_out if name == "out" else arguments[name]
        assert like is not None
        assert got.dtype == like.dtype, name
        assert got.shape == true.shape, name
        error = (got.double() - true).abs()
        allowed = (eager[name].double() - true).abs()
        if got.dtype in HALF_ROUNDING:
            bound = allowed + HALF_ROUNDING[got.dtype] * 1.001 * true.abs() + HALF_TINY[got.dtype]
            bound = bound + TOLERANCE[compute] * (true.abs().amax() if true.numel() else 0)
            assert bool((error <= bound).all()), f"{name}: {(error - bound).amax():.3g} too far"
        else:
            bound = allowed.norm() + TOLERANCE[got.dtype] * true.norm()
            assert error.norm() <= bound, f"{name}: error {error.norm():.3g} > {bound:.3g}"
