"""Checks of the numbers and words that users choose. Without PyTorch, so that a command line can be
checked before anything is loaded."""

from __future__ import annotations

import numbers
from collections.abc import Iterable
from typing import Literal

LARGEST = 1e30
"""Numbers beyond this, and factors closer to 0 than its inverse, would not survive float32."""

_SMALLEST = 1 / LARGEST

LARGEST_FACTOR = 1e6
"""Limit of learning rates and weights of loss terms: beyond it, the first step overflows."""

MOST = 1_000_000_000
"""Limit of counts: images in a batch, steps, epochs."""

MOST_THREADS = 1024
"""Far more threads crash the thread library without a message."""

MOST_WORKERS = 1024
"""Worker processes that a run may ask for; how many start depends on the machine."""


def check_count(name: str, value: int, least: int = 1, most: int = MOST) -> int:
    """A whole number of things.

    Raises:
        TypeError: ``value`` is not a whole number.
        ValueError: it is below ``least`` or above ``most``.
    """
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        kind = type(value).__name__
        raise TypeError(f"{name} must be a whole number, got {kind} {value!r}: convert with int()")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    if value > most:
        raise ValueError(f"{name} must be at most {most:,}, got {value}")
    return int(value)


def check_number(
    name: str,
    value: float,
    *,
    sign: Literal["any", "positive", "not negative"],
    most: float = LARGEST,
) -> float:
    """A number of a magnitude up to ``most``; with a sign asked for, also 0 or at least 1e-30."""
    if type(value) is not float and type(value) is not int:  # any other question takes longer
        if not isinstance(value, numbers.Real) or isinstance(value, bool):
            kind = type(value).__name__
            raise TypeError(f"{name} must be a number, got {kind} {value!r}: convert with float()")
        value = float(value)
    # Comparisons only: while torch.compile traces, the number may be a symbol.
    if sign == "any":
        fits = -most <= value <= most
    elif sign == "positive":
        fits = _SMALLEST <= value <= most
    else:
        fits = value == 0 or _SMALLEST <= value <= most
    if fits:
        return float(value)
    least = f"{-most:g}" if sign == "any" else f"{_SMALLEST:g}"
    zero = "0 or " if sign == "not negative" else ""
    raise ValueError(f"{name} must be {zero}from {least} to {most:g}, got {value}")


def check_one_of(name: str, value: object, choices: Iterable[str]) -> None:
    """One of a few words.

    Raises:
        ValueError: ``value`` is not one of ``choices``.
    """
    choices = tuple(choices)
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name}={value!r} is unknown: choose one of {', '.join(choices)}")
