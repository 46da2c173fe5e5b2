"""Time of a whole training step with 300 class names: ours against the authors'.

Contenders take turns, as in bench_ueo_loss.py. The first turn is the only warm-up, as a step takes
up to a minute; a median over three turns leaves it out. `python -m benchmarks step` runs this
file, one case in a process, and writes a CSV. UEO_FAST_BENCH_CASES names one case.
"""

from __future__ import annotations

import os

import pytest
import torch

from benchmarks import step_cases, turns, visual_cases
from benchmarks.step_cases import CONTENDERS, LOSSES_OFF, PARTS, Step

CASES = step_cases.CASES
if chosen := os.environ.get("UEO_FAST_BENCH_CASES"):
    CASES = tuple(case for case in (*CASES, *step_cases.DRY_CASES) if str(case) == chosen)


@pytest.fixture(scope="module")
def losses():
    """Losses of the first contender, by case and turn."""
    return {}


@pytest.fixture(scope="module")
def prepared():
    """A function of case and name that keeps the contenders of one case at a time."""
    torch.set_num_threads(int(os.environ.get("UEO_FAST_BENCH_THREADS", "2")))
    steps = {}

    def get(case, name):
        for other in [key for key in steps if key[0] != case]:
            del steps[other]
        if (case, name) not in steps:
            steps[case, name] = Step(name, case)
        return steps[case, name]

    return get


@pytest.mark.skipif(
    visual_cases.unavailable_reason() is not None, reason=str(visual_cases.unavailable_reason())
)
@pytest.mark.parametrize("name", CONTENDERS)
@pytest.mark.parametrize("repeat", range(turns.REPEATS))
@pytest.mark.parametrize("case", CASES, ids=str)
def test_step(benchmark, prepared, losses, case, repeat, name):
    step = prepared(case, name)
    benchmark.group = str(case)
    loss, parts = benchmark.pedantic(step, rounds=1)
    assert abs(losses.setdefault((case, repeat), loss) - loss) <= LOSSES_OFF
    benchmark.extra_info.update(
        model=case.model,
        batch=case.batch,
        classes=case.classes,
        contender=name,
        repeat=repeat,
        loss=loss,
        parts={part: parts[part] for part in PARTS},
    )
