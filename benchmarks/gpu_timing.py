"""Time passes on a GPU with events, as launched from Python or replayed as a graph.

On a CPU (`--dry-run`): a wall clock, no graphs. Also holds what the GPU's benchmarks share.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import results_file

GRAPH_US = 2000.0
"""A graph takes at least this long, so that the overhead of a replay is small. No longer, since
graphs hold memory."""

GRAPH_PASSES = 20
"""The most passes in a graph, unless there are more inputs."""

OUT_OF_TIME = "the time for the benchmark was spent"
"""Note of a contender that was not begun."""


def arguments(doc: str, seconds: float, argv: list[str] | None) -> argparse.Namespace:
    """Parse the arguments of a benchmark that runs for about ``seconds`` by default."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--out", type=Path, default=results_file.FOLDER, help="folder of the CSVs")
    parser.add_argument("--seconds", type=float, default=seconds, help="stop after about that long")
    parser.add_argument("--dry-run", action="store_true", help="on a CPU, with tiny shapes")
    return parser.parse_args(argv)


def lacks_gpu(dry_run: bool) -> bool:
    """Check whether a GPU is needed and missing, and report that on stderr."""
    if dry_run or torch.cuda.is_available():
        return False
    print("no GPU is present that torch can use: only --dry-run runs here", file=sys.stderr)
    return True


def command(module: str, seconds: float, dry_run: bool) -> str:
    """Format the command of a benchmark for its CSVs, without any path of this machine."""
    flags = [f"--seconds {seconds:g}", *["--dry-run"] * dry_run]
    return " ".join([f"python -m benchmarks.{module}", *flags])


def clear(device: torch.device) -> None:
    """Free unreachable objects and the memory that PyTorch's allocator caches."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def elapsed_us(run: Callable[[], object], device: torch.device) -> float:
    """Measure microseconds on the device, from the first launch to the end of the last kernel."""
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
    """Run a pass over several inputs in turn and keep as many results as there are inputs.

    Otherwise the allocator would reuse the memory of one gradient, which stays in the cache.
    """

    def __init__(self, step: Callable[[Tensor], object], inputs: list[Tensor]) -> None:
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


QUEUE_CYCLES = 50_000_000
"""The device waits about 30 ms, so that a few passes are queued before the first begins."""


class Launched:
    """Run passes one after the other, as a training loop launches them."""

    mode = "launched"

    def __init__(self, rotation: Rotation, device: torch.device, slice_us: float) -> None:
        self._rotation = rotation
        self._device = device
        rotation.run(3)
        estimate_us = elapsed_us(lambda: rotation.run(3), device) / 3
        self._calls = max(3, min(300, round(slice_us / max(estimate_us, 0.1))))
        if device.type == "cuda":
            torch.cuda._sleep(QUEUE_CYCLES)
            estimate_us = elapsed_us(lambda: rotation.run(3), device) / 3
        rotation.release()
        self.device_us = estimate_us

    def sample_us(self) -> float:
        """Measure microseconds of one pass."""
        spent = elapsed_us(lambda: self._rotation.run(self._calls), self._device)
        self._rotation.release()
        return spent / self._calls


class Replayed:
    """Replay the same passes as one CUDA graph, without gaps. On a CPU, just run them."""

    mode = "replayed"

    def __init__(
        self, rotation: Rotation, device: torch.device, slice_us: float, device_us: float
    ) -> None:
        inputs = len(rotation.inputs)
        wanted = min(GRAPH_PASSES, max(1, round(GRAPH_US / max(device_us, 0.1))))
        self._passes = inputs * -(-wanted // inputs)
        self._device = device
        self._run_once = self._captured(rotation)
        self._run_once()
        once = elapsed_us(self._run_once, device)
        self._replays = max(1, min(100, round(slice_us / max(once, 0.1))))

    def _captured(self, rotation: Rotation) -> Callable[[], None]:
        if self._device.type == "cpu":
            return lambda: rotation.run(self._passes)
        current = torch.cuda.current_stream()
        side = torch.cuda.Stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):  # warm-up where capturing will happen: not the default stream
            rotation.run(3)
        current.wait_stream(side)
        torch.cuda.synchronize()
        rotation.release()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            rotation.run(self._passes)
        rotation.release()  # the memory stays with the graph
        return graph.replay

    def _replay(self) -> None:
        for _ in range(self._replays):
            self._run_once()

    def sample_us(self) -> float:
        """Measure microseconds of one pass."""
        return elapsed_us(self._replay, self._device) / (self._replays * self._passes)


class Copy:
    """Run a device-to-device copy much larger than the cache, for the floors."""

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
        """Measure microseconds of one copy, which moves twice its size."""
        return elapsed_us(self._copy, self._device) / 3


Clock = Launched | Replayed | Copy


def make_clocks(
    step: Callable[[Tensor], object], inputs: list[Tensor], device: torch.device, slice_us: float
) -> tuple[list[Clock], str]:
    """Make the clocks of a pass, launched and replayed, or say why it is not replayed."""
    launched = Launched(Rotation(step, inputs), device, slice_us)
    try:
        rotation = Rotation(step, inputs)
        return [launched, Replayed(rotation, device, slice_us, launched.device_us)], ""
    except Exception as error:
        return [launched], f"no graph: {one_line(error)}"


def in_turns(
    clocks: Mapping[Hashable, Callable[[], float]], repeats: int
) -> dict[Hashable, list[float]]:
    """Measure microseconds of each ``repeats`` times, after a turn that only warms up."""
    samples: dict[Hashable, list[float]] = {key: [] for key in clocks}
    for turn in range(repeats + 1):
        for key, sample_us in clocks.items():
            spent = sample_us()
            if turn:
                samples[key].append(spent)
    return samples


def one_line(error: Exception, limit: int = 160) -> str:
    """Format an error as one line, with at most ``limit`` characters of its message."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:limit]}"
