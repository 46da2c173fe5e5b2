"""Zero-shot CLIP: the baseline that every other method is compared with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor
from torch.utils.data import Dataset

from ueo_fast.finetune.methods.base import Method
from ueo_fast.finetune.model import ClipClassifier
from ueo_fast.finetune.trainer import History, OnStep, TrainerConfig


@dataclass(frozen=True)
class ZeroShot(Method):
    """Leaves the classifier as it is."""

    title: ClassVar[str] = "zero-shot"

    def adapt(
        self,
        classifier: ClipClassifier,
        images: Dataset[Any] | Tensor,
        *,
        confidence: Tensor | None = None,
        config: TrainerConfig | None = None,
        on_step: OnStep | None = None,
    ) -> History:
        return History()
