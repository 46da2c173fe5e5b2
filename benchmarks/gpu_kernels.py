"""One call of each case for Nsight Compute, and a CSV of what it counted (benchmarks/gpu.sh).

ncu ... --csv --page raw --print-units base --log-file FILE python -m benchmarks.gpu_kernels
python -m benchmarks.gpu_kernels --from FILE --out DIR
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterable
from pathlib import Path

import torch

from benchmarks import affine_cases, gpu_cases, gpu_counters, results_file
from benchmarks.affine_cases import AffineCase
from benchmarks.cases import Case
from benchmarks.environment import describe_gpu

CSV = "gpu_kernels.csv"
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
FIRST = ("ueo_statistics", "channel_affine", "layer_norm")
"""The first kernel of a case: what tells the cases apart in the profiler's list."""

METRICS = {
    "time_us": ("gpu__time_duration.sum", 1e-3),
    "instructions": ("smsp__inst_executed.sum", 1),
    "registers": ("launch__registers_per_thread", 1),
    "issue_active_percent": ("smsp__issue_active.avg.pct_of_peak_sustained_active", 1),
    "dram_percent": ("dram__throughput.avg.pct_of_peak_sustained_elapsed", 1),
    "dram_read_bytes": ("dram__bytes_read.sum", 1),
    "dram_write_bytes": ("dram__bytes_write.sum", 1),
    "warps_active_percent": ("sm__warps_active.avg.pct_of_peak_sustained_active", 1),
}
"""Column, the profiler's name, and what one of its base units (ns, byte) is in ours."""


def run_cases(device: torch.device, loss_backend: str = "cuda") -> None:
    """Each once and cold: what is counted does not depend on a warm-up."""
    for case in LOSS:
        (logits,) = gpu_cases.make_inputs(case, 1, device)
        gpu_cases.through_autograd(lambda logits: gpu_cases.ueo_loss(logits, backend=loss_backend))(
            logits
        )
    for affine in AFFINE:
        (x,) = affine_cases.make_inputs(affine, 1, device)
        constants = affine_cases.make_constants(affine, x)
        affine_cases.make_pass(loss_backend, affine, constants)(x)
    if device.type == "cuda":
        torch.cuda.synchronize()


def read(lines: Iterable[str]) -> list[dict[str, object]]:
    """Rows of the CSV out of the profiler's: its table begins at the line with "Kernel Name"."""
    table = [line for line in lines if line.startswith('"')]
    reader = csv.DictReader(table)
    next(reader, None)  # units
    cases = [(str(case), case.rows) for case in LOSS]
    cases += [(str(affine), affine.bytes // 2) for affine in AFFINE]
    rows: list[dict[str, object]] = []
    place = -1
    for row in reader:
        kernel = gpu_counters.short_name(row["Kernel Name"])
        place += kernel in FIRST
        label, count = cases[place] if 0 <= place < len(cases) else ("unknown", 1)
        found: dict[str, object] = {"case": label, "kernel": kernel}
        found["blocks"], found["threads"] = row["Grid Size"], row["Block Size"]
        for name, (metric, unit) in METRICS.items():
            value = row.get(metric) or ""
            try:
                found[name] = f"{float(value.replace(',', '')) * unit:.6g}"
            except ValueError:
                found[name] = ""
        instructions = found["instructions"]
        per = float(str(instructions)) / count if instructions else None
        found["instructions_per_row"] = "" if per is None or "x" not in label else f"{per:.1f}"
        rows.append(found)
    return rows


def short_table(rows: list[dict[str, object]]) -> list[str]:
    names = ("case", "kernel", "time_us", "instructions_per_row", "issue_active_percent",
             "dram_percent", "registers")  # fmt: skip
    return ["us, counters", *(" ".join(str(row[name]) for name in names) for row in rows)]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--from", dest="source", type=Path, help="what ncu wrote")
    parser.add_argument("--out", type=Path, default=results_file.FOLDER, help="folder of the CSV")
    args = parser.parse_args(argv)
    if args.source is None:
        run_cases(torch.device("cuda"))
        return 0
    rows = read(args.source.read_text().splitlines())
    if not rows:
        print("the profiler counted nothing")
        return 1
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    header = describe_gpu(device, command="bash benchmarks/gpu.sh counters")
    results_file.write(CSV, header, rows, args.out)
    print("\n".join(short_table(rows)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
