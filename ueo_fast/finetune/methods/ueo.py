"""Universal Entropy Optimization: entropy down where confident, diversity up where not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from torch import Tensor

from ueo_fast import mcm_score, ueo_loss
from ueo_fast.finetune.clip.model import ClipClassifier
from ueo_fast.finetune.engine.objective import Objective, Step
from ueo_fast.finetune.methods.base import LossMethod, check_entropies
from ueo_fast.finetune.target import Target
from ueo_fast.ranges import check_number

Confidence = Literal["zeroshot", "online"]


@dataclass(frozen=True)
class UEO(LossMethod):
    """``L = sum_i a_i H(p_i) - λ H(sum_i b_i p_i)``, ``a ∝ w`` and ``b ∝ 1 / w``.

    Images that the zero-shot model is sure of (probably known) lower their entropy; the others
    (probably unknown) carry the marginal whose entropy is raised.

    Attributes:
        trade_off: λ.
        confidence: ``zeroshot`` takes the weights ``w`` from the zero-shot model and un-augmented
            images, once; ``online`` from the model as it is, in every batch.
        mcm_scale: multiplies the *cosines* in ``w_i = max softmax(mcm_scale * cosines_i)``. The
            authors use 1, which makes the weights nearly uniform.
        eps: added inside the logarithms; 1e-5 is the authors' released code.

    Source: docs/math.md, steps 1 to 7; arXiv 2308.12919, section 3.3.
    """

    trade_off: float = 1.0
    confidence: Confidence = "zeroshot"
    mcm_scale: float = 1.0
    eps: float = 0.0

    name: ClassVar[str] = "ueo"
    title: ClassVar[str] = "UEO"

    def __post_init__(self) -> None:
        if self.confidence not in get_args(Confidence):
            raise ValueError(
                f"confidence={self.confidence!r} is unknown: choose one of "
                f"{', '.join(get_args(Confidence))}"
            )
        check_entropies(eps=self.eps, trade_off=self.trade_off)
        check_number("mcm_scale", self.mcm_scale, sign="positive")

    def compares_images(self) -> bool:
        return self.trade_off != 0

    def objective(self, classifier: ClipClassifier, target: Target) -> Objective:
        frozen = target.confidence(self.mcm_scale) if self.confidence == "zeroshot" else None
        return _UniversalEntropy(self, frozen)


class _UniversalEntropy(Objective):
    weights: Tensor | None

    def __init__(self, method: UEO, weights: Tensor | None) -> None:
        super().__init__()
        self.method = method
        self.register_buffer("weights", weights)

    def forward(self, step: Step) -> Tensor:
        if self.weights is None:
            w = mcm_score(step.cosines.detach(), self.method.mcm_scale)
        else:
            w = self.weights[step.positions]
        return ueo_loss(step.logits, w, trade_off=self.method.trade_off, eps=self.method.eps)
