"""DANCE: cluster each image with its neighbours, and separate sure images from unsure ones."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ueo_fast import ueo_loss
from ueo_fast.finetune.clip.model import ClipClassifier
from ueo_fast.finetune.engine.objective import Objective, Step
from ueo_fast.finetune.methods.base import LossMethod
from ueo_fast.finetune.target import Target
from ueo_fast.ranges import check_number
from ueo_fast.reference import compute_dtype


@dataclass(frozen=True)
class DANCE(LossMethod):
    """``L = mean_i H(q_i) + mean_i s(H(p_i))``: neighbourhood clustering + entropy separation.

    ``q_i = softmax_j(f_i · v_j / τ)`` is how much image ``i`` resembles each neighbour: ``v`` are
    the C class prototypes (text features) and the features of all other images, from the batch or,
    as they were when last seen, from a memory bank. Its entropy is lowered, so that an image moves
    to a prototype or to a cluster of its own kind.

    ``s(h) = -|h - ρ|`` where ``|h - ρ| > m``, else 0, with ``ρ = log(C) / 2``: predictions much
    surer than ρ become surer still (known), much less sure ones less (unknown). ``log 2 / 2`` is
    below 0.5: with two classes nothing is ever separated at the default margin.

    Unlike the paper there is no labelled source, so no source loss, and no weight 0.05 of both
    terms, which would only scale the learning rate. The classifier keeps CLIP's own temperature in
    ``p``; τ is that of ``q`` alone. Images never seen so far are not neighbours (masked); in the
    authors' code they are zero vectors, of similarity 0 to everything. ``i`` itself is masked too,
    where the code gives it similarity -1. Inside the margin the code's term is the constant ``-m``
    instead of the paper's 0: the same gradient.

    The bank takes 4 N E bytes, in memory and in each checkpoint (700 MB for 175,000 images and 1024
    features: save fewer with ``checkpoint_every``), and a batch B (C + N + B) similarities.

    Attributes:
        temperature: τ.
        margin: m, in nats.
        eps: added inside the logarithms; 1e-5 is the authors' released code.

    Source: Saito et al., *Universal Domain Adaptation through Self-Supervision*, NeurIPS 2020,
    arXiv 2002.07953, "Neighborhood Clustering" and "Entropy Separation"; authors'
    ``train_dance.py``, ``utils/loss.py``, ``models/LinearAverage.py`` (momentum 0, as configured).
    """

    temperature: float = 0.05
    margin: float = 0.5
    eps: float = 0.0

    name: ClassVar[str] = "dance"
    title: ClassVar[str] = "DANCE"

    def __post_init__(self) -> None:
        check_number("temperature", self.temperature, sign="positive")
        check_number("margin", self.margin, sign="not negative")
        check_number("eps", self.eps, sign="not negative")

    @torch.no_grad()
    def objective(self, classifier: ClipClassifier, target: Target) -> Objective:
        return _Neighbours(self, len(target), classifier.text_features().shape[1])


class _Neighbours(Objective):
    bank: Tensor
    seen: Tensor

    def __init__(self, method: DANCE, images: int, features: int) -> None:
        super().__init__()
        self.method = method
        self.register_buffer("bank", torch.zeros(images, features, device="cpu"))
        self.register_buffer("seen", torch.zeros(images, dtype=torch.bool, device="cpu"))

    def forward(self, step: Step) -> Tensor:
        logits = step.logits.to(compute_dtype(step.logits.dtype))
        return self._clustering(step, logits.dtype) + self._separation(logits)

    def remember(self, step: Step) -> None:
        features = F.normalize(step.image_features.to(self.bank.dtype), dim=1)
        self.bank[step.positions] = features
        self.seen[step.positions] = True

    def _clustering(self, step: Step, dtype: torch.dtype) -> Tensor:
        images = step.image_features.to(dtype)
        stale = ~self.seen
        stale[step.positions] = True  # the batch has newer features of these
        own = torch.eye(len(images), dtype=torch.bool, device=images.device)
        similarities = [
            images @ step.text_features.to(dtype).T,
            (images @ self.bank.to(dtype).T).masked_fill(stale, -math.inf),
            (images @ images.T).masked_fill(own, -math.inf),
        ]
        logits = torch.cat(similarities, dim=1) / self.method.temperature
        # -inf is a masked class: the mean entropy of the rows over what is left.
        ones = logits.new_ones(len(logits))
        return ueo_loss(logits, ones, trade_off=0.0, eps=self.method.eps)

    def _separation(self, logits: Tensor) -> Tensor:
        log_p = torch.log_softmax(logits, dim=1)
        p = log_p.exp()
        entropy = -(p * (log_p if self.method.eps == 0 else (p + self.method.eps).log())).sum(dim=1)
        distance = (entropy - math.log(logits.shape[1]) / 2).abs()
        return -torch.where(distance > self.method.margin, distance, 0.0).mean()
