"""What a method minimises: the loss of one batch, and what it remembers between batches."""

from __future__ import annotations

from abc import abstractmethod
from typing import NamedTuple

from torch import Tensor, nn

from ueo_fast.finetune.clip.model import ClipClassifier


class Step(NamedTuple):
    """What the classifier says about a batch of B images and C classes, E features each.

    Attributes:
        cosines: (B, C) cosine of image and text features.
        logits: (B, C) ``logit_scale * cosines``.
        image_features: (B, E), L2-normalised.
        text_features: (C, E), L2-normalised.
        positions: (B,) int64, the position of each image among the target's, in whatever order the
            batches come.
    """

    cosines: Tensor
    logits: Tensor
    image_features: Tensor
    text_features: Tensor
    positions: Tensor


class Objective(nn.Module):
    """The loss of one batch: ``objective(step) -> 0-d``.

    Whatever depends on the images (confidence, pseudo-labels, a memory bank) is a buffer, looked
    up by ``step.positions``: it moves with ``.to(device)``, and a resumed run finds it again in its
    checkpoint.

    Args:
        subset: int64, the positions of the images to train on; ``None`` takes all.
    """

    subset: Tensor | None

    choices: str = ""
    """The options of the method that made it; a run that is resumed must have the same."""

    def __init__(self, subset: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("subset", subset)

    def prepare(self, classifier: ClipClassifier) -> None:
        """Called once before the first step, when ``classifier`` is in evaluation mode."""

    @abstractmethod
    def forward(self, step: Step) -> Tensor:
        """Loss of one batch, 0-d, differentiable by all of ``step`` but the positions."""

    def remember(self, step: Step) -> None:
        """Called after the optimiser's step, without gradients, with what the loss was given."""

    def predictions(self) -> Tensor | None:
        """(N, C) cosines that were computed while training, if they are the method's result."""
        return None
