"""Zero-shot CLIP: the baseline that every other method is compared with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ueo_fast.finetune.clip.model import ClipClassifier
from ueo_fast.finetune.engine.hooks import Hooks
from ueo_fast.finetune.engine.trainer import History, TrainerConfig
from ueo_fast.finetune.methods.base import Method
from ueo_fast.finetune.target import Target


@dataclass(frozen=True)
class ZeroShot(Method):
    """Leaves the classifier as it is."""

    name: ClassVar[str] = "zeroshot"
    title: ClassVar[str] = "zero-shot"

    def trains_tower(self, config: TrainerConfig) -> bool:
        return False

    def adapt(
        self,
        classifier: ClipClassifier,
        target: Target,
        *,
        config: TrainerConfig | None = None,
        hooks: Hooks | None = None,
    ) -> History:
        return History()
