"""`python -m benchmarks [PART ...]`: measures, writes benchmarks/results/*.csv, redraws the docs.

Parts: `loss` (about five minutes on two cores), `calls` (half a minute), `affine` and `visual`
(some six together), `step` (a quarter of an hour and 16 GB), `input` (a quarter of an hour); all of
them without a name. Time is measured by pytest-benchmark in a process of its own (that of `calls`
in this one), of the loss and of the affine layers twice: with an allocator that keeps its memory,
and with the allocator as a process comes.
`loss --instruction-set avx2` measures the loss's time, with the first of these, as on a processor
without AVX-512.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import json
import os
import statistics
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
    cpu_tables,
    input_run,
    instruction_set,
    memory,
    render,
    results_file,
    step_cases,
    visual_cases,
    visual_memory,
)
from benchmarks.allocator import MAPPED_ALLOCATOR as MAPPED
from benchmarks.allocator import TUNED_ALLOCATOR
from benchmarks.cases import CASES
from benchmarks.environment import describe
from benchmarks.tables import LAYER_KEYS, LOSS_KEYS, TOWER_KEYS
from ueo_fast import backends

FOLDER = Path(__file__).parent
MEMORY_CONTENDERS = ("ueo_fast", "eager", "compile")
MEMORY_FROM_BYTES = 4 << 20
"""Below that the process's own noise is a good part of what is measured."""
ALLOCATORS = {"tuned": TUNED_ALLOCATOR, "default": {}}

Header = dict[str, str]
Rows = list[dict[str, object]]


def run_bench(
    bench: str, threads: int, repeats: int, allocator: dict[str, str]
) -> list[dict[str, Any]]:
    """What pytest-benchmark says of each run of a file, in a process of its own."""
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
    runs = run_bench(bench, threads, repeats, allocator)
    collected: dict[tuple[object, ...], list[float]] = defaultdict(list)
    for run in runs:
        key = tuple(run["extra_info"][name] for name in (*keys, "contender"))
        collected[key].append(1e6 * run["stats"]["median"])
    return [
        {
            **dict(zip((*keys, "contender"), key, strict=True)),
            "median_us": f"{statistics.median(times):.1f}",
            "lowest_us": f"{min(times):.1f}",
            "highest_us": f"{max(times):.1f}",
        }
        for key, times in collected.items()
    ]


def step_rows(runs: Sequence[Mapping[str, Any]]) -> Rows:
    """One row per case, contender and part: medians over the turns, in seconds."""
    spent: dict[tuple[object, ...], list[float]] = defaultdict(list)
    for run in runs:
        info = run["extra_info"]
        case = (info["model"], info["batch"], info["classes"], info["contender"])
        for part, seconds in {cpu_tables.WHOLE: run["stats"]["median"], **info["parts"]}.items():
            spent[(*case, part)].append(seconds)
    return [
        {
            **dict(zip(("model", "batch", "classes", "contender", "part"), key, strict=True)),
            "median_s": f"{statistics.median(seconds):.5f}",
            "lowest_s": f"{min(seconds):.5f}",
            "highest_s": f"{max(seconds):.5f}",
            "turns": len(seconds),
        }
        for key, seconds in spent.items()
    ]


def measure_memory() -> Rows:
    return [
        {
            **case.key,
            "contender": name,
            "peak_over_logits": f"{memory.measure(case, name):.2f}",
        }
        for case in CASES
        if case.bytes >= MEMORY_FROM_BYTES
        for name in MEMORY_CONTENDERS
    ]


def _words(values: dict[str, str]) -> str:
    return " ".join(f"{key}={value}" for key, value in values.items()) or "as it comes"


def measure_loss(header: Header, threads: int, repeats: int) -> None:
    for name, allocator in ALLOCATORS.items():
        rows = measure_time("bench_ueo_loss.py", LOSS_KEYS, threads, repeats, allocator)
        about = describe(**header, allocator=_words(allocator))
        results_file.write(f"ueo_loss_cpu_{name}_allocator.csv", about, rows)
    results_file.write("ueo_loss_cpu_memory.csv", describe(**header), measure_memory())


def measure_calls(header: Header, threads: int, repeats: int) -> None:
    """On one thread, as what is measured is Python; ``threads`` has no effect."""
    reason = backends.unavailable_reason("cpp")
    if reason is not None:
        sys.exit(f"calls: {reason}")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    rows = bench_calls.measure(repeats)
    torch.set_num_threads(before)
    about = {**header, "threads": "1", "allocator": _words({})}
    results_file.write(cpu_tables.CALLS, describe(**about), rows)


def measure_restricted_loss(header: Header, threads: int, repeats: int, name: str) -> None:
    """As :func:`measure_loss`, of what depends on the instruction set."""
    rows = measure_time("bench_ueo_loss.py", LOSS_KEYS, threads, repeats, TUNED_ALLOCATOR)
    about = describe(**header, allocator=_words(TUNED_ALLOCATOR))
    results_file.write(f"ueo_loss_cpu_tuned_allocator_{name}.csv", about, rows)


def measure_affine(header: Header, threads: int, repeats: int) -> None:
    for name, allocator in ALLOCATORS.items():
        settings = allocator or {"UEO_FAST_BENCH_CASES": "few"}  # page faults take long
        rows = measure_time("bench_affine.py", LAYER_KEYS, threads, repeats, settings)
        about = describe(**header, allocator=_words(allocator))
        results_file.write(f"affine_cpu_{name}_allocator.csv", about, rows)


def measure_visual(header: Header, threads: int, repeats: int) -> None:
    reason = visual_cases.unavailable_reason()
    if reason is not None:
        sys.exit(f"visual: {reason}: pip install 'ueo_fast[clip]'")
    header = {**header, "open_clip": visual_cases.version()}
    rows = visual_memory.measure_all(threads)
    results_file.write("visual_memory.csv", describe(**header, allocator=_words(MAPPED)), rows)
    rows = measure_time("bench_visual_step.py", TOWER_KEYS, threads, repeats, TUNED_ALLOCATOR)
    about = describe(**header, allocator=_words(TUNED_ALLOCATOR))
    results_file.write("visual_step_cpu.csv", about, rows)


def measure_step(header: Header, threads: int, repeats: int) -> None:
    reason = visual_cases.unavailable_reason()
    if reason is not None:
        sys.exit(f"step: {reason}: pip install 'ueo_fast[clip]'")
    # As it comes: glibc's heap, kept, would need half as much again of the authors' many gigabytes.
    about = {**header, "open_clip": visual_cases.version(), "allocator": _words({})}
    rows = measure_time("bench_step_text.py", ("classes", "rows"), threads, repeats, {})
    results_file.write(cpu_tables.STEP_TEXT, describe(**about), rows)
    runs: list[dict[str, Any]] = []
    for case in step_cases.CASES:  # a process each, and a file at once: they take minutes
        runs += run_bench("bench_step.py", threads, repeats, {"UEO_FAST_BENCH_CASES": str(case)})
        results_file.write(cpu_tables.STEP, describe(**about), step_rows(runs))


def measure_input(header: Header, threads: int, repeats: int) -> None:
    """Loading on one thread, as a worker does it; then whole runs on all."""
    rows = measure_time("bench_input.py", cpu_tables.INPUT_KEYS, 1, repeats, {})
    about = {**header, "threads": "1", "allocator": _words({})}
    for name in ("pillow", "torchvision"):
        about[name] = importlib.metadata.version(name)
    results_file.write(cpu_tables.INPUT, describe(**about), rows)
    about["threads"] = header["threads"]
    results_file.write(cpu_tables.INPUT_RUN, describe(**about), input_run.measure(threads))


PARTS: dict[str, tuple[Callable[[Header, int, int], None], int]] = {
    "loss": (measure_loss, 7),
    "calls": (measure_calls, 1000),
    "affine": (measure_affine, 5),
    "visual": (measure_visual, 3),
    "step": (measure_step, 3),
    "input": (measure_input, 5),
}
"""Name to what measures it and how often each contender takes its turn."""


def pin(threads: int) -> str:
    """Keeps this process and its children on as many processors as there are threads."""
    if not hasattr(os, "sched_setaffinity"):
        return ""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-threads:])
    return " (one per processor)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, help="by default what suits the part")
    parser.add_argument(
        "--instruction-set",
        choices=instruction_set.RESTRICTIONS,
        help="keep ours, PyTorch and torch.compile to it (loss only)",
    )
    args = parser.parse_args()
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"unknown part {', '.join(sorted(unknown))}: choose of {', '.join(PARTS)}")
    parts = args.parts or list(PARTS)
    restricted: str | None = args.instruction_set
    if restricted is not None:
        if parts != ["loss"]:
            parser.error(
                f"--instruction-set {restricted} measures the loss alone: "
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
        except subprocess.CalledProcessError as error:  # the other parts are worth having
            print(f"{part}: {error}", file=sys.stderr)
            failed.append(part)
    render.main()
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
