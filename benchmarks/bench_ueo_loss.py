"""Time of the loss, forward and backward, against its baselines.

Contenders take turns: every repeat measures each of them once, so that a busy moment of the
machine hits all alike. `python -m benchmarks` runs this file and condenses it into a CSV.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import pytest
import torch

from benchmarks.cases import CASES, CONTENDERS, Case, contender

REPEATS = int(os.environ.get("UEO_FAST_BENCH_REPEATS", "7"))
SLICE_SECONDS = 0.05
"""About how long one contender is measured before the next one's turn."""


@pytest.fixture(scope="module")
def prepared():
    """Contenders of the case in hand, built and warmed up once: compilation is not measured."""
    torch.set_num_threads(int(os.environ.get("UEO_FAST_BENCH_THREADS", "2")))
    cache: dict[tuple[Case, str], tuple[Callable[[], None], float] | None] = {}

    def get(case: Case, name: str) -> tuple[Callable[[], None], float] | None:
        if (case, name) not in cache:
            for other in [key for key in cache if key[0] != case]:
                del cache[other]  # one case's tensors at a time
            run = contender(name, case)
            if run is not None:
                for _ in range(3):
                    run()
                start = time.perf_counter()
                run()
                cache[case, name] = run, time.perf_counter() - start
            else:
                cache[case, name] = None
        return cache[case, name]

    return get


@pytest.mark.parametrize("name", CONTENDERS)
@pytest.mark.parametrize("repeat", range(REPEATS))
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_backward(benchmark, prepared, case, repeat, name):
    ready = prepared(case, name)
    if ready is None:
        pytest.skip(f"{name} takes too long or too much memory at {case}")
    run, seconds = ready
    calls = max(3, min(200, round(SLICE_SECONDS / seconds)))
    benchmark.group = str(case)
    benchmark.extra_info.update(
        rows=case.rows, columns=case.columns, dtype=case.dtype, contender=name, repeat=repeat
    )
    benchmark.pedantic(run, rounds=calls, warmup_rounds=2)
