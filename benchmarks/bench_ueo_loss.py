"""Time of the loss, forward and backward, against its baselines.

Contenders take turns: every repeat measures each of them once, so a busy moment of the machine
affects all of them. `python -m benchmarks` runs this file and writes a CSV.
"""

from __future__ import annotations

import pytest

from benchmarks import turns
from benchmarks.cases import CASES, CONTENDERS, contender


@pytest.fixture(scope="module")
def prepared():
    return turns.Prepared(contender)


@pytest.mark.parametrize("name", CONTENDERS)
@pytest.mark.parametrize("repeat", range(turns.REPEATS))
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_backward(benchmark, prepared, case, repeat, name):
    ready = prepared.get(case, name)
    if ready is None:
        pytest.skip(f"{name} takes too long or too much memory at {case}")
    run, seconds = ready
    benchmark.group = str(case)
    benchmark.extra_info.update(**case.key, contender=name, repeat=repeat)
    benchmark.pedantic(run, rounds=turns.calls(seconds), warmup_rounds=2)
