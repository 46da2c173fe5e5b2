"""What a call of the loss costs besides its arithmetic, at sizes where that shows.

Contenders take turns of a millisecond. The table shows differences between contenders, which are
lost in the medians of a busy machine, so it uses the lowest times, those of undisturbed turns.
`python -m benchmarks calls` writes the CSV.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import ueo_fast.ops.ueo_loss  # loads the ops
from benchmarks import results_file

CALLS = 20
"""In a turn."""
Run = Callable[[], Tensor | None]


class Case(NamedTuple):
    rows: int
    columns: int
    confidence: str  # "own": the maximum of the softmax; "given": a tensor

    def inputs(self) -> tuple[Tensor, Tensor | None]:
        generator = torch.Generator().manual_seed(0)
        logits = 3 * torch.randn(self.rows, self.columns, generator=generator)
        confidence = torch.rand(self.rows, generator=generator) + 0.1
        return logits.requires_grad_(), confidence if self.confidence == "given" else None


CASES = [
    Case(rows, columns, confidence)
    for rows, columns in ((8, 10), (64, 345))
    for confidence in ("own", "given")
]
CONTENDERS = ("engine", "ops", "function", "ueo_fast")
"""``x.sum().backward()``; the two C++ ops; an ``autograd.Function`` of just these two; ours."""


def contender(name: str, case: Case) -> Run:
    """Make a forward and backward pass; the gradient is new in every call, as in training."""
    logits, confidence = case.inputs()
    constant, one = logits.detach(), torch.ones(())
    op_forward = torch.ops.ueo_fast.ueo_loss_forward.default
    op_backward = torch.ops.ueo_fast.ueo_loss_backward.default

    class OneOp(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, logits: Tensor, confidence: Tensor | None) -> Tensor:
            loss, saved = op_forward(logits, confidence, None, 1.0, 1.0, 0.0)
            ctx.save_for_backward(logits, saved)
            return loss

        @staticmethod
        def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor, None]:
            logits, saved = ctx.saved_tensors
            return op_backward(grad_loss, logits, saved, 1.0, 0.0), None

    def engine() -> Tensor | None:
        logits.grad = None
        logits.sum().backward()
        return None

    def ops() -> Tensor:
        _, saved = op_forward(constant, confidence, None, 1.0, 1.0, 0.0)
        return op_backward(one, constant, saved, 1.0, 0.0)

    def function() -> Tensor | None:
        logits.grad = None
        OneOp.apply(logits, confidence).backward()
        return logits.grad

    def ours() -> Tensor | None:
        logits.grad = None
        ueo_fast.ueo_loss(logits, confidence).backward()
        return logits.grad

    run = {"engine": engine, "ops": ops, "function": function, "ueo_fast": ours}[name]
    if name != "engine":
        assert torch.equal(run(), ops())
    return run


def _microseconds(run: Run) -> float:
    start = time.perf_counter()
    for _ in range(CALLS):
        run()
    return 1e6 * (time.perf_counter() - start) / CALLS


def measure(repeats: int) -> list[dict[str, object]]:
    """One row per case and contender, over its turns: microseconds a call."""
    rows: list[dict[str, object]] = []
    for case in CASES:
        runs = {name: contender(name, case) for name in CONTENDERS}
        for run in runs.values():
            _microseconds(run)
        turns: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(repeats):
            for name, run in runs.items():
                turns[name].append(_microseconds(run))
        for name, times in turns.items():
            rows.append({**case._asdict(), "contender": name, **results_file.spread(times)})
    return rows
