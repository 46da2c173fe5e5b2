"""Learning rates as a function of the step: no state, so nothing to save and nothing to drift."""

from __future__ import annotations

import math

from ueo_fast.finetune.engine.training_config import Schedule


def decay(schedule: Schedule, done: int, total: int) -> float:
    """What the learning rates are multiplied by in the step after ``done`` of ``total``.

    ``cosine`` is ``(1 + cos(π done / total)) / 2``: 1 in the first step, and nearly 0 in the last.

    Source: Loshchilov and Hutter, *SGDR*, 2017, equation 5, without restarts; authors' ``demo.py``
    (``CosineAnnealingLR``, stepped per batch).
    """
    if schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * done / total))
