"""The shapes and contenders of the loss's benchmark, for time and memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ueo_fast import ueo_loss

# (B, C): design targets first, then sizes with little to gain.
SHAPES = (
    (64, 345),
    (256, 1000),
    (1024, 1000),
    (4096, 1000),
    (65536, 345),
    (4096, 21841),
    (8, 10),
    (65536, 10),
)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Case:
    rows: int
    columns: int
    dtype: str = "float32"

    def logits(self) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        z = 3 * torch.randn(self.rows, self.columns, generator=generator)
        return z.to(DTYPES[self.dtype]).requires_grad_()

    @property
    def bytes(self) -> int:
        return self.rows * self.columns * DTYPES[self.dtype].itemsize

    @property
    def key(self) -> dict[str, object]:
        """Its columns in a CSV."""
        return {"rows": self.rows, "columns": self.columns, "dtype": self.dtype}

    def __str__(self) -> str:
        return f"{self.rows}x{self.columns}-{self.dtype}"


CASES = tuple(Case(*shape) for shape in SHAPES) + tuple(
    Case(*shape, "bfloat16") for shape in ((1024, 1000), (65536, 345))
)


def authors_loss(logits: Tensor) -> Tensor:
    """(a) The expression of the released code: two B x B diagonal matrices, eps 1e-5."""
    softmax = logits.float().softmax(dim=1)
    w = softmax.detach().amax(dim=1)
    normalized = torch.diag(w / w.sum())
    inverse = torch.diag((1 / w) / (1 / w).sum())
    entropy = (-softmax * torch.log(softmax + 1e-5)).sum(dim=1, keepdim=True)
    mean = (inverse @ softmax).sum(dim=0)
    return (normalized @ entropy).sum() + (mean * torch.log(mean + 1e-5)).sum()


def eager_loss(logits: Tensor) -> Tensor:
    """(b) The same equations as ours, written well in plain PyTorch: no B x B matrix."""
    log_p = logits.float().log_softmax(dim=1)
    p = log_p.exp()
    w = p.detach().amax(dim=1)
    v = 1 / w
    conditional = (w / w.sum()) @ -(p * log_p).sum(dim=1)
    q = (v / v.sum()) @ p
    return conditional + (q * q.log()).sum()


@dataclass
class Step:
    """One forward and backward pass of a loss; its gradient lands in ``logits.grad``."""

    loss: Callable[[Tensor], Tensor]
    logits: Tensor

    def __call__(self) -> None:
        self.logits.grad = None
        self.loss(self.logits).backward()


def floor(logits: Tensor) -> Callable[[], None]:
    """Two reads and one write of the logits' memory by PyTorch: a sum, then a copy."""
    source = logits.detach()
    target = torch.empty_like(source)

    def run() -> None:
        source.sum()
        target.copy_(source)

    return run


CONTENDERS = ("ueo_fast", "eager", "compile", "authors", "floor")


def contender(name: str, case: Case) -> Callable[[], None] | None:
    """Make a forward and backward pass to call repeatedly; None if it would take too long."""
    logits = case.logits()
    if name == "ueo_fast":
        return Step(ueo_loss, logits)
    if name == "eager":
        return Step(eager_loss, logits)
    if name == "compile":
        torch.compiler.reset()
        return Step(torch.compile(eager_loss, dynamic=False), logits)
    if name == "floor":
        return floor(logits)
    if case.rows > 1024:  # the B x B matrices: 16 s a call at 4096 x 21841, 34 GB at B = 65536
        return None
    return Step(authors_loss, logits)
