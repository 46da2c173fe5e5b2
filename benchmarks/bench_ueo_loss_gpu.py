"""Time, memory and launches of the loss on a GPU; `bash benchmarks/gpu.sh bench` runs it.

    python -m benchmarks.bench_ueo_loss_gpu [--quick] [--out DIR] [--seconds N] [--dry-run]

Writes ueo_loss_gpu_time.csv, _memory.csv and _launches.csv after every shape: a run that is cut
short leaves what it has. `--dry-run` goes the same way on a CPU with tiny shapes; its figures mean
nothing and its CSVs belong nowhere near the docs.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

from benchmarks import gpu_report, results_file
from benchmarks.environment import describe_gpu
from benchmarks.gpu_cases import CASES, CONTENDERS, DRY_CASES, DRY_CONTENDERS, QUICK_CASES
from benchmarks.gpu_measure import Bench, Rows, Settings, left_out

LARGEST_CASE_SECONDS = 8
"""Not begun with less time left than that."""


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="three shapes, three repeats")
    parser.add_argument("--out", type=Path, default=results_file.FOLDER, help="folder of the CSVs")
    parser.add_argument("--seconds", type=float, default=120, help="stop after about that long")
    parser.add_argument("--dry-run", action="store_true", help="on a CPU, with tiny shapes")
    return parser.parse_args(argv)


def _settings(args: argparse.Namespace) -> Settings:
    if args.dry_run:
        return Settings(torch.device("cpu"), DRY_CONTENDERS, 2, 1e3, 1 << 20, 1 << 10, 0)
    return Settings(
        device=torch.device("cuda", torch.cuda.current_device()),
        contenders=CONTENDERS,
        repeats=3 if args.quick else 9,
        slice_us=5e3,
        copy_bytes=1 << 30,
        cache_bytes=torch.cuda.get_device_properties().L2_cache_size,
        compile_seconds=0.35 * args.seconds,
    )


def _command(args: argparse.Namespace) -> str:
    flags = [f"--seconds {args.seconds:g}", *["--quick"] * args.quick]
    flags += ["--dry-run"] * args.dry_run
    return " ".join(["python -m benchmarks.bench_ueo_loss_gpu", *flags])  # no path of this machine


def main(argv: list[str] | None = None) -> int:
    args = _arguments(argv)
    if not args.dry_run and not torch.cuda.is_available():
        print("no GPU is present that torch can use: only --dry-run runs here", file=sys.stderr)
        return 2
    deadline = time.monotonic() + args.seconds
    settings = _settings(args)
    more = {"copied bytes": str(settings.copy_bytes), "command": _command(args)}
    header = describe_gpu(settings.device, **more)
    args.out.mkdir(parents=True, exist_ok=True)
    bench = Bench(settings)
    rows = Rows()
    cases = DRY_CASES if args.dry_run else QUICK_CASES if args.quick else CASES
    for case in cases:
        start = time.monotonic()
        if deadline - start < LARGEST_CASE_SECONDS:
            for one in settings.contenders:
                left_out(case, one.name, "the time for the benchmark was spent", rows)
        else:
            try:
                bench.measure(case, rows)
            except Exception as error:  # a shape that fails must not end the run
                print(f"{case} failed: {type(error).__name__}: {error}", flush=True)
        for name, found in zip(
            gpu_report.CSVS, (rows.time, rows.memory, rows.launches), strict=True
        ):
            results_file.write(name, header, found, args.out)
        print(f"{case}: {time.monotonic() - start:.1f} s", flush=True)
    print("\n".join(gpu_report.short_table(args.out)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
