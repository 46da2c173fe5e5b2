"""Universal Entropy Optimization: entropy down where confident, diversity up where not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ueo_fast import ueo_loss
from ueo_fast.finetune.methods.base import LossMethod


@dataclass(frozen=True)
class UEO(LossMethod):
    """``L = sum_i a_i H(p_i) - λ H(sum_i b_i p_i)``, ``a ∝ w`` and ``b ∝ 1 / w``.

    Images that the zero-shot model is sure of (probably known) lower their entropy; the others
    (probably unknown) carry the marginal whose entropy is raised.

    Attributes:
        trade_off: λ.
        confidence_scale: used where no confidence is given: the batch's own
            ``max softmax(confidence_scale * logits)`` is the weight.
        eps: added inside the logarithms; 1e-5 is the authors' released code.

    Source: docs/math.md, steps 1 to 7; arXiv 2308.12919, section 3.3.
    """

    trade_off: float = 1.0
    confidence_scale: float = 1.0
    eps: float = 0.0

    title: ClassVar[str] = "UEO"

    def loss(self, logits: Tensor, confidence: Tensor | None) -> Tensor:
        return ueo_loss(
            logits,
            confidence,
            trade_off=self.trade_off,
            confidence_scale=self.confidence_scale,
            eps=self.eps,
        )
