"""Everything that is measured at one shape: times in turns, then memory, then launches."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmarks import gpu_counters
from benchmarks.cases import Case
from benchmarks.gpu_cases import (
    COPY,
    EAGER,
    Contender,
    Pass,
    inputs_wanted,
    lack_of_memory,
    make_inputs,
)
from benchmarks.gpu_timing import GRAPH_BELOW_US, Copy, Launched, Replayed, Rotation

Row = dict[str, object]
TOLERANCE = {"float32": 1e-3, "bfloat16": 2e-2}
"""Between contenders, relative: this tells a wrong contender from a right one, no more."""


@dataclass(frozen=True)
class Settings:
    device: torch.device
    contenders: tuple[Contender, ...]
    repeats: int
    slice_us: float  # about how long a contender is measured before the next one's turn
    copy_bytes: int
    cache_bytes: int
    compile_seconds: float  # all shapes together


@dataclass
class Rows:
    """What becomes the three CSVs."""

    time: list[Row] = field(default_factory=list)
    memory: list[Row] = field(default_factory=list)
    launches: list[Row] = field(default_factory=list)


def _key(case: Case, name: str) -> Row:
    return {
        "rows": case.rows,
        "columns": case.columns,
        "dtype": case.dtype,
        "contender": name,
    }


def _time_row(
    case: Case, name: str, mode: str, times: Sequence[float], inputs: int, note: str
) -> Row:
    values = (statistics.median(times), min(times), max(times)) if times else ()
    shown = [f"{value:.2f}" for value in values] or [""] * 3
    return {
        **_key(case, name),
        "mode": mode,
        **dict(zip(("median_us", "lowest_us", "highest_us"), shown, strict=True)),
        "inputs": inputs,
        "note": note,
    }


def left_out(case: Case, name: str, note: str, rows: Rows) -> None:
    """The reason, in every CSV, of a contender that was not measured."""
    rows.time.append(_time_row(case, name, "", (), 0, note))
    rows.memory.append({**_key(case, name), "peak_over_logits": "", "note": note})
    rows.launches.append({**_key(case, name), "launches": "", "kernels": "", "note": note})


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
    """One run over many shapes; remembers how long compilers have taken so far."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._compiled_for = 0.0
        self._copy = Copy(settings.copy_bytes, settings.device)

    def measure(self, case: Case, rows: Rows) -> None:
        settings = self.settings
        inputs = make_inputs(case, inputs_wanted(case, settings.cache_bytes), settings.device)
        steps: dict[str, Pass] = {}
        truth = None
        # Plain PyTorch first: the others are compared with it.
        for one in sorted(settings.contenders, key=lambda one: one is not EAGER):
            step, result, note = self._prepare(one, case, inputs[0], truth)
            if step is None:
                left_out(case, one.name, note, rows)
                continue
            if one is EAGER:
                truth = result
            del result
            steps[one.name] = step
        del truth
        order = [one.name for one in settings.contenders if one.name in steps]
        self._times(case, {name: steps[name] for name in order}, inputs, rows)
        self._clear()
        for name in order:
            self._counters(case, name, steps[name], inputs[0], rows)
        del inputs, steps
        self._clear()

    def _prepare(
        self, one: Contender, case: Case, logits: Tensor, truth: tuple[Tensor, Tensor] | None
    ) -> tuple[Pass | None, tuple[Tensor, Tensor] | None, str]:
        """A pass that has run once, its result, or the reason why there is none."""
        free = self._free_bytes()
        reason = one.unavailable() or lack_of_memory(one, case, free)
        if one.compiles and self._compiled_for > self.settings.compile_seconds:
            reason = "the time for compilers was spent"
        if reason:
            return None, None, reason
        start = time.monotonic()
        try:
            step = one.make()
            result = step(logits)
            note = "" if truth is None else disagreement(result, truth, case)
        except Exception as error:  # a contender that fails must not end the run
            self._clear()
            return None, None, f"failed: {_one_line(error)}"
        if one.compiles:
            self._compiled_for += time.monotonic() - start
        return (None, None, note) if note else (step, result, "")

    def _times(self, case: Case, steps: dict[str, Pass], inputs: list[Tensor], rows: Rows) -> None:
        settings = self.settings
        clocks: dict[tuple[str, str], Launched | Replayed | Copy] = {}
        notes: dict[str, str] = {}
        for name, step in steps.items():
            try:
                launched = Launched(Rotation(step, inputs), settings.device, settings.slice_us)
            except Exception as error:
                left_out(case, name, f"failed: {_one_line(error)}", rows)
                continue
            clocks[name, launched.mode] = launched
            if settings.device.type == "cpu" or launched.estimate_us > GRAPH_BELOW_US:
                continue
            try:
                replayed = Replayed(Rotation(step, inputs), settings.device, settings.slice_us)
                clocks[name, replayed.mode] = replayed
            except Exception as error:
                notes[name] = f"no graph: {_one_line(error)}"
        clocks[COPY, self._copy.mode] = self._copy
        for clock in clocks.values():  # captures have emptied the allocator's cache
            clock.sample_us()
        samples: dict[tuple[str, str], list[float]] = {key: [] for key in clocks}
        for _ in range(settings.repeats):
            for key, clock in clocks.items():
                samples[key].append(clock.sample_us())
        for (name, mode), times in samples.items():
            used = 1 if name == COPY else len(inputs)
            rows.time.append(_time_row(case, name, mode, times, used, notes.get(name, "")))

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
        rows.memory.append({**_key(case, name), **self._counted(peak, nothing)})
        nothing = {"launches": "", "kernels": ""}
        rows.launches.append({**_key(case, name), **self._counted(launches, nothing)})

    def _counted(self, count: Callable[[], Row], nothing: Row) -> Row:
        if self.settings.device.type == "cpu":
            return {**nothing, "note": "needs a GPU"}
        try:
            return {**count(), "note": ""}
        except Exception as error:
            return {**nothing, "note": f"failed: {_one_line(error)}"}

    def _free_bytes(self) -> int:
        if self.settings.device.type == "cpu":
            return 1 << 40
        cached = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return torch.cuda.mem_get_info()[0] + cached

    def _clear(self) -> None:
        gc.collect()
        if self.settings.device.type == "cuda":
            torch.cuda.empty_cache()


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:160]}"
