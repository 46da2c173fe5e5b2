"""Time of the affine layers and of a patched tower's step on a GPU; `benchmarks/gpu.sh affine`.

    python -m benchmarks.bench_affine_gpu [--out DIR] [--seconds N] [--dry-run]

Writes affine_gpu_time.csv and visual_step_gpu.csv after every case: a run that is cut short leaves
what it has. `--dry-run` goes the same way on a CPU with tiny shapes; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence

import torch

from benchmarks import (
    affine_cases,
    gpu_counters,
    gpu_tables,
    gpu_timing,
    results_file,
    visual_cases,
)
from benchmarks.affine_cases import AffineCase
from benchmarks.environment import describe_gpu
from benchmarks.gpu_cases import COPY, inputs_wanted
from benchmarks.gpu_timing import Copy, elapsed_us, in_turns, make_clocks, one_line
from benchmarks.results_file import spread
from benchmarks.visual_cases import Step, VisualCase
from ueo_fast import backends

Row = dict[str, object]
LAYER_ROUNDS = ("cuda", "triton", "eager"), ("cuda", "compile")
DRY_LAYER_ROUNDS = (("cpp", "eager"),)
TOWER_ROUNDS = ("patched", "eager"), ("patched", "compile")
"""What takes turns. Compilers take long, a tower's half a minute: they come last."""
AFFINE_SECONDS, STEP_SECONDS, COMPILE_SECONDS = 3.0, 8.0, 40.0
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
        self.affine: list[Row] = []
        self.steps: list[Row] = []
        self._copy = Copy(self.copy_bytes, self.device)

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def measure_affine(self, case: AffineCase, names: Sequence[str], turn: int) -> None:
        """Every contender, as launched from Python and replayed as a graph, in turns."""

        def add(name: str, mode: str, times: Sequence[float], inputs: int, note: str) -> None:
            row = {
                **case.key,
                "contender": name,
                "mode": mode,
                **spread(times, digits=2),
            }
            self.affine.append({**row, "inputs": inputs, "round": turn, "note": note})

        if self.left() < AFFINE_SECONDS:
            for name in names:
                add(name, "", (), 0, gpu_timing.OUT_OF_TIME)
            return
        inputs = affine_cases.make_inputs(case, inputs_wanted(case, self.cache_bytes), self.device)
        constants = affine_cases.make_constants(case, inputs[0])
        truth = affine_cases.make_pass("eager", case, constants)(inputs[0])
        clocks = {}
        notes: dict[str, str] = {}
        for name in names:
            try:
                if name in backends.COMPILED and (reason := backends.unavailable_reason(name)):
                    raise RuntimeError(reason)
                step = affine_cases.make_pass(name, case, constants)
                wrong = affine_cases.disagreement(step(inputs[0]), truth, case)
                if wrong:
                    raise RuntimeError(wrong)
                made, notes[name] = make_clocks(step, inputs, self.device, self.slice_us)
            except Exception as error:  # a contender that fails must not end the run
                add(name, "", (), 0, f"failed: {one_line(error)}")
                continue
            clocks |= {(name, clock.mode): clock.sample_us for clock in made}
        del truth
        clocks[COPY, self._copy.mode] = self._copy.sample_us
        for (name, mode), times in in_turns(clocks, self.repeats).items():
            add(name, mode, times, 1 if name == COPY else len(inputs), notes.get(name, ""))

    def measure_step(self, case: VisualCase, names: Sequence[str], turn: int) -> None:
        """A tower's step, as launched from Python, in turns; then its peak of memory."""

        def add(name: str, times: Sequence[float], peak: object, note: str) -> None:
            row = {**case.key, "contender": name, **spread(times, digits=2)}
            self.steps.append({**row, "peak_bytes": peak, "round": turn, "note": note})

        reason = visual_cases.unavailable_reason()
        if self.left() < (COMPILE_SECONDS if "compile" in names else STEP_SECONDS):
            reason = reason or gpu_timing.OUT_OF_TIME
        if reason is not None:
            for name in names:
                add(name, (), "", reason)
            return
        steps: dict[str, Step] = {}
        for name in names:
            step, note = self._step(name, case, turn)
            if step is None:
                add(name, (), "", note)
            else:
                steps[name] = step
        clocks = {
            name: lambda step=step: elapsed_us(step, self.device) for name, step in steps.items()
        }
        for name, times in in_turns(clocks, self.repeats).items():
            add(name, times, "" if self.dry else gpu_counters.peak_bytes(steps[name]), "")

    def _step(self, name: str, case: VisualCase, turn: int) -> tuple[Step | None, str]:
        """A step that has run, or the reason why there is none."""
        try:
            step = Step(name, case, self.device)
            for _ in range(1 if self.dry else 3):
                result = step()
            if name == "patched" and turn == 1:
                true = Step("eager", case, self.device)()
                if wrong := visual_cases.disagreement(result, true, case):
                    return None, wrong
        except Exception as error:
            return None, f"failed: {one_line(error)}"
        return step, ""


def main(argv: list[str] | None = None) -> int:
    args = gpu_timing.arguments(__doc__, 90, argv)
    if gpu_timing.lacks_gpu(args.dry_run):
        return 2
    command = gpu_timing.command("bench_affine_gpu", args.seconds, args.dry_run)
    bench = Bench(args)
    more = {"copied bytes": str(bench.copy_bytes), "command": command}
    header = describe_gpu(bench.device, **more)
    args.out.mkdir(parents=True, exist_ok=True)
    towers = visual_cases.DRY_CASES if args.dry_run else visual_cases.GPU_CASES
    layers = affine_cases.DRY_CASES if args.dry_run else affine_cases.GPU_CASES
    layer_rounds = DRY_LAYER_ROUNDS if args.dry_run else LAYER_ROUNDS
    tower_rounds = TOWER_ROUNDS[:1] if args.dry_run else TOWER_ROUNDS
    work: list[tuple[Callable[..., None], object, Sequence[str], int]] = []
    for turn, (of_layers, of_towers) in enumerate(zip(layer_rounds, tower_rounds, strict=True), 1):
        work += [(bench.measure_affine, case, of_layers, turn) for case in layers]
        work += [(bench.measure_step, case, of_towers, turn) for case in towers]
    for measure, case, names, turn in work:
        start = time.monotonic()
        try:
            measure(case, names, turn)
        except Exception as error:  # a case that fails must not end the run
            print(f"{case} failed: {one_line(error)}", flush=True)
        for name, rows in zip(gpu_tables.AFFINE_CSVS, (bench.affine, bench.steps), strict=True):
            if rows:
                results_file.write(name, header, rows, args.out)
        gpu_timing.clear(bench.device)
        print(f"{case}: {time.monotonic() - start:.1f} s", flush=True)
    print("\n".join(gpu_tables.short_report(args.out)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
