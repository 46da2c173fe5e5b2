"""A small search over plans, for those who ask for it with UEO_FAST_TRITON_AUTOTUNE=1."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import triton.testing

from ueo_fast.triton.tuning import Plan, make_plan

Result = TypeVar("Result")

TILE_SCALES = (1.0, 0.5, 2.0)  # the default first: a tie keeps it

_found: dict[tuple[Any, ...], Plan] = {}


def is_wanted() -> bool:
    """Whether the environment asks for the search."""
    return os.environ.get("UEO_FAST_TRITON_AUTOTUNE") == "1"


def with_best_plan(
    name: str,
    device: torch.device,
    shape: tuple[int, int],
    dtype: torch.dtype,
    processors: int,
    run: Callable[[Plan], Result],
) -> Result:
    """run(plan) with the default plan, or with the fastest one once the search is asked for.

    The search runs at the first call with a shape, which waits for the GPU: not while a CUDA graph
    is being captured (the default is taken then), and never for tensors on the CPU.
    """
    plans = [make_plan(*shape, dtype == torch.float64, processors, k) for k in TILE_SCALES]
    if device.type != "cuda" or not is_wanted():
        return run(plans[0])
    key = (name, device, shape, dtype)
    if key not in _found and not torch.cuda.is_current_stream_capturing():
        times = [triton.testing.do_bench(lambda plan=plan: run(plan)) for plan in plans]
        _found[key] = plans[times.index(min(times))]
    return run(_found.get(key, plans[0]))
