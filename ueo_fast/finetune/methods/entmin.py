"""Entropy minimisation: make every prediction certain."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ueo_fast import ueo_loss
from ueo_fast.finetune.clip.model import ClipClassifier
from ueo_fast.finetune.engine.objective import Objective, Step
from ueo_fast.finetune.methods.base import LossMethod, check_entropies
from ueo_fast.finetune.target import Target


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

    name: ClassVar[str] = "entmin"
    title: ClassVar[str] = "EntMin"

    def __post_init__(self) -> None:
        check_entropies(eps=self.eps)

    def objective(self, classifier: ClipClassifier, target: Target) -> Objective:
        return _Entropy(self.eps)


class _Entropy(Objective):
    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, step: Step) -> Tensor:
        ones = step.logits.new_ones(len(step.logits))
        return ueo_loss(step.logits, ones, trade_off=0.0, eps=self.eps)
