"""`python -m benchmarks [PART ...]`: measure, write benchmarks/results/*.csv, redraw the docs.

Parts: `loss` (about five minutes on two cores), `calls` (half a minute), `affine` and `visual`
(six minutes together), `step` (a quarter of an hour and 16 GB), `input` (a quarter of an hour).
Without a name, all of them. pytest-benchmark measures time in a process of its own (`calls` in this
one). The loss and the affine layers are measured twice: with an allocator that keeps its memory,
and with the default one. `loss --instruction-set avx2` measures the loss's time with the first
allocator, as on a processor without AVX-512.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import (
    bench_calls,
    input_run,
    instruction_set,
    loss_tables,
    memory,
    render,
    results_file,
    step_cases,
    training_tables,
    visual_cases,
    visual_memory,
)
from benchmarks.allocator import MAPPED, TUNED
from benchmarks.cases import CASES
from benchmarks.environment import describe
from benchmarks.tables import LAYER_KEYS, LOSS_KEYS, TOWER_KEYS
from ueo_fast import backends

FOLDER = Path(__file__).parent
MEMORY_CONTENDERS = ("ueo_fast", "eager", "compile")
MEMORY_FROM_BYTES = 4 << 20
"""With less, the noise of the process itself is a large part of the result."""
DEFAULT: dict[str, str] = {}
"""No settings of the allocator."""

Header = dict[str, str]
Rows = list[dict[str, object]]


def run_bench(
    bench: str, threads: int, repeats: int, allocator: dict[str, str]
) -> list[dict[str, Any]]:
    """Run a file of benchmarks in a process of its own; return pytest-benchmark's runs."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "benchmark.json"
        environment = dict(
            os.environ,
            UEO_FAST_BENCH_THREADS=str(threads),
            UEO_FAST_BENCH_REPEATS=str(repeats),
            **allocator,
        )
        command = [sys.executable, "-m", "pytest", "-q", str(FOLDER / bench)]
        command += [f"--benchmark-json={output}", "--benchmark-quiet"]
        subprocess.run(command, env=environment, check=True)
        runs: list[dict[str, Any]] = json.loads(output.read_text())["benchmarks"]
    return runs


def measure_time(
    bench: str, keys: Sequence[str], threads: int, repeats: int, allocator: dict[str, str]
) -> Rows:
    """One row per case and contender: medians over the repeats, in microseconds."""
    names = (*keys, "contender")
    collected: dict[tuple[object, ...], list[float]] = defaultdict(list)
    for run in run_bench(bench, threads, repeats, allocator):
        key = tuple(run["extra_info"][name] for name in names)
        collected[key].append(1e6 * run["stats"]["median"])
    return [
        {**dict(zip(names, key, strict=True)), **results_file.spread(times)}
        for key, times in collected.items()
    ]


def step_rows(runs: Sequence[Mapping[str, Any]]) -> Rows:
    """One row per case, contender and part: medians over the turns, in seconds."""
    names = ("model", "batch", "classes", "contender")
    spent: dict[tuple[object, ...], list[float]] = defaultdict(list)
    for run in runs:
        info = run["extra_info"]
        case = tuple(info[name] for name in names)
        parts = {training_tables.WHOLE: run["stats"]["median"], **info["parts"]}
        for part, seconds in parts.items():
            spent[(*case, part)].append(seconds)
    return [
        {
            **dict(zip((*names, "part"), key, strict=True)),
            **results_file.spread(seconds, "s", digits=5),
            "turns": len(seconds),
        }
        for key, seconds in spent.items()
    ]


def measure_memory() -> Rows:
    return [
        {**case.key, "contender": name, "peak_over_logits": f"{memory.measure(case, name):.2f}"}
        for case in CASES
        if case.bytes >= MEMORY_FROM_BYTES
        for name in MEMORY_CONTENDERS
    ]


def save(csv: str, rows: Rows, header: Header, allocator: dict[str, str]) -> None:
    """Write a CSV with the machine, the header and the allocator's settings."""
    words = " ".join(f"{key}={value}" for key, value in allocator.items()) or "as it comes"
    results_file.write(csv, describe(**header, allocator=words), rows)


def measure_loss(header: Header, threads: int, repeats: int) -> None:
    for csv, allocator in ((loss_tables.LOSS_TUNED, TUNED), (loss_tables.LOSS_DEFAULT, DEFAULT)):
        rows = measure_time("bench_ueo_loss.py", LOSS_KEYS, threads, repeats, allocator)
        save(csv, rows, header, allocator)
    results_file.write(loss_tables.LOSS_MEMORY, describe(**header), measure_memory())


def measure_calls(header: Header, threads: int, repeats: int) -> None:
    """Measure on one thread, as this is Python's time; ``threads`` has no effect."""
    reason = backends.unavailable_reason("cpp")
    if reason is not None:
        sys.exit(f"calls: {reason}")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    rows = bench_calls.measure(repeats)
    torch.set_num_threads(before)
    save(loss_tables.CALLS, rows, {**header, "threads": "1"}, DEFAULT)


def measure_restricted_loss(header: Header, threads: int, repeats: int, name: str) -> None:
    """As :func:`measure_loss`, but only what depends on the instruction set."""
    rows = measure_time("bench_ueo_loss.py", LOSS_KEYS, threads, repeats, TUNED)
    save(f"ueo_loss_cpu_tuned_allocator_{name}.csv", rows, header, TUNED)


def measure_affine(header: Header, threads: int, repeats: int) -> None:
    few = {"UEO_FAST_BENCH_CASES": "few"}  # page faults take long
    rows = measure_time("bench_affine.py", LAYER_KEYS, threads, repeats, TUNED)
    save(training_tables.LAYERS_TUNED, rows, header, TUNED)
    rows = measure_time("bench_affine.py", LAYER_KEYS, threads, repeats, few)
    save(training_tables.LAYERS_DEFAULT, rows, header, DEFAULT)


def with_open_clip(part: str, header: Header) -> Header:
    """Add open_clip's version to the header, or exit if it is not installed."""
    reason = visual_cases.unavailable_reason()
    if reason is not None:
        sys.exit(f"{part}: {reason}: pip install 'ueo_fast[clip]'")
    return {**header, "open_clip": visual_cases.version()}


def measure_visual(header: Header, threads: int, repeats: int) -> None:
    header = with_open_clip("visual", header)
    save(training_tables.PATCH_MEMORY, visual_memory.measure_all(threads), header, MAPPED)
    rows = measure_time("bench_visual_step.py", TOWER_KEYS, threads, repeats, TUNED)
    save(training_tables.PATCH_STEP, rows, header, TUNED)


def measure_step(header: Header, threads: int, repeats: int) -> None:
    # With the default allocator: the tuned one would need half as much again of the many gigabytes
    # that the authors' step takes.
    header = with_open_clip("step", header)
    rows = measure_time("bench_step_text.py", ("classes", "rows"), threads, repeats, DEFAULT)
    save(training_tables.STEP_TEXT, rows, header, DEFAULT)
    runs: list[dict[str, Any]] = []
    for case in step_cases.CASES:  # each in its own process, and saved at once: they take minutes
        runs += run_bench("bench_step.py", threads, repeats, {"UEO_FAST_BENCH_CASES": str(case)})
        save(training_tables.STEP, step_rows(runs), header, DEFAULT)


def measure_input(header: Header, threads: int, repeats: int) -> None:
    """Measure loading on one thread, as a worker does it; then whole runs on all."""
    versions = {name: importlib.metadata.version(name) for name in ("pillow", "torchvision")}
    rows = measure_time("bench_input.py", training_tables.INPUT_KEYS, 1, repeats, DEFAULT)
    save(training_tables.INPUT, rows, {**header, **versions, "threads": "1"}, DEFAULT)
    save(training_tables.INPUT_RUN, input_run.measure(threads), {**header, **versions}, DEFAULT)


PARTS: dict[str, tuple[Callable[[Header, int, int], None], int]] = {
    "loss": (measure_loss, 7),
    "calls": (measure_calls, 1000),
    "affine": (measure_affine, 5),
    "visual": (measure_visual, 3),
    "step": (measure_step, 3),
    "input": (measure_input, 5),
}
"""What measures each part, and the number of turns of each contender."""


def pin(threads: int) -> str:
    """Keep this process and its children on as many processors as there are threads."""
    if not hasattr(os, "sched_setaffinity"):
        return ""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-threads:])
    return " (one per processor)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--repeats", type=int, help="turns of each contender (default: depends on PART)"
    )
    parser.add_argument(
        "--instruction-set",
        choices=instruction_set.RESTRICTIONS,
        help="restrict ours, PyTorch and torch.compile to it (loss only)",
    )
    args = parser.parse_args()
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"unknown part {', '.join(sorted(unknown))}: choose from {', '.join(PARTS)}")
    parts = args.parts or list(PARTS)
    restricted: str | None = args.instruction_set
    if restricted is not None:
        if parts != ["loss"]:
            parser.error(
                f"--instruction-set {restricted} measures only the loss: "
                f"python -m benchmarks loss --instruction-set {restricted}"
            )
        instruction_set.restrict(restricted)
    pinned = pin(args.threads)
    failed = []
    for part in parts:
        measure, usual = PARTS[part]
        repeats = args.repeats or usual
        command = f"python -m benchmarks {part} --threads {args.threads} --repeats {repeats}"
        if restricted is not None:
            measure = functools.partial(measure_restricted_loss, name=restricted)
            command += f" --instruction-set {restricted}"
        header = {"threads": f"{args.threads}{pinned}", "command": command}
        try:
            measure(header, args.threads, repeats)
        except subprocess.CalledProcessError as error:  # the other parts may still work
            print(f"{part}: {error}", file=sys.stderr)
            failed.append(part)
    render.main()
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
