"""The shapes and the contenders of the affine layers' benchmark, on a CPU and on a GPU."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import DTYPES
from ueo_fast import channel_affine, frozen_batch_norm, layer_norm

EPS = 1e-5
TOLERANCE = {"float32": 5e-3, "bfloat16": 0.1}
"""Relative difference between contenders: only enough to tell a wrong one from a right one. Where a
sum is 0 up to rounding, the ReLU passes a gradient in one and not in the other."""

Pass = Callable[[Tensor], tuple[Tensor, ...]]
"""Forward and backward: an input that requires grad in, the output and all gradients out."""


@dataclass(frozen=True)
class AffineCase:
    """``op``: bn, bn+relu, bn+add+relu, affine (channels last) or layer_norm."""

    op: str
    shape: tuple[int, ...]
    layout: str = "contiguous"
    dtype: str = "float32"

    @property
    def key(self) -> dict[str, object]:
        """Its columns in a CSV."""
        shape = "x".join(map(str, self.shape))
        return {"op": self.op, "shape": shape, "layout": self.layout, "dtype": self.dtype}

    @property
    def channels(self) -> int:
        return self.shape[1 if self.op.startswith("bn") else -1]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    @property
    def moves(self) -> float:
        """How often memory of the input's size must be read or written, forward and backward.

        Forward reads x and writes y; backward reads x and the gradient and writes another. A
        residual is read once, and so is its gradient written.
        """
        return 7 if "add" in self.op else 5

    def __str__(self) -> str:
        return "-".join(map(str, self.key.values()))


def _cases() -> tuple[AffineCase, ...]:
    """RN50's at 224 pixels: the target's first, then sizes with little to gain.

    These include sizes around ``ueo_fast.patch.norms.MIN_ELEMENTS``.
    """
    target = (64, 256, 56, 56)
    grid = [
        AffineCase(op, target, layout, dtype)
        for op in ("bn+relu", "bn+add+relu")
        for dtype in DTYPES
        for layout in ("contiguous", "channels_last")
    ]
    more = [
        AffineCase(op, shape)
        for op, shape in (
            ("bn", target),
            ("bn+relu", (64, 64, 112, 112)),
            ("bn+relu", (64, 512, 28, 28)),
            ("bn+add+relu", (64, 2048, 7, 7)),
            ("bn+relu", (16, 256, 56, 56)),
        )
    ]
    small = [  # around the size from which a patched tower fuses
        AffineCase("bn+relu", (batch, 64, 56, 56), layout)
        for batch in (1, 2, 4)
        for layout in ("contiguous", "channels_last")
    ]
    transformer = [AffineCase("affine", (64, 197, 768), dtype=dtype) for dtype in DTYPES]
    return (*grid, *more, *small, *transformer)


CASES = _cases()
FEW = tuple(case for case in CASES if case.shape[0] > 1 and case.dtype == "float32"
            and case.shape[1:] in ((256, 56, 56), (2048, 7, 7), (197, 768)))  # fmt: skip
"""For the default allocator, whose page faults make everything slow."""
GPU_CASES = (
    *(
        AffineCase(op, (64, 256, 56, 56), layout, dtype)
        for op in ("bn+relu", "bn+add+relu")
        for dtype in DTYPES
        for layout in ("contiguous", "channels_last")
    ),
    *(AffineCase("bn+relu", (64, 2048, 7, 7), dtype=dtype) for dtype in DTYPES),
    *(
        AffineCase(op, (64, 197, 768), dtype=dtype)
        for op in ("affine", "layer_norm")
        for dtype in DTYPES
    ),
)
DRY_CASES = (
    AffineCase("bn+relu", (2, 3, 4, 4)),
    AffineCase("bn+add+relu", (2, 3, 4, 4), "channels_last", "bfloat16"),
    AffineCase("bn", (2, 3, 4, 4)),
    AffineCase("affine", (2, 3, 8)),
    AffineCase("layer_norm", (2, 3, 8)),
)


@dataclass(frozen=True)
class Constants:
    """What a pass takes besides its input; parameters are float32, as under autocast."""

    weight: Tensor
    bias: Tensor
    mean: Tensor
    variance: Tensor
    residual: Tensor | None
    grad: Tensor


def make_inputs(case: AffineCase, count: int, device: torch.device) -> list[Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    format = torch.channels_last if case.layout == "channels_last" else torch.contiguous_format
    options = {"generator": generator, "device": device, "dtype": DTYPES[case.dtype]}
    return [
        torch.randn(case.shape, **options).contiguous(memory_format=format).requires_grad_()
        for _ in range(count)
    ]


def make_constants(case: AffineCase, x: Tensor) -> Constants:
    generator = torch.Generator(x.device).manual_seed(1)
    draws = torch.randn(4, case.channels, generator=generator, device=x.device)
    weight, bias, mean = (draws[i].clone().requires_grad_(i < 2) for i in range(3))
    residual = None
    with torch.no_grad():  # strides as those of x
        if "add" in case.op:
            residual = torch.empty_like(x).copy_(x.flip(1)).requires_grad_()
        grad = torch.empty_like(x, requires_grad=False).copy_(x.flip(0))
    return Constants(weight, bias, mean, draws[3].exp(), residual, grad)


def eager(op: str, x: Tensor, c: Constants) -> Tensor:
    """(b) Plain PyTorch, in place where open_clip's towers are."""
    if op == "affine":  # one pass; x * scale + shift would be two
        return torch.addcmul(c.bias.to(x.dtype), x, c.weight.to(x.dtype))
    if op == "layer_norm":
        return F.layer_norm(x, x.shape[-1:], c.weight.to(x.dtype), c.bias.to(x.dtype), EPS)
    y = F.batch_norm(x, c.mean, c.variance, c.weight, c.bias, False, 0.0, EPS)
    if c.residual is not None:
        y += c.residual
    return y.relu_() if "relu" in op else y


def ours(op: str, x: Tensor, c: Constants, backend: str) -> Tensor:
    if op == "affine":
        return channel_affine(x, c.weight, c.bias, -1, backend=backend)
    if op == "layer_norm":
        return layer_norm(x, c.weight, c.bias, EPS, backend=backend)
    return frozen_batch_norm(
        x, c.weight, c.bias, c.mean, c.variance, EPS,
        activation="relu" if "relu" in op else "none", residual=c.residual, backend=backend,
    )  # fmt: skip


def make_pass(name: str, case: AffineCase, constants: Constants) -> Pass:
    """``name``: eager, compile, or a backend of ours."""
    if name in ("eager", "compile"):
        forward = functools.partial(eager, case.op)
    else:
        forward = functools.partial(ours, case.op, backend=name)
    if name == "compile":
        torch.compiler.reset()  # or the cases before would count against the recompilation limit
        forward = torch.compile(forward, dynamic=False)
    trained = [constants.weight, constants.bias]
    trained += [] if constants.residual is None else [constants.residual]

    def run(x: Tensor) -> tuple[Tensor, ...]:
        y = forward(x, constants)
        return y.detach(), *torch.autograd.grad(y, [x, *trained], constants.grad)

    return run


def floor(case: AffineCase, x: Tensor) -> Callable[[], None]:
    """As many bytes as must be read and written, moved by PyTorch's copies between two tensors."""
    source = x.detach().as_strided((x.numel(),), (1,))
    target = torch.empty_like(source)
    whole, rest = divmod(case.moves, 2)
    part = source[: int(rest * source.numel() / 2)], target[: int(rest * source.numel() / 2)]

    def run() -> None:
        for _ in range(int(whole)):
            target.copy_(source)
        part[1].copy_(part[0])

    return run


def disagreement(ours: tuple[Tensor, ...], true: tuple[Tensor, ...], case: AffineCase) -> str:
    """What is wrong with a contender's output or gradients; empty if nothing is."""
    names = ("output", "gradient of x", "gradient of weight", "gradient of bias", "of residual")
    for name, found, expected in zip(names, ours, true, strict=False):
        difference = (found.float() - expected.float()).norm() / expected.float().norm()
        if not float(difference) <= TOLERANCE[case.dtype]:
            return f"wrong: {name} off by {float(difference):.2g}"
    return ""
