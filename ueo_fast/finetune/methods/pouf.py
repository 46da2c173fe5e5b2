"""POUF: transport class prototypes and images onto each other, with mutual information."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ueo_fast import ueo_loss
from ueo_fast.finetune.clip.model import ClipClassifier
from ueo_fast.finetune.engine.objective import Objective, Step
from ueo_fast.finetune.methods.base import LossMethod, check_entropies
from ueo_fast.finetune.target import Target
from ueo_fast.reference import compute_dtype


@dataclass(frozen=True)
class POUF(LossMethod):
    """``L = mean_i sum_c π_ic (1 - cos_ic) + mean_c sum_i ρ_ic (1 - cos_ic) - λ I``.

    ``π = softmax of the logits over classes`` moves each image to prototypes (text features),
    ``ρ = softmax over the batch's images`` each prototype to images, at cost ``1 - cosine``.
    ``I = H(mean_i p_i) - mean_i H(p_i)`` is the mutual information of image and prediction, which
    is InfoMax. Known and unknown images count the same.

    The paper also fine-tunes the whole model, with Nesterov momentum, weight decay and a learned
    temperature; here the prompt and the affine parameters are trained, by the common loop.

    Attributes:
        information_weight: λ. The paper's 0.3, ``--lambda-im`` of the authors' code; the transport
            has weight 1.
        eps: added inside the logarithms; the authors' code has 1e-5 in the entropy of images and
            1e-6 in that of their mean.

    Source: Tanwisuth et al., *POUF: Prompt-oriented unsupervised fine-tuning for large pre-trained
    models*, ICML 2023, arXiv 2305.00350, section 2 (transport in both directions, mutual
    information); ``compute_transport_loss`` and ``compute_im_loss`` of the authors' ``pouf.py``.
    """

    information_weight: float = 0.3
    eps: float = 0.0

    name: ClassVar[str] = "pouf"
    title: ClassVar[str] = "POUF"

    def __post_init__(self) -> None:
        check_entropies(eps=self.eps, information_weight=self.information_weight)

    def compares_images(self) -> bool:
        return True

    def objective(self, classifier: ClipClassifier, target: Target) -> Objective:
        return _Transport(self)


class _Transport(Objective):
    def __init__(self, method: POUF) -> None:
        super().__init__()
        self.method = method

    def forward(self, step: Step) -> Tensor:
        logits = step.logits.to(compute_dtype(step.logits.dtype))
        cost = 1 - step.cosines.to(logits.dtype)
        to_classes = (torch.softmax(logits, dim=1) * cost).sum(dim=1).mean()
        to_images = (torch.softmax(logits, dim=0) * cost).sum(dim=0).mean()
        information = -ueo_loss(logits, logits.new_ones(len(logits)), eps=self.method.eps)
        return to_classes + to_images - self.method.information_weight * information
