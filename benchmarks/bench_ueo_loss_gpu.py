"""Time, memory and launches of the loss on a GPU; `bash benchmarks/gpu.sh loss` runs it.

    python -m benchmarks.bench_ueo_loss_gpu [--out DIR] [--seconds N] [--dry-run]

At one shape after the other: times in turns, then memory, then launches; the same again for
compilers, which take long. Writes ueo_loss_gpu_time.csv, _memory.csv and _launches.csv after every
shape: a run that is cut short leaves what it has. `--dry-run` goes the same way on a CPU with tiny
shapes; its figures mean nothing and its CSVs belong nowhere near the docs.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmarks import gpu_counters, gpu_tables, gpu_timing, results_file
from benchmarks.cases import Case
from benchmarks.environment import describe_gpu
from benchmarks.gpu_cases import (
    CASES,
    COPY,
    DRY_CASES,
    DRY_ROUNDS,
    EAGER,
    LARGEST,
    ROUNDS,
    Contender,
    Pass,
    inputs_wanted,
    lack_of_memory,
    make_inputs,
)
from benchmarks.gpu_timing import Copy, in_turns, make_clocks, one_line
from benchmarks.results_file import spread

CASE_SECONDS, LARGEST_CASE_SECONDS = 4, 10
"""Seconds that must be left to begin a case."""

Row = dict[str, object]
TOLERANCE = {"float32": 1e-3, "bfloat16": 2e-2}
"""Between contenders, relative: this tells a wrong contender from a right one, no more."""


@dataclass(frozen=True)
class Settings:
    device: torch.device
    repeats: int
    slice_us: float  # about how long a contender is measured before the next one's turn
    copy_bytes: int
    cache_bytes: int


@dataclass
class Rows:
    """What becomes the three CSVs."""

    time: list[Row] = field(default_factory=list)
    memory: list[Row] = field(default_factory=list)
    launches: list[Row] = field(default_factory=list)


def _time_row(
    case: Case, name: str, mode: str, times: Sequence[float], inputs: int, note: str, turn: int
) -> Row:
    row = {
        **case.key,
        "contender": name,
        "mode": mode,
        **spread(times, digits=2),
        "inputs": inputs,
    }
    return {**row, "round": turn, "note": note}


def left_out(case: Case, name: str, note: str, rows: Rows, turn: int = 1) -> None:
    """The reason, in every CSV, of a contender that was not measured."""
    rows.time.append(_time_row(case, name, "", (), 0, note, turn))
    if not _is_counted(case, name, rows):
        rows.memory.append({**case.key, "contender": name, "peak_over_logits": "", "note": note})
        nothing = {"launches": "", "kernels": ""}
        rows.launches.append({**case.key, "contender": name, **nothing, "note": note})


def _is_counted(case: Case, name: str, rows: Rows) -> bool:
    """Memory and launches are counted once, not in every round."""
    key = {**case.key, "contender": name}.items()
    return any(key <= row.items() for row in rows.memory)


def disagreement(ours: tuple[Tensor, Tensor], true: tuple[Tensor, Tensor], case: Case) -> str:
    """What is wrong with a contender's loss or gradient; empty if nothing is."""
    tolerance = TOLERANCE[case.dtype]
    loss, expected = float(ours[0]), float(true[0])
    if not abs(loss - expected) <= tolerance * max(1.0, abs(expected)):
        return f"wrong: loss {loss:.6g}, expected {expected:.6g}"
    ends = [torch.cat([grad[:4], grad[-4:]]).double() for grad in (ours[1], true[1])]
    error = float((ends[0] - ends[1]).norm() / ends[1].norm())
    return "" if error <= tolerance else f"wrong: gradient off by {error:.2g}"


class Bench:
    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._copy = Copy(settings.copy_bytes, settings.device)

    def measure(
        self, case: Case, contenders: Sequence[Contender], rows: Rows, turn: int = 1
    ) -> None:
        settings = self.settings
        inputs = make_inputs(case, inputs_wanted(case, settings.cache_bytes), settings.device)
        steps: dict[str, Pass] = {}
        truth = None
        # The others are compared with plain PyTorch, or with one that has been in its turn.
        for one in sorted(contenders, key=lambda one: one is not EAGER):
            step, result, note = self._prepare(one, case, inputs[0], truth)
            if step is None:
                left_out(case, one.name, note, rows, turn)
                continue
            if truth is None and (one is EAGER or turn > 1):
                truth = result
            del result
            steps[one.name] = step
        del truth
        order = [one.name for one in contenders if one.name in steps]
        self._times(case, {name: steps[name] for name in order}, inputs, rows, turn)
        gpu_timing.clear(self.settings.device)
        for name in order:
            if not _is_counted(case, name, rows):
                self._counters(case, name, steps[name], inputs[0], rows)
        del inputs, steps
        gpu_timing.clear(self.settings.device)

    def _prepare(
        self, one: Contender, case: Case, logits: Tensor, truth: tuple[Tensor, Tensor] | None
    ) -> tuple[Pass | None, tuple[Tensor, Tensor] | None, str]:
        """A pass that has run once, its result, or the reason why there is none."""
        reason = one.unavailable() or lack_of_memory(one, case, self._free_bytes())
        if reason:
            return None, None, reason
        try:
            step = one.make()
            result = step(logits)
            note = "" if truth is None else disagreement(result, truth, case)
        except Exception as error:  # a contender that fails must not end the run
            gpu_timing.clear(self.settings.device)
            return None, None, f"failed: {one_line(error)}"
        return (None, None, note) if note else (step, result, "")

    def _times(
        self, case: Case, steps: dict[str, Pass], inputs: list[Tensor], rows: Rows, turn: int
    ) -> None:
        settings = self.settings
        clocks = {}
        notes: dict[str, str] = {}
        for name, step in steps.items():
            try:
                made, notes[name] = make_clocks(step, inputs, settings.device, settings.slice_us)
            except Exception as error:
                left_out(case, name, f"failed: {one_line(error)}", rows, turn)
                continue
            clocks |= {(name, clock.mode): clock.sample_us for clock in made}
        clocks[COPY, self._copy.mode] = self._copy.sample_us
        for (name, mode), times in in_turns(clocks, settings.repeats).items():
            used = 1 if name == COPY else len(inputs)
            note = notes.get(name, "")
            rows.time.append(_time_row(case, name, mode, times, used, note, turn))

    def _counters(self, case: Case, name: str, step: Pass, logits: Tensor, rows: Rows) -> None:
        def run() -> object:
            return step(logits)

        def peak() -> Row:
            return {"peak_over_logits": f"{gpu_counters.peak_bytes(run) / case.bytes:.3f}"}

        def launches() -> Row:
            found = gpu_counters.launches(run)
            names = ((gpu_counters.short_name(kernel), n) for kernel, n in found.items())
            kernels = " + ".join(f"{n} {kernel}" if n > 1 else kernel for kernel, n in names)
            return {"launches": found.total(), "kernels": kernels}

        nothing: Row = {"peak_over_logits": ""}
        rows.memory.append({**case.key, "contender": name, **self._counted(peak, nothing)})
        nothing = {"launches": "", "kernels": ""}
        rows.launches.append({**case.key, "contender": name, **self._counted(launches, nothing)})

    def _counted(self, count: Callable[[], Row], nothing: Row) -> Row:
        if self.settings.device.type == "cpu":
            return {**nothing, "note": "needs a GPU"}
        try:
            return {**count(), "note": ""}
        except Exception as error:
            return {**nothing, "note": f"failed: {one_line(error)}"}

    def _free_bytes(self) -> int:
        if self.settings.device.type == "cpu":
            return 1 << 40
        cached = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return torch.cuda.mem_get_info()[0] + cached


def _settings(args: argparse.Namespace) -> Settings:
    if args.dry_run:
        return Settings(torch.device("cpu"), 2, 1e3, 1 << 20, 1 << 10)
    return Settings(
        device=torch.device("cuda", torch.cuda.current_device()),
        repeats=9,
        slice_us=5e3,
        copy_bytes=1 << 30,
        cache_bytes=torch.cuda.get_device_properties().L2_cache_size,
    )


def main(argv: list[str] | None = None) -> int:
    args = gpu_timing.arguments(__doc__, 120, argv)
    if gpu_timing.lacks_gpu(args.dry_run):
        return 2
    deadline = time.monotonic() + args.seconds
    settings = _settings(args)
    command = gpu_timing.command("bench_ueo_loss_gpu", args.seconds, args.dry_run)
    more = {"copied bytes": str(settings.copy_bytes), "command": command}
    header = describe_gpu(settings.device, **more)
    args.out.mkdir(parents=True, exist_ok=True)
    bench = Bench(settings)
    rows = Rows()
    cases = DRY_CASES if args.dry_run else CASES
    rounds = DRY_ROUNDS if args.dry_run else ROUNDS
    for turn, contenders in enumerate(rounds, 1):
        for case in cases:
            start = time.monotonic()
            if deadline - start < (LARGEST_CASE_SECONDS if case is LARGEST else CASE_SECONDS):
                for one in contenders:
                    left_out(case, one.name, gpu_timing.OUT_OF_TIME, rows, turn)
            else:
                try:
                    bench.measure(case, contenders, rows, turn)
                except Exception as error:  # a shape that fails must not end the run
                    print(f"{case} failed: {one_line(error)}", flush=True)
            for name, found in zip(
                gpu_tables.LOSS_CSVS, (rows.time, rows.memory, rows.launches), strict=True
            ):
                results_file.write(name, header, found, args.out)
            print(f"{case}: {time.monotonic() - start:.1f} s", flush=True)
    print("\n".join(gpu_tables.short_report(args.out)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
