"""Time of the affine layers, forward and backward, against their baselines.

Contenders take turns, as in bench_ueo_loss.py. `python -m benchmarks affine` runs this file and
writes CSVs.
"""

from __future__ import annotations

import functools
import os

import pytest
import torch

from benchmarks import affine_cases, turns
from benchmarks.affine_cases import AffineCase

CONTENDERS = ("ueo_fast", "eager", "compile", "floor")
BACKEND = os.environ.get("UEO_FAST_BENCH_BACKEND", "auto")
CASES = {
    "": affine_cases.CASES,
    "few": affine_cases.FEW,
    "tiny": affine_cases.DRY_CASES,
}[os.environ.get("UEO_FAST_BENCH_CASES", "")]


class Tensors:
    """The tensors of a case, shared by its contenders."""

    def __init__(self, case: AffineCase) -> None:
        (self.x,) = affine_cases.make_inputs(case, 1, torch.device("cpu"))
        self.constants = affine_cases.make_constants(case, self.x)


@functools.lru_cache(maxsize=1)
def tensors(case: AffineCase) -> Tensors:
    return Tensors(case)


def contender(name: str, case: AffineCase) -> turns.Run:
    shared = tensors(case)
    if name == "floor":
        return affine_cases.floor(case, shared.x)
    backend = BACKEND if name == "ueo_fast" else name
    run = affine_cases.make_pass(backend, case, shared.constants)
    if name == "ueo_fast":
        truth = affine_cases.make_pass("eager", case, shared.constants)(shared.x)
        wrong = affine_cases.disagreement(run(shared.x), truth, case)
        assert not wrong, f"{case}: {wrong}"
    return lambda: run(shared.x)


@pytest.fixture(scope="module")
def prepared():
    return turns.Prepared(contender, warm_up=2)


@pytest.mark.parametrize("name", CONTENDERS)
@pytest.mark.parametrize("repeat", range(turns.REPEATS))
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_backward(benchmark, prepared, case, repeat, name):
    run, seconds = prepared.get(case, name)
    calls = turns.calls(seconds, least=1)
    benchmark.group = str(case)
    benchmark.extra_info.update(**case.key, contender=name, repeat=repeat)
    benchmark.pedantic(run, rounds=calls, warmup_rounds=1 if seconds < turns.SLICE_SECONDS else 0)
