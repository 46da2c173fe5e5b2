"""`python -m benchmarks`: measures the loss, writes benchmarks/results/*.csv, redraws the docs.

The pytest-benchmark run happens twice, in processes of their own: with an allocator that keeps
its memory, and with the allocator as a process comes. About five minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

from benchmarks import memory, render, results_file
from benchmarks.allocator import TUNED_ALLOCATOR
from benchmarks.cases import CASES
from benchmarks.environment import describe

BENCH = Path(__file__).parent / "bench_ueo_loss.py"
MEMORY_CONTENDERS = ("ueo_fast", "eager", "compile")
MEMORY_FROM_BYTES = 4 << 20
"""Below that the process's own noise is a good part of what is measured."""


def measure_time(threads: int, repeats: int, allocator: dict[str, str]) -> list[dict[str, object]]:
    """One row per case and contender: medians over the repeats, in microseconds."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "benchmark.json"
        environment = dict(
            os.environ,
            UEO_FAST_BENCH_THREADS=str(threads),
            UEO_FAST_BENCH_REPEATS=str(repeats),
            **allocator,
        )
        command = [sys.executable, "-m", "pytest", "-q", str(BENCH), f"--benchmark-json={output}"]
        subprocess.run([*command, "--benchmark-quiet"], env=environment, check=True)
        runs = json.loads(output.read_text())["benchmarks"]
    collected: dict[tuple[int, int, str, str], list[float]] = defaultdict(list)
    for run in runs:
        info = run["extra_info"]
        key = info["rows"], info["columns"], info["dtype"], info["contender"]
        collected[key].append(1e6 * run["stats"]["median"])
    return [
        {
            "rows": rows,
            "columns": columns,
            "dtype": dtype,
            "contender": name,
            "median_us": f"{statistics.median(times):.1f}",
            "lowest_us": f"{min(times):.1f}",
            "highest_us": f"{max(times):.1f}",
        }
        for (rows, columns, dtype, name), times in collected.items()
    ]


def measure_memory() -> list[dict[str, object]]:
    return [
        {
            "rows": case.rows,
            "columns": case.columns,
            "dtype": case.dtype,
            "contender": name,
            "peak_over_logits": f"{memory.measure(case, name):.2f}",
        }
        for case in CASES
        if case.bytes >= MEMORY_FROM_BYTES
        for name in MEMORY_CONTENDERS
    ]


def pin(threads: int) -> str:
    """Keeps this process and its children on as many processors as there are threads."""
    if not hasattr(os, "sched_setaffinity"):
        return ""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-threads:])
    return " (one per processor)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    command = f"python -m benchmarks --threads {args.threads} --repeats {args.repeats}"
    common = {"threads": f"{args.threads}{pin(args.threads)}", "command": command}
    for name, allocator in (("tuned", TUNED_ALLOCATOR), ("default", {})):
        rows = measure_time(args.threads, args.repeats, allocator)
        setting = " ".join(f"{key}={value}" for key, value in allocator.items()) or "as it comes"
        header = describe(**common, allocator=setting)
        results_file.write(f"ueo_loss_cpu_{name}_allocator.csv", header, rows)
    results_file.write("ueo_loss_cpu_memory.csv", describe(**common), measure_memory())
    render.main()


if __name__ == "__main__":
    main()
