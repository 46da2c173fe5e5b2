"""The authors' upper bound: UEO told which images are known."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ueo_fast import ueo_loss
from ueo_fast.finetune.clip.model import ClipClassifier
from ueo_fast.finetune.engine.objective import Objective, Step
from ueo_fast.finetune.methods.base import LossMethod, check_entropies
from ueo_fast.finetune.target import Target

DOUBT = 1e-3
"""What the weight of an unknown image is, and what is added to that of a known one."""


def check_labels(labels: Tensor | None) -> Tensor:
    """The labels that a method reads.

    Raises:
        ValueError: there are none.
    """
    if labels is None:
        raise ValueError(
            "labels is None, but the oracle is told which images are of a known class: give "
            "labelled images (class folders, or a list with labels), or take method 'ueo'"
        )
    return labels


@dataclass(frozen=True)
class Oracle(LossMethod):
    """The loss of UEO with ``w_i = 1[image i is of a known class] + 1e-3``.

    Which of the known classes it is stays untold. It says what a perfect confidence would be worth
    to UEO; it needs ground truth, so it is no way to adapt to unlabelled images.

    Attributes:
        trade_off: λ.
        eps: added inside the logarithms; 1e-5 is the authors' released code.

    Source: ``--oracle`` of the authors' ``demo.py``; loss: docs/math.md, step 7; arXiv 2308.12919.
    """

    trade_off: float = 1.0
    eps: float = 0.0

    name: ClassVar[str] = "oracle"
    title: ClassVar[str] = "oracle"
    reads_labels: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_entropies(eps=self.eps, trade_off=self.trade_off)

    def compares_images(self) -> bool:
        return self.trade_off != 0

    def objective(self, classifier: ClipClassifier, target: Target) -> Objective:
        """As :meth:`LossMethod.objective`.

        Raises:
            ValueError: the target has no labels.
        """
        labels = check_labels(target.labels)
        classes = len(classifier.prompt.class_names)
        known = (labels >= 0) & (labels < classes)
        return _ToldEntropy(self, known.float() + DOUBT)


class _ToldEntropy(Objective):
    weights: Tensor

    def __init__(self, method: Oracle, weights: Tensor) -> None:
        super().__init__()
        self.method = method
        self.register_buffer("weights", weights)

    def forward(self, step: Step) -> Tensor:
        w = self.weights[step.positions]
        return ueo_loss(step.logits, w, trade_off=self.method.trade_off, eps=self.method.eps)
