"""Time of the affine layers and of a patched tower's step on a GPU; `benchmarks/gpu.sh affine`.

    python -m benchmarks.bench_affine_gpu [--out DIR] [--seconds N] [--dry-run]

Writes affine_gpu_time.csv and visual_step_gpu.csv after every case: a run that is cut short leaves
what it has. `--dry-run` goes the same way on a CPU with tiny shapes; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks import affine_cases, gpu_counters, gpu_report, results_file, visual_cases
from benchmarks.affine_cases import AffineCase
from benchmarks.environment import describe_gpu
from benchmarks.gpu_cases import COPY, inputs_wanted
from benchmarks.gpu_timing import GRAPH_BELOW_US, Copy, Launched, Replayed, Rotation, elapsed_us
from benchmarks.visual_cases import Step, VisualCase
from ueo_fast import backends

Row = dict[str, object]
Clock = Launched | Replayed | Copy
AFFINE_SECONDS, STEP_SECONDS, COMPILE_SECONDS = 4.0, 10.0, 45.0
"""A case of the layers, one of the towers, and a tower's compilation are not begun with less."""


class Bench:
    """One run: what is left of its time, and the rows of the two CSVs."""

    def __init__(self, args: argparse.Namespace) -> None:
        dry = args.dry_run
        self.dry = dry
        self.device = torch.device("cpu") if dry else torch.device("cuda")
        self.deadline = time.monotonic() + args.seconds
        self.repeats = 1 if dry else 7
        self.slice_us = 1e3 if dry else 5e3
        self.copy_bytes = 1 << (20 if dry else 30)
        self.cache_bytes = (
            1 << 10 if dry else torch.cuda.get_device_properties(self.device).L2_cache_size
        )
        self.compile_left = 0.3 * args.seconds  # of the layers, so that compilers leave a rest
        self.affine: list[Row] = []
        self.steps: list[Row] = []
        self._copy = Copy(self.copy_bytes, self.device)

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def measure_affine(self, case: AffineCase) -> None:
        """Every contender, as launched from Python and replayed as a graph, in turns."""
        names = ("cpp", "eager") if self.dry else ("cuda", "eager", "triton", "compile")
        key: Row = {
            "op": case.op,
            "shape": "x".join(map(str, case.shape)),
            "layout": case.layout,
            "dtype": case.dtype,
        }

        def add(name: str, mode: str, times: Sequence[float], inputs: int, note: str) -> None:
            row = {**key, "contender": name, "mode": mode, **_spread(times)}
            self.affine.append({**row, "inputs": inputs, "note": note})

        if self.left() < AFFINE_SECONDS:
            for name in names:
                add(name, "", (), 0, "the time for the benchmark was spent")
            return
        inputs = affine_cases.make_inputs(case, inputs_wanted(case, self.cache_bytes), self.device)
        constants = affine_cases.make_constants(case, inputs[0])
        truth = affine_cases.make_pass("eager", case, constants)(inputs[0])
        clocks: dict[tuple[str, str], Clock] = {}
        notes: dict[str, str] = {}
        for name in names:
            try:
                if name in backends.COMPILED and (reason := backends.unavailable_reason(name)):
                    raise RuntimeError(reason)
                if name == "compile" and self.compile_left < 0:
                    raise RuntimeError("the time for compilers was spent")
                start = time.monotonic()
                step = affine_cases.make_pass(name, case, constants)
                wrong = affine_cases.disagreement(step(inputs[0]), truth, case)
                if wrong:
                    raise RuntimeError(wrong)
                if name == "compile":
                    self.compile_left -= time.monotonic() - start
                launched = Launched(Rotation(step, inputs), self.device, self.slice_us)
                clocks[name, launched.mode] = launched
            except Exception as error:  # a contender that fails must not end the run
                add(name, "", (), 0, _one_line(error))
                continue
            if not self.dry and launched.estimate_us <= GRAPH_BELOW_US:
                try:
                    replayed = Replayed(Rotation(step, inputs), self.device, self.slice_us)
                    clocks[name, replayed.mode] = replayed
                except Exception as error:
                    notes[name] = f"no graph: {_one_line(error)}"
        del truth
        clocks[COPY, self._copy.mode] = self._copy
        samples = _in_turns({key: clock.sample_us for key, clock in clocks.items()}, self.repeats)
        for (name, mode), times in samples.items():
            add(name, mode, times, 1 if name == COPY else len(inputs), notes.get(name, ""))

    def measure_step(self, case: VisualCase) -> None:
        """A tower's step, as launched from Python, in turns; then its peak of memory."""
        names = visual_cases.CONTENDERS[: 2 if self.dry else None]
        key: Row = {
            "model": case.model,
            "batch": case.batch,
            "layout": case.layout,
            "dtype": case.dtype,
        }

        def add(name: str, times: Sequence[float], peak: object, note: str) -> None:
            row = {**key, "contender": name, **_spread(times)}
            self.steps.append({**row, "peak_bytes": peak, "note": note})

        steps: dict[str, Step] = {}
        reason = visual_cases.unavailable_reason()
        if reason is None and self.left() < STEP_SECONDS:
            reason = "the time for the benchmark was spent"
        for name in names:
            late = name == "compile" and self.left() < COMPILE_SECONDS
            if reason or late:
                add(name, (), "", reason or "no time was left to compile")
                continue
            try:
                steps[name] = Step(name, case, self.device)
                for _ in range(1 if self.dry else 3):
                    result = steps[name]()
                if name == "patched":
                    true = Step("eager", case, self.device)()
                    if wrong := visual_cases.disagreement(result, true, case):
                        raise RuntimeError(wrong)
                    del true
                del result
            except Exception as error:
                steps.pop(name, None)
                add(name, (), "", _one_line(error))

        def clock(step: Step) -> Callable[[], float]:
            return lambda: elapsed_us(step, self.device)

        samples = _in_turns({name: clock(step) for name, step in steps.items()}, self.repeats)
        for name, times in samples.items():
            peak = "" if self.dry else gpu_counters.peak_bytes(steps[name])
            add(name, times, peak, "")


def _in_turns(clocks: dict, repeats: int) -> dict:
    samples: dict = {key: [] for key in clocks}
    for repeat in range(repeats + 1):
        for key, sample_us in clocks.items():
            spent = sample_us()
            if repeat:  # the first only warms up
                samples[key].append(spent)
    return samples


def _spread(times: Sequence[float]) -> Row:
    values = (statistics.median(times), min(times), max(times)) if times else ()
    shown = [f"{value:.2f}" for value in values] or [""] * 3
    return dict(zip(("median_us", "lowest_us", "highest_us"), shown, strict=True))


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"failed: {type(error).__name__}: {text[:160]}"


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=results_file.FOLDER, help="folder of the CSVs")
    parser.add_argument("--seconds", type=float, default=90, help="stop after about that long")
    parser.add_argument("--dry-run", action="store_true", help="on a CPU, with tiny shapes")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = _arguments(argv)
    if not args.dry_run and not torch.cuda.is_available():
        print("no GPU is present that torch can use: only --dry-run runs here", file=sys.stderr)
        return 2
    flags = [f"--seconds {args.seconds:g}", *["--dry-run"] * args.dry_run]
    command = " ".join(["python -m benchmarks.bench_affine_gpu", *flags])  # no path of this machine
    bench = Bench(args)
    more = {"copied bytes": str(bench.copy_bytes), "command": command}
    header = describe_gpu(bench.device, **more)
    args.out.mkdir(parents=True, exist_ok=True)
    tower_cases = visual_cases.DRY_CASES if args.dry_run else visual_cases.GPU_CASES
    layer_cases = affine_cases.DRY_CASES if args.dry_run else affine_cases.GPU_CASES
    # The towers last: half a minute of compilation each must not keep the layers from their turn.
    work = [(bench.measure_affine, case) for case in layer_cases]
    work += [(bench.measure_step, case) for case in tower_cases]
    for measure, case in work:
        start = time.monotonic()
        try:
            measure(case)
        except Exception as error:  # a case that fails must not end the run
            print(f"{case}: {_one_line(error)}", flush=True)
        for name, rows in zip(gpu_report.AFFINE_CSVS, (bench.affine, bench.steps), strict=True):
            if rows:
                results_file.write(name, header, rows, args.out)
        gc.collect()
        if not args.dry_run:
            torch.cuda.empty_cache()
        print(f"{case}: {time.monotonic() - start:.1f} s", flush=True)
    print("\n".join(gpu_report.short_report(args.out)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
