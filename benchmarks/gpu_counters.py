"""Peak memory and launches of one pass on a GPU."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch


def peak_bytes(run: Callable[[], object]) -> int:
    """What a pass takes at most beyond what was allocated before it, its results included."""
    run()  # compilation, workspaces and first-call state are not what a training step holds
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    held = run()
    torch.cuda.synchronize()
    del held
    return torch.cuda.max_memory_allocated() - before


def count_launches(events: Iterable[Any]) -> Counter[str]:
    """Kernels, copies and fills on the device, by name, out of a profiler's events."""
    return Counter(
        event.name
        for event in events
        if event.device_type.name == "CUDA" and not getattr(event, "is_user_annotation", False)
    )


def launches(run: Callable[[], object]) -> Counter[str]:
    """What a pass launches, by name. The caller has run it before."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    return count_launches(profile.events())


def short_name(kernel: str) -> str:
    """A kernel's name without its return type, arguments and template parameters."""
    name = re.sub(r"<.*|\(.*", "", kernel.replace("(anonymous namespace)::", ""))
    return name.removeprefix("void ").split("::")[-1].strip() or kernel[:40]
