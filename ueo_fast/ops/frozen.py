"""What the operations that save no input for backward have in common."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ueo_fast import backends


def is_traced(x: object) -> bool:
    """Whether a tracer records what is done to ``x``: it is to see PyTorch's own operations.

    torch.jit.trace does, and torch.fx, whose proxies are not tensors. Whatever else is not a tensor
    is left to PyTorch's operations as well, for their errors.
    """
    return not isinstance(x, Tensor) or bool(torch.jit.is_tracing())  # type: ignore[attr-defined]


def saves_nothing(x: Tensor, weight: Tensor | None = None) -> bool:
    """Whether our autograd function is to run rather than PyTorch's own operation.

    Args:
        x: the input.
        weight: of the operation, if it has one.
    """
    if is_traced(x) or not (torch.is_grad_enabled() and x.requires_grad):
        return False  # nothing is saved anyway
    if x.is_meta:
        return False  # it has no memory, and autocast does not know the device
    if not x.is_floating_point():
        return False  # a complex convolution is several real ones
    backends.check_memory("input", x)
    if weight is not None:
        if weight.requires_grad:
            return False  # its gradient needs the input
        if type(weight) not in (Tensor, nn.Parameter):
            return False  # a quantised or distributed weight has operations of its own
        backends.check_memory("weight", weight)
    return not backends.is_transformed(x)


def dense_strides(x: Tensor) -> tuple[int, ...]:
    """Strides of ``torch.empty_like(x)``: those of ``x``, without its gaps."""
    if x.is_contiguous():
        return x.stride()
    return torch.empty_like(x, device="meta").stride()


def stand_in(
    shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """A tensor in place of an input whose values nobody reads, for the length of one call.

    PyTorch's backward takes from the input its shape and its layout, and makes the gradient in
    that layout. Memory that is not written to costs nothing on the CPU. A single element, expanded,
    would be no memory at all, but has no layout: the gradient comes out contiguous where eager's
    is channels_last, and oneDNN and cuDNN first copy such an input into one that is dense.
    """
    return torch.empty_strided(tuple(shape), tuple(strides), dtype=dtype, device=device)
