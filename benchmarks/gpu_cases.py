"""The shapes and the contenders of the loss's benchmark on a GPU."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.cases import DTYPES, Case, eager_loss
from ueo_fast import backends, ueo_loss, ueo_loss_and_grad

SHAPES = (
    (16384, 1000),
    (65536, 345),
    (4096, 21841),
    (4096, 1000),
    (1024, 1000),
    (256, 1000),
    (64, 345),
)
"""Those that predictions and targets are about first: time may run out."""
LARGEST = Case(65536, 21841, "bfloat16")  # float32 would leave no room for plain PyTorch
CASES = (*(Case(*shape, dtype) for shape in SHAPES for dtype in DTYPES), LARGEST)
DRY_CASES = (Case(8, 10), Case(8, 10, "bfloat16"), Case(64, 37))

Pass = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Forward and backward: logits that require grad in, the loss and its gradient out."""


@dataclass(frozen=True)
class Contender:
    name: str  # as in the CSVs
    label: str  # as in the docs
    make: Callable[[], Pass]
    float32_copies: float  # of the logits, that a pass may hold at once, from above
    unavailable: Callable[[], str | None] = lambda: None


def through_autograd(loss_of: Callable[[Tensor], Tensor]) -> Pass:
    """``autograd.grad`` rather than ``backward``: nothing accumulates, so graphs can capture it."""

    def run(logits: Tensor) -> tuple[Tensor, Tensor]:
        loss = loss_of(logits)
        (grad,) = torch.autograd.grad(loss, logits)
        return loss.detach(), grad

    return run


def ours(backend: str) -> Contender:
    return Contender(
        backend,
        f'`backend="{backend}"`',
        lambda: through_autograd(functools.partial(ueo_loss, backend=backend)),
        1.1,
        lambda: backends.unavailable_reason(backend),
    )


def _at_once(backend: str) -> Contender:
    return Contender(
        "loss_and_grad",
        "`ueo_loss_and_grad`",
        lambda: functools.partial(ueo_loss_and_grad, backend=backend),
        1.1,
        lambda: backends.unavailable_reason(backend),
    )


def _compiled(compiler: str) -> Contender:
    def make() -> Pass:
        torch.compiler.reset()  # or the shapes before would count against the recompilation limit
        return through_autograd(torch.compile(eager_loss, dynamic=False, backend=compiler))

    return Contender("compile", "(c) compile", make, 4)


def _liger_error() -> str | None:
    if importlib.util.find_spec("liger_kernel") is None:
        return "liger_kernel is not installed"
    return None


def liger_loss(logits: Tensor) -> Tensor:
    """(d) Liger-Kernel's fused softmax; it has no entropy of given logits, so the rest is eager."""
    from liger_kernel.ops.softmax import LigerSoftmaxFunction

    p = LigerSoftmaxFunction.apply(logits.float())
    w = p.detach().amax(dim=1)
    v = 1 / w
    conditional = (w / w.sum()) @ -(p * p.log()).sum(dim=1)
    q = (v / v.sum()) @ p
    return conditional + (q * q.log()).sum()


EAGER = Contender("eager", "(b) eager", lambda: through_autograd(eager_loss), 6)
CONTENDERS = (
    ours("cuda"),
    ours("triton"),
    _at_once("cuda"),
    EAGER,
    Contender("liger", "(d) Liger", lambda: through_autograd(liger_loss), 8, _liger_error),
)
ROUNDS = (CONTENDERS, (ours("cuda"), _compiled("inductor")))
"""Compilers take seconds for every shape: theirs is a second round over all shapes, in which they
take turns with one of ours again."""
DRY_ROUNDS = ((ours("cpp"), _at_once("cpp"), EAGER), (ours("cpp"), _compiled("eager")))
LABELS = {one.name: one.label for round in (*ROUNDS, *DRY_ROUNDS) for one in round}
LABELS["patched"] = "patched"
COPY = "copy"
"""Name in the CSV of the large device-to-device copy that the floors are counted from."""


def make_inputs(case: Case, count: int, device: torch.device) -> list[Tensor]:
    """Different random logits, never zeros: those run faster than real data."""
    generator = torch.Generator(device).manual_seed(0)
    options = {"generator": generator, "device": device, "dtype": DTYPES[case.dtype]}
    shape = case.rows, case.columns
    # In place and in the final dtype: a float32 draw would not fit next to the largest case.
    return [torch.randn(shape, **options).mul_(3).requires_grad_() for _ in range(count)]


def inputs_wanted(case: Case, cache_bytes: int) -> int:
    """How many inputs take turns: one where a step would find its logits in the cache as well.

    From a quarter of the cache on, four times the cache and at least two: what is read has then
    left it.
    """
    if case.bytes < cache_bytes / 4:
        return 1
    return max(2, -(-4 * cache_bytes // case.bytes))


def lack_of_memory(one: Contender, case: Case, free_bytes: int) -> str | None:
    """Why a contender is not even tried; None if it should fit."""
    needed = one.float32_copies * 4 * case.rows * case.columns
    if needed <= 0.9 * free_bytes:
        return None
    return f"needs about {needed / 2**30:.0f} GiB besides the logits, {free_bytes / 2**30:.0f} free"
