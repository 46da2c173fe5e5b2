"""Scale and shift per channel as compiled ops: fake kernels and the autograd function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ueo_fast import backends
from ueo_fast.ops import registry


def _forward_fake(
    x: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None, dim: int, relu: bool
) -> tuple[Tensor, Tensor]:
    bits = (x.numel() + 7) // 8 if relu and residual is not None else 0
    return torch.empty_like(x), x.new_empty(bits, dtype=torch.uint8)


def _backward_fake(
    grad_out: Tensor,
    x: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    center: Tensor,
    bits: Tensor,
    dim: int,
    relu: bool,
    needs_x: bool,
    needs_sums: bool,
    needs_residual: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(grad_out) if needs_x else grad_out.new_empty(0),
        scale.new_empty(2, scale.shape[0]) if needs_sums else scale.new_empty(0),
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
    expected = 1
    left = [dim for dim in range(x.dim()) if x.shape[dim] != 1]
    while left:  # searched, not sorted: Dynamo cannot sort sizes that it does not know
        following = [dim for dim in left if x.stride(dim) == expected]
        if not following:
            return False
        expected *= x.shape[following[0]]
        left.remove(following[0])
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


def forward(
    backend: str,
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    dim: int,
    relu: bool,
) -> tuple[Tensor, Tensor]:
    """Without autograd: the result in the layout of the dense ``x``, and the mask's bits."""
    if residual is not None:
        residual = _like("residual", residual, x.shape, x.stride())
    return registry.of(backend).channel_affine_forward(x, scale, shift, residual, dim, relu)


def backward(
    backend: str,
    grad_out: Tensor,
    x: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    center: Tensor,
    bits: Tensor,
    strides: tuple[int, ...],
    dim: int,
    relu: bool,
    needs_x: bool,
    needs_sums: bool,
    needs_residual: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients by x and the residual and the sums (2, channels): see csrc/library.cpp."""
    grad_out = _like("grad_out", grad_out, grad_out.shape, strides)
    return registry.of(backend).channel_affine_backward(
        grad_out, x, scale, shift, center, bits, dim, relu, needs_x, needs_sums, needs_residual
    )


class ChannelAffineFunction(torch.autograd.Function):
    """``act(x * scale + shift (+ residual))`` for a dense ``x``, channels in dimension ``dim``.

    What returns as gradient by ``scale`` is the sum of ``g (x - center)``: ``sum g x - center *
    sum g`` would lose digits. It is right where ``shift`` holds a detached ``- center * scale``,
    as in batch normalisation by its running mean, or ``center`` is zero.
    """

    @staticmethod
    def forward(
        ctx: Any,
        backend: str,
        x: Tensor,
        scale: Tensor,
        shift: Tensor,
        center: Tensor,
        residual: Tensor | None,
        dim: int,
        relu: bool,
    ) -> Tensor:
        out, bits = forward(backend, x, scale, shift, residual, dim, relu)
        needs_sums = ctx.needs_input_grad[2] or ctx.needs_input_grad[3]
        # Where there is a residual the mask comes from the bits, else again from x.
        keeps_x = needs_sums or (relu and residual is None)
        ctx.save_for_backward(x if keeps_x else None, scale, shift, center, bits)
        ctx.set_materialize_grads(False)
        ctx.backend = backend
        ctx.strides = x.stride()
        ctx.options = dim, relu
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_out is None:  # the result is not part of what is differentiated
            return (None,) * 8
        dim, relu = ctx.options
        _, needs_x, needs_scale, needs_shift, _, needs_residual, _, _ = ctx.needs_input_grad
        needs_sums = needs_scale or needs_shift
        grad_x = sums = grad_residual = None
        if needs_x or needs_sums or relu:
            compute: Any = OnceDifferentiable.apply if torch.is_grad_enabled() else backward
            grad_x, sums, grad_residual = compute(
                ctx.backend,
                grad_out,
                *ctx.saved_tensors,
                ctx.strides,
                dim,
                relu,
                needs_x,
                needs_sums,
                needs_residual and relu,
            )
        if needs_residual and not relu:
            grad_residual = grad_out  # it passes unchanged
        return (
            None,
            grad_x if needs_x else None,
            sums[1] if sums is not None and needs_scale else None,
            sums[0] if sums is not None and needs_shift else None,
            None,
            grad_residual if needs_residual else None,
            None,
            None,
        )


class OnceDifferentiable(torch.autograd.Function):
    """The gradients under ``create_graph=True``: see ueo_fast/ops/ueo_loss.py."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        return backward(*args)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise RuntimeError(
            "the compiled channel_affine is differentiable once: "
            "use backend='reference' for second derivatives"
        )
