"""The one interface that every adaptation method has."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from typing import Any, ClassVar

from ueo_fast.finetune.clip.model import ClipClassifier
from ueo_fast.finetune.engine.hooks import Hooks
from ueo_fast.finetune.engine.objective import Objective
from ueo_fast.finetune.engine.trainer import History, TrainerConfig, train
from ueo_fast.finetune.target import Target


class Method(ABC):
    """Adapts a classifier to unlabelled images.

    Attributes:
        name: how it is chosen, ``--method name``.
        title: how it is written in tables.
    """

    name: ClassVar[str]
    title: ClassVar[str]

    @abstractmethod
    def adapt(
        self,
        classifier: ClipClassifier,
        target: Target,
        *,
        config: TrainerConfig | None = None,
        hooks: Hooks | None = None,
    ) -> History:
        """Change ``classifier`` in place.

        Args:
            classifier: the zero-shot model to start from.
            target: the unlabelled images.
            config: budget and optimiser; ``None`` takes the authors'.
            hooks: who is told of each step, and where checkpoints go.

        Returns:
            One entry per gradient step; empty where the method takes none.
        """


def choices_of(method: Method) -> str:
    """The options of a method that is a dataclass, as far as they are numbers, words or None.

    Whatever else an option may be, its ``repr`` need not be the same in another process.
    """
    if not dataclasses.is_dataclass(method):
        return ""
    values: dict[str, Any] = {f.name: getattr(method, f.name) for f in dataclasses.fields(method)}
    plain = (str, int, float, type(None))
    return ", ".join(f"{name}={v}" for name, v in values.items() if isinstance(v, plain))


class LossMethod(Method):
    """A method that is a loss of each batch, minimised by the common training loop."""

    @abstractmethod
    def objective(self, classifier: ClipClassifier, target: Target) -> Objective:
        """The loss, with all that it needs to know about the target's images.

        Called when ``classifier`` is still the zero-shot model.
        """

    def adapt(
        self,
        classifier: ClipClassifier,
        target: Target,
        *,
        config: TrainerConfig | None = None,
        hooks: Hooks | None = None,
    ) -> History:
        objective = self.objective(classifier, target)
        objective.choices = choices_of(self)
        return train(
            classifier,
            target.training_images,
            objective,
            config=config,
            hooks=hooks,
            zero_shot=target.cosines,
        )
