"""Unsupervised prompt learning: cross-entropy on the surest zero-shot labels of each class."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ueo_fast.finetune.clip.model import ClipClassifier
from ueo_fast.finetune.engine.objective import Objective, Step
from ueo_fast.finetune.methods.base import LossMethod
from ueo_fast.finetune.target import Target
from ueo_fast.ranges import check_count

UNCHOSEN = -1
_ROWS = 16384
"""Images whose zero-shot predictions are looked at in one go."""


@dataclass(frozen=True)
class UPL(LossMethod):
    """``L = -mean_i log p_i[y_i]`` over the chosen images, with zero-shot labels ``y_i``.

    ``y_i = argmax_c p_i[c]`` of the zero-shot model; of the images with the same label the ``k``
    with the largest ``p_i[y_i]`` are chosen, once, and the others are never trained on. As in the
    authors' code an image belongs to its most probable class alone, so no image is chosen twice,
    a class that few images are put into has fewer than ``k``, and one without images has none.
    Where two probabilities are equal (the authors leave it to an unstable sort) the first class
    wins, and the earlier image.

    The paper trains a context of 16 random tokens and nothing else, and averages several zero-shot
    models and several trained prompts (UPL*). Here the context is that of the given prompt, the
    affine parameters are trained with it unless ``affine_lr`` is 0, and there is one model.

    Attributes:
        k: images per class, at most.

    Source: Huang, Chu, Wei, *Unsupervised Prompt Learning for Vision-Language Models*, 2022, arXiv
    2204.03649, "Pseudo Label Generation" (top-K) and "Prompt Representation Optimization"
    (cross-entropy); authors' ``trainers/utils.py``, ``select_top_k_similarity_per_class``.
    """

    k: int = 16

    name: ClassVar[str] = "upl"
    title: ClassVar[str] = "UPL"

    def __post_init__(self) -> None:
        check_count("k", self.k, least=1)

    def objective(self, classifier: ClipClassifier, target: Target) -> Objective:
        cosines = target.zero_shot_cosines()
        scale = classifier.logit_scale.to(cosines.device, torch.float64)
        # In double, where the probabilities of sure images do not all round to 1; in parts, as the
        # whole in double would take more memory than all the rest.
        surest = [
            (scale * rows.double()).softmax(dim=1).max(dim=1) for rows in cosines.split(_ROWS)
        ]
        confidence, labels = (torch.cat(parts) for parts in zip(*surest, strict=True))
        return _PseudoLabels(surest_labels(confidence, labels, self.k))


def surest_labels(confidence: Tensor, labels: Tensor, k: int) -> Tensor:
    """(N,) ``labels`` of the ``k`` images of each label with the most ``confidence``, else -1."""
    order = confidence.argsort(descending=True, stable=True)
    order = order[labels[order].argsort(stable=True)]  # by class, within it by confidence
    counts = labels.bincount()
    first = counts.cumsum(dim=0) - counts
    rank = torch.arange(len(order), device=order.device) - first[labels[order]]
    chosen = order[rank < k]
    found = torch.full_like(labels, UNCHOSEN)
    found[chosen] = labels[chosen]
    return found


class _PseudoLabels(Objective):
    labels: Tensor

    def __init__(self, labels: Tensor) -> None:
        super().__init__(subset=torch.nonzero(labels != UNCHOSEN).flatten())
        self.register_buffer("labels", labels)

    def forward(self, step: Step) -> Tensor:
        return F.cross_entropy(step.logits, self.labels[step.positions])
