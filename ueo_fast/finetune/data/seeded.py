"""Randomness that depends on what is drawn, not on what was drawn before."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def mixed_seed(*numbers: int) -> int:
    """One seed of 64 bits from several numbers, none negative; their order matters."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


@contextmanager
def seeded_torch(seed: int) -> Iterator[None]:
    """Inside, torch's generator of the CPU starts from ``seed``; after it, it is as it was.

    Not ``torch.random.fork_rng`` and ``torch.manual_seed``, which touch the generators of GPUs.
    """
    before = torch.default_generator.get_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.default_generator.set_state(before)


@contextmanager
def seeded(*numbers: int) -> Iterator[None]:
    """Inside, the global generators of torch (CPU), Python and NumPy start from ``numbers``; after
    it they are as they were.
    """
    seed = mixed_seed(*numbers)
    # NumPy's old generator, as it is the one that augmentations draw from; it takes 32 bits.
    before = random.getstate(), np.random.get_state()  # noqa: NPY002
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)  # noqa: NPY002
    try:
        with seeded_torch(seed):
            yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])  # noqa: NPY002
