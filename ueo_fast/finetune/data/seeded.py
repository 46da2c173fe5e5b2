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
def seeded(*numbers: int) -> Iterator[None]:
    """Inside, the global generators of torch (CPU), Python and NumPy start from ``numbers``; after
    it they are as they were.

    Not ``torch.random.fork_rng``, which would also touch the generators of GPUs.
    """
    seed = mixed_seed(*numbers)
    # NumPy's old generator, as it is the one that augmentations draw from; it takes 32 bits.
    before = torch.default_generator.get_state(), random.getstate(), np.random.get_state()  # noqa: NPY002
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)  # noqa: NPY002
    try:
        yield
    finally:
        torch.default_generator.set_state(before[0])
        random.setstate(before[1])
        np.random.set_state(before[2])  # noqa: NPY002
