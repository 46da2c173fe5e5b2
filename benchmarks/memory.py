"""Peak memory of one forward and backward pass: `python -m benchmarks.memory CASE CONTENDER`."""

from __future__ import annotations

import ctypes
import gc
import subprocess
import sys

from benchmarks.cases import CASES, Case, Step, contender


def status(name: str) -> int:
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024


def peak_over_logits(case: Case, name: str) -> float:
    """The memory that a pass adds at its peak, in multiples of the logits."""
    step = contender(name, case)
    assert isinstance(step, Step)
    step()  # compilation and first-call state are not part of a training step
    step.logits.grad = None
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = status("VmRSS")
    with open("/proc/self/clear_refs", "w") as peak:
        peak.write("5")
    step()
    return (status("VmHWM") - before) / case.bytes


def measure(case: Case, name: str) -> float:
    """:func:`peak_over_logits` in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.memory", str(case), name],
        capture_output=True,
        text=True,
        check=True,
    )
    return float(done.stdout.split()[-1])


if __name__ == "__main__":
    (wanted,) = (case for case in CASES if str(case) == sys.argv[1])
    print(peak_over_logits(wanted, sys.argv[2]))
