"""What launchers share: dtypes, the device of a tensor, numbers as Triton takes them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from ctypes import c_float
from typing import Any

import torch
from torch import Tensor

from ueo_fast.triton.tuning import TUNING

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """Of all arithmetic: float64 for float64, float32 for everything else."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def split(value: float) -> tuple[float, float]:
    """Two float32 numbers whose sum is the value to 48 bits: Triton passes floats as float32."""
    high = c_float(value).value
    return high, c_float(value - high).value


@functools.lru_cache(maxsize=64)
def processors_of(device: torch.device) -> int:
    """SMs or compute units; in the interpreter a number of its own."""
    if device.type != "cuda":
        return TUNING.interpreted_processors
    return torch.cuda.get_device_properties(device).multi_processor_count


def on_device(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with the GPU of its first argument that is not 0-d as the current one."""

    @functools.wraps(function)
    def guarded(*arguments: Any) -> Any:
        logits = next(a for a in arguments if isinstance(a, Tensor) and a.ndim > 0)
        with torch.cuda.device_of(logits):
            return function(*arguments)

    return guarded
