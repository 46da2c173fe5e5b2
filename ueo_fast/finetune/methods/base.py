"""The one interface that every adaptation method has."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from torch import Tensor
from torch.utils.data import Dataset

from ueo_fast.finetune.model import ClipClassifier
from ueo_fast.finetune.trainer import History, OnStep, TrainerConfig, train


class Method(ABC):
    """Adapts a classifier to unlabelled images.

    Attributes:
        title: how it is written in tables.
    """

    title: ClassVar[str]

    @abstractmethod
    def adapt(
        self,
        classifier: ClipClassifier,
        images: Dataset[Any] | Tensor,
        *,
        confidence: Tensor | None = None,
        config: TrainerConfig | None = None,
        on_step: OnStep | None = None,
    ) -> History:
        """Change ``classifier`` in place.

        Args:
            classifier: the zero-shot model to start from.
            images: N unlabelled images of the target, a dataset or a tensor (N, 3, H, W).
            confidence: (N,) zero-shot confidence by image index; see ``zero_shot_confidence``.
            config: budget and optimiser; ``None`` takes the authors'.
            on_step: called after each step with (steps done, steps in all, loss).

        Returns:
            One entry per gradient step; empty where the method takes none.
        """


class LossMethod(Method):
    """A method that is a loss of each batch, minimised by the common training loop."""

    @abstractmethod
    def loss(self, logits: Tensor, confidence: Tensor | None) -> Tensor:
        """Loss of one batch, 0-d, from logits (B, C) and confidence (B,)."""

    def adapt(
        self,
        classifier: ClipClassifier,
        images: Dataset[Any] | Tensor,
        *,
        confidence: Tensor | None = None,
        config: TrainerConfig | None = None,
        on_step: OnStep | None = None,
    ) -> History:
        return train(
            classifier,
            images,
            self.loss,
            confidence=confidence,
            config=config,
            on_step=on_step,
        )
