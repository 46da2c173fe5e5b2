"""What a pass on a GPU costs besides time: peak memory, launches, hardware counters.

    python -m benchmarks.gpu_counters [--out DIR]
    python -m benchmarks.gpu_counters --section SECTION ...

The first has Nsight Compute (`ncu`) count one call of each case and writes gpu_kernels.csv, the
second prints sections of its report. Clocks stay as they are.
"""

from __future__ import annotations

import argparse
import csv
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from benchmarks import affine_cases, gpu_cases, results_file
from benchmarks.affine_cases import AffineCase
from benchmarks.cases import Case
from benchmarks.environment import describe_gpu
from benchmarks.gpu_tables import KERNELS, short_counters


def peak_bytes(run: Callable[[], object]) -> int:
    """What a pass takes at most beyond what was allocated before it, its results included."""
    run()  # compilation, workspaces and first-call state are not what a training step holds
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    held = run()
    torch.cuda.synchronize()
    del held
    return torch.cuda.max_memory_allocated() - before


def count_launches(events: Iterable[Any]) -> Counter[str]:
    """Kernels, copies and fills on the device, by name, out of a profiler's events."""
    return Counter(
        event.name
        for event in events
        if event.device_type.name == "CUDA" and not getattr(event, "is_user_annotation", False)
    )


def launches(run: Callable[[], object]) -> Counter[str]:
    """What a pass launches, by name. The caller has run it before."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    return count_launches(profile.events())


def short_name(kernel: str) -> str:
    """A kernel's name without its return type, arguments and template parameters."""
    name = re.sub(r"<.*|\(.*", "", re.sub(r"(\(anonymous namespace\)|<unnamed>)::", "", kernel))
    return name.removeprefix("void ").split("::")[-1].strip() or kernel[:40]


# ---- Hardware counters --------------------------------------------------------------------------

LOSS = tuple(
    Case(rows, columns, dtype)
    for rows, columns in ((16384, 1000), (65536, 345), (4096, 21841))
    for dtype in ("float32", "bfloat16")
)
AFFINE = (
    AffineCase("bn+relu", (64, 256, 56, 56), "contiguous", "bfloat16"),
    AffineCase("bn+add+relu", (64, 256, 56, 56), "channels_last", "bfloat16"),
    AffineCase("layer_norm", (64, 197, 768), dtype="bfloat16"),
)
NOT_THERE = 77
"""Exit status of a step that cannot run here, as benchmarks/gpu.sh has it."""

SEPARATOR = "spin_kernel"
"""torch.cuda._sleep's, launched before every case: what tells the cases apart in the list."""

METRICS = {
    "time_us": ("gpu__time_duration.sum", 1e-3),
    "instructions": ("smsp__inst_executed.sum", 1.0),
    "registers": ("launch__registers_per_thread", 1.0),
    "issue_active_percent": ("smsp__issue_active.avg.pct_of_peak_sustained_active", 1.0),
    "dram_percent": ("dram__throughput.avg.pct_of_peak_sustained_elapsed", 1.0),
    "dram_read_bytes": ("dram__bytes_read.sum", 1.0),
    "dram_write_bytes": ("dram__bytes_write.sum", 1.0),
    "warps_active_percent": ("sm__warps_active.avg.pct_of_peak_sustained_active", 1.0),
}
"""Column, the profiler's name, and what one of its base units (ns, byte) is in ours."""


def run_cases(device: torch.device, backend: str = "cuda") -> None:
    """Each once and cold: what is counted does not depend on a warm-up."""
    for case in LOSS:
        (logits,) = gpu_cases.make_inputs(case, 1, device)
        _run_alone(gpu_cases.ours(backend).make(), logits)
    for layer in AFFINE:
        (x,) = affine_cases.make_inputs(layer, 1, device)
        _run_alone(affine_cases.make_pass(backend, layer, affine_cases.make_constants(layer, x)), x)


def _run_alone(run: Callable[[torch.Tensor], object], x: torch.Tensor) -> None:
    if x.is_cuda:
        torch.cuda._sleep(1)
    run(x)
    if x.is_cuda:
        torch.cuda.synchronize()


def read_profile(lines: Iterable[str]) -> list[dict[str, object]]:
    """Rows of our CSV out of the profiler's, which has lines of its own around its table."""
    reader = csv.DictReader(line for line in lines if line.startswith('"'))
    next(reader, None)  # units
    cases = [(str(case), case.rows) for case in LOSS] + [(str(layer), 0) for layer in AFFINE]
    place = -1
    rows: list[dict[str, object]] = []
    for row in reader:
        kernel = short_name(row["Kernel Name"])
        if kernel == SEPARATOR:
            place += 1
            continue
        case, count = cases[place] if place >= 0 else ("unknown", 0)
        found: dict[str, object] = {"case": case, "kernel": kernel}
        found |= {"blocks": row["Grid Size"], "threads": row["Block Size"]}
        for name, (metric, unit) in METRICS.items():
            value = (row.get(metric) or "").replace(",", "")
            number = re.fullmatch(r"[0-9.]+(e[+-]?[0-9]+)?", value)
            found[name] = f"{float(value) * unit:.6g}" if number else ""
        counted = count and found["instructions"]
        found["instructions_per_row"] = f"{float(str(counted)) / count:.1f}" if counted else ""
        rows.append(found)
    return rows


def _profile(options: list[str]) -> int:
    """One call of each case under the profiler."""
    command = ["ncu", "--clock-control", "none", "--target-processes", "all"]
    command += ["--kernel-name", f"regex:{SEPARATOR}|ueo_|channel_affine|layer_norm", *options]
    return subprocess.call([*command, sys.executable, "-m", "benchmarks.gpu_counters", "--run"])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=results_file.FOLDER, help="folder of the CSV")
    parser.add_argument("--section", action="append", default=[], help="of ncu, to be printed")
    parser.add_argument("--run", action="store_true", help="the calls alone: what ncu runs")
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.run:
        run_cases(device)
        return 0
    if shutil.which("ncu") is None:
        print("ncu is not on PATH")
        return NOT_THERE
    if args.section:
        return _profile([word for name in args.section for word in ("--section", name)])
    log = args.out / "ncu.txt"
    metrics = ",".join(metric for metric, _ in METRICS.values())
    options = ["--metrics", metrics, "--csv", "--page", "raw", "--print-units", "base"]
    code = _profile([*options, "--log-file", str(log)])
    rows = read_profile(log.read_text().splitlines()) if log.exists() else []
    if not rows:
        print(f"no kernel was counted: {log.read_text() if log.exists() else 'no output'}")
        return code or 1
    header = describe_gpu(device, command="python -m benchmarks.gpu_counters")
    results_file.write(KERNELS, header, rows, args.out)
    print("\n".join(short_counters(args.out)))
    return code


if __name__ == "__main__":
    raise SystemExit(main())
