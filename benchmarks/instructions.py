"""Counts what the loss's inner loops execute: `python -m benchmarks.instructions` (needs objdump).

Reads the compiled library and writes benchmarks/results/ueo_loss_cpu_instructions.csv: per loop of
the AVX2 code, instructions for each register of eight float32 that it computes. A processor that
starts n of a kind per cycle takes at least their number / n cycles.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import ueo_fast
from benchmarks import render, results_file
from benchmarks.environment import describe
from benchmarks.loss_tables import INSTRUCTIONS

KINDS = {
    "multiply": r"v?(fn?m(add|sub)|mul)",
    "add": r"v?(add|sub|max|min)p",
    "integer": r"v?p(ermd|add|sub|sll|srl|ermps)",
    "load or store": r"v?mov(dq)?[au]\S* .*\(",
}
"""By column: the instructions' names; those with an operand in memory load as well."""

FORWARD = "forward_rows<float, float>"
BACKWARD = "backward_rows<float, float>"


STORE = r"v?mov(dq)?[au]\S* %[xyz]mm\d+,.*\("


@dataclass(frozen=True)
class Loop:
    """One that the docs name: its function, what its body has and lacks, what counts registers."""

    name: str
    function: str
    has: str
    lacks: str
    per: str
    rows: int = 1
    """Rows of logits that each counted instruction stands for."""


LOOPS = (
    Loop("forward: maximum", FORWARD, r"v?maxps", r"prefetch|v?mulps", r"v?maxps"),
    Loop("forward: exponentials and their sums", FORWARD, r"prefetch", r"v?maxps", r"v?minps"),
    Loop("forward: column sums of four rows", FORWARD, r"v?(fmadd|mulps)",
         r"prefetch|v?(min|max|sub|div)", STORE, rows=4),
    Loop("backward: exponentials and slopes", BACKWARD, r"prefetch", r"v?maxps", r"v?minps"),
    Loop("backward: gradient", BACKWARD, r"v?subps", r"prefetch|v?(min|div|add)p|v?cmpp", STORE),
)  # fmt: skip


def functions(library: str, name: str) -> Iterator[list[tuple[int, str]]]:
    """Address and text of each instruction of every function of that name."""
    command = ["objdump", "-d", "--no-show-raw-insn", "-C", library]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for block in re.split(r"\n(?=[0-9a-f]+ <)", text):
        head, _, body = block.partition("\n")
        if f"{name}(" in head:
            lines = re.findall(r"^ +([0-9a-f]+):\t(.*)$", body, re.MULTILINE)
            yield [(int(address, 16), line.split("#")[0].strip()) for address, line in lines]


def inner_loops(function: list[tuple[int, str]]) -> Iterator[list[str]]:
    """The bodies of loops that hold no other loop."""
    place = {address: index for index, (address, _) in enumerate(function)}
    spans = []
    for end, (_, text) in enumerate(function):
        jump = re.match(r"j\w+ +([0-9a-f]+)", text)
        start = place.get(int(jump.group(1), 16)) if jump else None
        if start is not None and start <= end:
            spans.append((start, end))
    for start, end in spans:
        if not any(start <= s and e <= end and (s, e) != (start, end) for s, e in spans):
            yield [text for _, text in function[start : end + 1]]


def count(body: list[str], pattern: str) -> int:
    return sum(re.match(pattern, text) is not None for text in body)


def rows(library: str) -> list[dict[str, object]]:
    """One per loop."""
    found: list[dict[str, object]] = []
    for loop in LOOPS:
        for function in functions(library, loop.function):
            text = " ".join(line for _, line in function)
            if "ymm" not in text or "zmm" in text:  # the same name, of another instruction set
                continue
            bodies = [
                (count(body, loop.per), -len(body), body)
                for body in inner_loops(function)
                if count(body, loop.per) and count(body, loop.has) and not count(body, loop.lacks)
            ]
            registers, _, body = max(bodies)  # the unrolled one, where a remainder has another
            per = registers * loop.rows
            row: dict[str, object] = {"loop": loop.name}
            row["instructions"] = f"{len(body) / per:.1f}"
            for kind, pattern in KINDS.items():
                row[kind] = f"{count(body, pattern) / per:.1f}"
            found.append(row)
    return found


def main() -> None:
    library = str(Path(ueo_fast.__file__).parent / "_cpu.so")
    facts = {
        "instruction set": "avx2",
        "threads": "none: counted, not run",
        "command": "python -m benchmarks.instructions",
    }
    header = describe(**facts)
    results_file.write(INSTRUCTIONS, header, rows(library))
    render.main()


if __name__ == "__main__":
    main()
