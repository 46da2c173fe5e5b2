"""Information maximisation: certain predictions, spread over all classes."""

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
class InfoMax(LossMethod):
    """``L = mean_i H(p_i) - λ H(mean_i p_i)``: the UEO loss with ``w = 1``.

    With ``λ = 1`` it is minus the mutual information of image and prediction. Known and unknown
    images count the same.

    Attributes:
        trade_off: λ.
        eps: added inside the logarithms; 1e-5 is the authors' released code.

    Source: docs/math.md, step 7 with ``w_i = 1``; ``--noweight`` of the authors' ``demo.py``.
    """

    trade_off: float = 1.0
    eps: float = 0.0

    name: ClassVar[str] = "infomax"
    title: ClassVar[str] = "InfoMax"

    def __post_init__(self) -> None:
        check_entropies(eps=self.eps, trade_off=self.trade_off)

    def compares_images(self) -> bool:
        return self.trade_off != 0

    def objective(self, classifier: ClipClassifier, target: Target) -> Objective:
        return _Information(self)


class _Information(Objective):
    def __init__(self, method: InfoMax) -> None:
        super().__init__()
        self.method = method

    def forward(self, step: Step) -> Tensor:
        ones = step.logits.new_ones(len(step.logits))
        return ueo_loss(step.logits, ones, trade_off=self.method.trade_off, eps=self.method.eps)
