"""Entropy minimisation: make every prediction certain."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ueo_fast import ueo_loss
from ueo_fast.finetune.methods.base import LossMethod


@dataclass(frozen=True)
class EntMin(LossMethod):
    """``L = mean_i H(p_i)``: the UEO loss with ``w = 1`` and no marginal term (``λ = 0``).

    Nothing keeps the predictions from collapsing into one class, and unknown images are made as
    certain as known ones.

    Attributes:
        eps: added inside the logarithms; 1e-5 is the authors' released code.

    Source: docs/math.md, step 7 with ``w_i = 1``, ``λ = 0``; Grandvalet and Bengio, 2004.
    """

    eps: float = 0.0

    title: ClassVar[str] = "EntMin"

    def loss(self, logits: Tensor, confidence: Tensor | None) -> Tensor:
        return ueo_loss(logits, logits.new_ones(len(logits)), trade_off=0.0, eps=self.eps)
