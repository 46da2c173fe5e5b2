"""What a visual tower's forward pass saves for backward, and the peak memory of a step.

python -m benchmarks.visual_memory CASE CONTENDER      # one JSON line
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.allocator import MAPPED
from benchmarks.memory import status
from benchmarks.visual_cases import DRY_CASES, MEMORY_CASES, Step, VisualCase

CONTENDERS = ("patched", "eager", "everything")
HEAP_CONTENDERS = CONTENDERS[:2]
"""Also measured with the default allocator."""


def _storage(tensor: Tensor) -> tuple[int, int]:
    """The address and size of the memory behind a tensor."""
    storage = tensor.untyped_storage()
    return storage.data_ptr(), storage.nbytes()


def _nodes(root: torch.autograd.graph.Node) -> Iterator[torch.autograd.graph.Node]:
    """All nodes of a graph, in the order of the operations."""
    seen, waiting = set(), [root]
    while waiting:
        node = waiting.pop()
        if node not in seen:
            seen.add(node)
            waiting += [following for following, _ in node.next_functions if following is not None]
    yield from sorted(seen, key=lambda node: node._sequence_nr())


def _saved_by(node: torch.autograd.graph.Node) -> Iterator[Tensor]:
    """The tensors that an operation saves for its backward."""
    for name in dir(node):
        if name == "saved_tensors" or name.startswith("_saved_"):
            value = getattr(node, name)
            values = value if isinstance(value, tuple | list) else (value,)
            yield from (one for one in values if isinstance(one, Tensor))


def saved(step: Step) -> tuple[int, dict[str, int]]:
    """Bytes saved for backward besides parameters, buffers and images, in total and by operation.

    Memory counts once, however many operations and views save it; if different operations do, it
    counts under all their names together.
    """
    module = step.visual
    known = {_storage(t)[0] for t in (*module.parameters(), *module.buffers(), step.images)}
    packed: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        pointer, size = _storage(tensor)
        packed[pointer] = size
        held.append(tensor)  # otherwise its memory could be reused and counted as the same
        return tensor

    held: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        features = step.forward()
    kinds: dict[int, set[str]] = defaultdict(set)
    assert features.grad_fn is not None
    for node in _nodes(features.grad_fn):
        for tensor in _saved_by(node):
            kinds[_storage(tensor)[0]].add(re.sub(r"Backward[0-9]*$", "", node.name()))
    by_kind: dict[str, int] = defaultdict(int)
    for pointer, size in packed.items():
        if size and pointer not in known:
            by_kind[" + ".join(sorted(kinds.get(pointer, {"?"})))] += size
    return sum(by_kind.values()), dict(by_kind)


def peak(step: Step) -> int:
    """The memory that a step adds at its peak: activations and gradients.

    The caller must have run the step once, as first-call state is not part of a training step.
    """
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = status("VmRSS")
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    step()
    return status("VmHWM") - before


@dataclass(frozen=True)
class Found:
    saved: int
    peak: int
    by_kind: dict[str, int]


def measure(case: VisualCase, name: str, threads: int, allocator: dict[str, str] = MAPPED) -> Found:
    """Measure both in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.visual_memory", str(case), name, str(threads)],
        env=dict(os.environ, **allocator),
        capture_output=True,
        text=True,
        check=True,
    )
    return Found(**json.loads(done.stdout.splitlines()[-1]))


def measure_all(threads: int) -> list[dict[str, object]]:
    """One row per case, contender and quantity.

    ``quantity`` is saved, peak, "peak as it comes" (with the default allocator), or the names of
    operations that save something.
    """
    rows: list[dict[str, object]] = []
    for case in MEMORY_CASES:
        for name in CONTENDERS:
            found = measure(case, name, threads)
            key = {**case.key, "contender": name}
            quantities = {"saved": found.saved, "peak": found.peak, **found.by_kind}
            if case.dtype == "float32" and name in HEAP_CONTENDERS:
                quantities["peak as it comes"] = measure(case, name, threads, {}).peak
            rows += [{**key, "quantity": what, "bytes": size} for what, size in quantities.items()]
    return rows


def main(wanted: str, name: str, threads: str = "2") -> None:
    torch.set_num_threads(int(threads))
    (case,) = (case for case in (*MEMORY_CASES, *DRY_CASES) if str(case) == wanted)
    step = Step(name, case, torch.device("cpu"))
    total, by_kind = saved(step)
    print(json.dumps({"saved": total, "peak": peak(step), "by_kind": by_kind}))


if __name__ == "__main__":
    main(*sys.argv[1:])
