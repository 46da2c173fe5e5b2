"""Compares builds of the CPU library: `python -m benchmarks.compare_builds A.so B.so ...`.

Each build runs in processes of its own, in turns; what is printed is the lowest time that each
reached, forward + backward in microseconds, without autograd. This is how a change of a kernel is
judged before it is kept (docs/performance.md, "What was tried"). UEO_FAST_CPU_CAPABILITY=avx2 in
the environment compares what a processor without AVX-512 runs.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable

import torch

from benchmarks.allocator import TUNED

SHAPES = {(64, 345): 600, (256, 1000): 200, (1024, 1000): 100, (4096, 1000): 20,
          (65536, 345): 4, (4096, 21841): 3}  # fmt: skip
TURNS = 4
THREADS = 2


def _lowest(call: Callable[[], object], calls: int) -> float:
    call()
    lowest = float("inf")
    for _ in range(calls):
        start = time.perf_counter()
        call()
        lowest = min(lowest, time.perf_counter() - start)
    return 1e6 * lowest


def measure(library: str) -> list[float]:
    """Forward and backward of one build, loaded in this process."""
    torch.set_num_threads(THREADS)
    torch.ops.load_library(library)
    ops = torch.ops.ueo_fast
    results = []
    for shape, calls in SHAPES.items():
        logits = 3 * torch.randn(shape)
        options = (None, None, 1.0, 1.0, 0.0)
        one = torch.ones(())

        def step(ops=ops, logits=logits, options=options, one=one) -> object:
            _, *saved = ops.ueo_loss_forward(logits, *options)
            return ops.ueo_loss_backward(one, logits, *saved, 1.0, 0.0)

        results.append(_lowest(step, calls))
    return results


def main() -> None:
    libraries = [os.path.abspath(path) for path in sys.argv[1:]]
    lowest = {library: [float("inf")] * len(SHAPES) for library in libraries}
    script = (
        "import sys; from benchmarks.compare_builds import measure; print(*measure(sys.argv[1]))"
    )
    for _ in range(TURNS):
        for library in libraries:
            done = subprocess.run(
                [sys.executable, "-c", script, library],
                env=dict(os.environ, **TUNED),
                capture_output=True,
                text=True,
                check=True,
            )
            times = map(float, done.stdout.split())
            lowest[library] = [min(pair) for pair in zip(lowest[library], times, strict=True)]
    print("library", *(f"{rows}x{columns}" for rows, columns in SHAPES), sep=",")
    for library, times in lowest.items():
        print(os.path.relpath(library), *(f"{time:.1f}" for time in times), sep=",")


if __name__ == "__main__":
    main()
