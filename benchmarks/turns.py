"""Prepare contenders once and measure them in turns: what the pytest-benchmark files share."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Hashable

import torch

from benchmarks import instruction_set

REPEATS = int(os.environ.get("UEO_FAST_BENCH_REPEATS", "7"))
SLICE_SECONDS = 0.05
"""About how long a contender is measured before the next one has its turn."""

Run = Callable[[], object]


class Prepared:
    """The contenders of one case, built and warmed up once, so compilation is not measured."""

    def __init__(self, make: Callable[[str, Hashable], Run | None], warm_up: int = 3) -> None:
        instruction_set.verify()
        torch.set_num_threads(int(os.environ.get("UEO_FAST_BENCH_THREADS", "2")))
        self._make = make
        self._warm_up = warm_up
        self._ready: dict[tuple[Hashable, str], tuple[Run, float] | None] = {}

    def get(self, case: Hashable, name: str) -> tuple[Run, float] | None:
        """The contender and about how many seconds a call takes; None if it is left out."""
        if (case, name) not in self._ready:
            for other in [key for key in self._ready if key[0] != case]:
                del self._ready[other]  # one case's tensors at a time
            run = self._make(name, case)
            self._ready[case, name] = None if run is None else (run, self._seconds(run))
        return self._ready[case, name]

    def _seconds(self, run: Run) -> float:
        for _ in range(self._warm_up):
            run()
        start = time.perf_counter()
        run()
        return time.perf_counter() - start


def calls(seconds: float, least: int = 3) -> int:
    """The number of calls in a turn."""
    return max(least, min(200, round(SLICE_SECONDS / seconds)))
