"""Losses of entropies: UEO, its special cases InfoMax and EntMin, and the authors' upper bound."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from torch import Tensor

from ueo_fast import mcm_score, ueo_loss
from ueo_fast.finetune.clip.model import ClipClassifier
from ueo_fast.finetune.engine.objective import Objective, Step
from ueo_fast.finetune.methods.base import LossMethod, check_entropies
from ueo_fast.finetune.target import Target
from ueo_fast.ranges import check_number, check_one_of

Confidence = Literal["zeroshot", "online"]

DOUBT = 1e-3
"""What the weight of an unknown image is, and what is added to that of a known one."""


class WeightedEntropy(Objective):
    """``ueo_loss`` of a batch.

    Args:
        trade_off: λ.
        eps: added inside the logarithms.
        weights: (N,) confidence of each image; ``None``: all the same.
    """

    weights: Tensor | None

    def __init__(self, trade_off: float, eps: float, weights: Tensor | None = None) -> None:
        super().__init__()
        self.trade_off, self.eps = trade_off, eps
        self.register_buffer("weights", weights)

    def confidence(self, step: Step) -> Tensor:
        """(B,) ``w`` of the batch."""
        if self.weights is None:
            return step.logits.new_ones(len(step.logits))
        return self.weights[step.positions]

    def forward(self, step: Step) -> Tensor:
        w = self.confidence(step)
        return ueo_loss(step.logits, w, trade_off=self.trade_off, eps=self.eps)


class _EntropyMethod(LossMethod):
    trade_off: float
    eps: float

    def __post_init__(self) -> None:
        check_entropies(eps=self.eps, trade_off=self.trade_off)

    def compares_images(self) -> bool:
        return self.trade_off != 0

    def objective(self, classifier: ClipClassifier, target: Target) -> Objective:
        return WeightedEntropy(self.trade_off, self.eps)


@dataclass(frozen=True)
class UEO(_EntropyMethod):
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
        check_one_of("confidence", self.confidence, get_args(Confidence))
        super().__post_init__()
        check_number("mcm_scale", self.mcm_scale, sign="positive")

    def objective(self, classifier: ClipClassifier, target: Target) -> Objective:
        if self.confidence == "online":
            return _OnlineConfidence(self.trade_off, self.eps, self.mcm_scale)
        return WeightedEntropy(self.trade_off, self.eps, target.confidence(self.mcm_scale))


class _OnlineConfidence(WeightedEntropy):
    def __init__(self, trade_off: float, eps: float, mcm_scale: float) -> None:
        super().__init__(trade_off, eps)
        self.mcm_scale = mcm_scale

    def confidence(self, step: Step) -> Tensor:
        return mcm_score(step.cosines.detach(), self.mcm_scale)


@dataclass(frozen=True)
class InfoMax(_EntropyMethod):
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


@dataclass(frozen=True)
class EntMin(_EntropyMethod):
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
    trade_off: ClassVar[float] = 0.0  # type: ignore[misc]  # not an option of this method


@dataclass(frozen=True)
class Oracle(_EntropyMethod):
    """The loss of UEO with ``w_i = 1[image i is of a known class] + 1e-3``.

    It is not told which of the known classes. It shows what a perfect confidence would be worth to
    UEO; it needs ground truth, so it cannot adapt to unlabelled images.

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

    def objective(self, classifier: ClipClassifier, target: Target) -> Objective:
        """As :meth:`LossMethod.objective`.

        Raises:
            ValueError: the target has no labels.
        """
        labels = check_labels(target.labels)
        known = (labels >= 0) & (labels < len(classifier.prompt.class_names))
        return WeightedEntropy(self.trade_off, self.eps, known.float() + DOUBT)


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
