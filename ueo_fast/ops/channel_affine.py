"""Scale and shift per channel as compiled ops: fake kernels and the autograd function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ueo_fast import backends
from ueo_fast.ops import registry
from ueo_fast.reference import compute_dtype


def _forward_fake(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    eps: float,
    residual: Tensor | None,
    dim: int,
    relu: bool,
) -> tuple[Tensor, Tensor]:
    bits = (x.numel() + 7) // 8 if relu and residual is not None else 0
    return torch.empty_like(x), x.new_empty(bits, dtype=torch.uint8)


def _backward_fake(
    grad_out: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    eps: float,
    bits: Tensor,
    dim: int,
    relu: bool,
    needs_x: bool,
    needs_weight: bool,
    needs_bias: bool,
    needs_residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    def by_channel(values: Tensor | None, needed: bool) -> Tensor:
        if values is None or not needed:
            return grad_out.new_empty(0)
        return values.new_empty(values.shape)

    return (
        torch.empty_like(grad_out) if needs_x else grad_out.new_empty(0),
        by_channel(weight, needs_weight),
        by_channel(bias, needs_bias),
        torch.empty_like(grad_out) if needs_residual else grad_out.new_empty(0),
    )


OPS = registry.Ops(
    "channel_affine",
    {"channel_affine_forward": _forward_fake, "channel_affine_backward": _backward_fake},
)


def is_dense(x: Tensor) -> bool:
    """Whether the elements fill their memory without gaps, in some order of the dimensions."""
    if x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)):
        return True
    # As csrc/channel_affine.h does. No sorting: the Dynamo of torch 2.11 sorts no dynamic sizes.
    expected = 1
    while expected < x.numel():
        sizes = [
            n for n, step in zip(x.shape, x.stride(), strict=True) if n > 1 and step == expected
        ]
        if not sizes:
            return False
        expected *= sizes[-1]
    return True


def _like(name: str, tensor: Tensor, shape: torch.Size, strides: tuple[int, ...]) -> Tensor:
    """``tensor`` with the given strides (where a size of 1 does not void them), else a copy."""
    same = all(
        size <= 1 or ours == wanted
        for size, ours, wanted in zip(shape, tensor.stride(), strides, strict=True)
    )
    if same:
        return tensor
    backends.check_memory(name, tensor)
    copy = torch.empty_strided(shape, strides, dtype=tensor.dtype, device=tensor.device)
    return copy.copy_(tensor)


def parameter(values: Tensor | None, x: Tensor) -> Tensor | None:
    """Convert ``values`` to the compute dtype, unless they have that or the dtype of ``x``."""
    dtype = compute_dtype(x.dtype)
    if values is None or values.dtype == dtype or values.dtype == x.dtype:
        return values
    return values.to(dtype)


def forward(
    backend: str,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    eps: float,
    residual: Tensor | None,
    dim: int,
    relu: bool,
) -> tuple[Tensor, Tensor]:
    """Without autograd: the result in the layout of the dense ``x``, and the mask's bits."""
    if residual is not None:
        residual = _like("residual", residual, x.shape, x.stride())
    return registry.of(backend).channel_affine_forward(
        x, weight, bias, mean, var, eps, residual, dim, relu
    )


def backward(
    backend: str,
    grad_out: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    bits: Tensor,
    eps: float,
    strides: tuple[int, ...],
    dim: int,
    relu: bool,
    needs: tuple[bool, bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients by x, weight, bias and the residual, (0,) for what is not needed."""
    grad_out = _like("grad_out", grad_out, grad_out.shape, strides)
    if x is not None:  # a hook may have kept it in another layout, as save_on_cpu(pin_memory=True)
        x = _like("x", x, grad_out.shape, strides)
    return registry.of(backend).channel_affine_backward(
        grad_out, x, weight, bias, mean, var, eps, bits, dim, relu, *needs
    )


def gradients(
    backend: str, grad_out: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """:func:`backward` within an autograd function."""
    compute: Any = _OnceDifferentiable.apply if torch.is_grad_enabled() else backward
    return compute(backend, grad_out, *arguments)


def kept_bias(bias: Tensor | None, is_read: bool) -> Tensor | None:
    """Return what to save of ``bias``: an empty tensor where backward needs only its dtype.

    A saved tensor must not change before backward; a step on biases alone, in between, may.
    """
    return bias if bias is None or is_read else torch.empty_like(bias)


class ChannelAffineFunction(torch.autograd.Function):
    """The op (csrc/library.cpp) for a dense ``x``; ``mean`` and ``var`` are constants."""

    @staticmethod
    def forward(
        ctx: Any,
        backend: str,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor | None,
        var: Tensor | None,
        eps: float,
        residual: Tensor | None,
        dim: int,
        relu: bool,
    ) -> Tensor:
        out, bits = forward(backend, x, weight, bias, mean, var, eps, residual, dim, relu)
        needs_sums = ctx.needs_input_grad[2] or ctx.needs_input_grad[3]
        # Where there is a residual the mask comes from the bits, else again from x.
        keeps_x = needs_sums or (relu and residual is None)
        bias = kept_bias(bias, is_read=relu and residual is None)
        ctx.save_for_backward(x if keeps_x else None, weight, bias, mean, var, bits)
        ctx.set_materialize_grads(False)
        ctx.backend = backend
        ctx.options = eps, x.stride(), dim, relu
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_out is None:  # the result is not part of what is differentiated
            return (None,) * 10
        *_, relu = ctx.options
        _, needs_x, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        needs_residual = ctx.needs_input_grad[7]
        # Without relu that of the residual is the upstream one.
        needs = needs_x, needs_weight, needs_bias, needs_residual and relu
        by_x = by_weight = by_bias = by_residual = None
        if any(needs):
            by_x, by_weight, by_bias, by_residual = gradients(
                ctx.backend, grad_out, *ctx.saved_tensors, *ctx.options, needs
            )
        if not relu:
            by_residual = grad_out
        return (
            None,
            by_x if needs_x else None,
            by_weight if needs_weight else None,
            by_bias if needs_bias else None,
            None,
            None,
            None,
            by_residual if needs_residual else None,
            None,
            None,
        )


class _OnceDifferentiable(torch.autograd.Function):
    """The gradients under ``create_graph=True``: see ueo_fast/ops/ueo_loss.py."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return backward(*args)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise RuntimeError(
            "the compiled channel_affine is differentiable once: "
            "use backend='reference' for second derivatives"
        )
