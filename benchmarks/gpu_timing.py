"""Time of passes on a GPU: events around them, as launched from Python or replayed as a graph.

On a CPU (`--dry-run`) a wall clock and no graphs.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.gpu_cases import Pass

GRAPH_PASSES = 20
"""At least so many passes in a graph: what a replay itself costs is then small."""

GRAPH_BELOW_US = 2000.0
"""Above that the gaps between launches are nothing, and graphs would hold much memory."""


def elapsed_us(run: Callable[[], object], device: torch.device) -> float:
    """Microseconds that the device is at it, from the first launch to the last kernel's end."""
    if device.type == "cpu":
        begin = time.perf_counter()
        run()
        return 1e6 * (time.perf_counter() - begin)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return 1e3 * start.elapsed_time(end)


class Rotation:
    """Calls a pass over several inputs in turns and keeps as many results as there are inputs.

    Otherwise the allocator would hand out the same gradient again and again, out of the cache.
    """

    def __init__(self, step: Pass, inputs: list[Tensor]) -> None:
        self.step = step
        self.inputs = inputs
        self._results: list[object] = [None] * len(inputs)
        self._next = 0

    def run(self, calls: int) -> None:
        for _ in range(calls):
            self._results[self._next] = self.step(self.inputs[self._next])
            self._next = (self._next + 1) % len(self.inputs)

    def release(self) -> None:
        self._results = [None] * len(self.inputs)


class Launched:
    """Passes one after the other, as a training loop launches them."""

    mode = "launched"

    def __init__(self, rotation: Rotation, device: torch.device, slice_us: float) -> None:
        self._rotation = rotation
        self._device = device
        rotation.run(3)
        self.estimate_us = elapsed_us(lambda: rotation.run(3), device) / 3
        rotation.release()
        self._calls = max(3, min(300, round(slice_us / max(self.estimate_us, 0.1))))

    def sample_us(self) -> float:
        """Microseconds of one pass."""
        spent = elapsed_us(lambda: self._rotation.run(self._calls), self._device)
        self._rotation.release()
        return spent / self._calls


class Replayed:
    """The same passes in one CUDA graph: no gap between them."""

    mode = "replayed"

    def __init__(self, rotation: Rotation, device: torch.device, slice_us: float) -> None:
        inputs = len(rotation.inputs)
        self._passes = inputs * -(-GRAPH_PASSES // inputs)
        self._device = device
        current = torch.cuda.current_stream()
        side = torch.cuda.Stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):  # warm-up where capturing will happen: not the default stream
            rotation.run(3)
        current.wait_stream(side)
        torch.cuda.synchronize()
        rotation.release()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            rotation.run(self._passes)
        rotation.release()  # the memory stays with the graph
        self._graph.replay()
        once = elapsed_us(self._graph.replay, device)
        self._replays = max(1, min(100, round(slice_us / max(once, 0.1))))

    def _replay(self) -> None:
        for _ in range(self._replays):
            self._graph.replay()

    def sample_us(self) -> float:
        """Microseconds of one pass."""
        return elapsed_us(self._replay, self._device) / (self._replays * self._passes)


class Copy:
    """A device-to-device copy far beyond the cache: what the floors are counted from."""

    mode = "launched"

    def __init__(self, size: int, device: torch.device) -> None:
        self._source = torch.randn(size // 4, device=device)
        self._target = torch.empty_like(self._source)
        self._device = device
        self.sample_us()

    def _copy(self) -> None:
        for _ in range(3):
            self._target.copy_(self._source)

    def sample_us(self) -> float:
        """Microseconds of one copy, which moves twice its size."""
        return elapsed_us(self._copy, self._device) / 3
