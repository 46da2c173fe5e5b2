"""Time of a visual tower's forward and backward, patched or not; only its affines are trained.

Contenders take turns, as in bench_ueo_loss.py. `python -m benchmarks visual` runs this file and
writes a CSV.
"""

from __future__ import annotations

import os

import pytest
import torch

from benchmarks import turns, visual_cases
from benchmarks.visual_cases import CONTENDERS, Step, VisualCase

CASES = (
    visual_cases.DRY_CASES
    if os.environ.get("UEO_FAST_BENCH_CASES") == "tiny"
    else visual_cases.CASES
)


def contender(name: str, case: VisualCase) -> turns.Run | None:
    if name == "compile" and case not in visual_cases.COMPILED:
        return None
    step = Step(name, case, torch.device("cpu"))
    if name == "patched":
        true = Step("eager", case, torch.device("cpu"))()
        wrong = visual_cases.disagreement(step(), true, case)
        assert not wrong, f"{case}: {wrong}"
    return step


@pytest.fixture(scope="module")
def prepared():
    return turns.Prepared(contender, warm_up=0)  # the call that estimates the time is one


@pytest.mark.skipif(
    visual_cases.unavailable_reason() is not None, reason=str(visual_cases.unavailable_reason())
)
@pytest.mark.parametrize("name", CONTENDERS)
@pytest.mark.parametrize("repeat", range(turns.REPEATS))
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_backward(benchmark, prepared, case, repeat, name):
    ready = prepared.get(case, name)
    if ready is None:
        pytest.skip(f"{name} takes too long at {case}")
    run, seconds = ready
    benchmark.group = str(case)
    benchmark.extra_info.update(**case.key, contender=name, repeat=repeat)
    benchmark.pedantic(run, rounds=turns.calls(seconds, least=1))
