"""The interface of every adaptation method, and the one that changes nothing."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from ueo_fast.finetune.clip.model import ClipClassifier
from ueo_fast.finetune.engine.hooks import History, Hooks
from ueo_fast.finetune.engine.objective import Objective
from ueo_fast.finetune.engine.trainer import train
from ueo_fast.finetune.engine.training_config import TrainerConfig
from ueo_fast.finetune.target import Target
from ueo_fast.ranges import LARGEST_FACTOR, check_number


class Method(ABC):
    """Adapts a classifier to unlabelled images.

    Attributes:
        name: how it is chosen, ``--method name``.
        title: how it is written in tables.
        reads_labels: whether it needs the labels of the images.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    reads_labels: ClassVar[bool] = False

    def check(  # noqa: B027
        self, config: TrainerConfig, images: int | None = None, tower: nn.Module | None = None
    ) -> None:
        """Refuse a budget or a model with which this method cannot work, as soon as it is known.

        Args:
            config: budget and optimiser.
            images: how many there are, if that is known already.
            tower: the visual tower, if it is loaded already.

        Raises:
            ValueError: a choice that cannot work; the message has the way out.
        """

    def trains_tower(self, config: TrainerConfig) -> bool:
        """Whether the image tower changes; else its features of an image can be kept."""
        return config.affine_lr > 0

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
            hooks: callbacks, and where checkpoints go.

        Returns:
            One entry per gradient step; empty where the method takes none.
        """


@dataclass(frozen=True)
class ZeroShot(Method):
    """Leaves the classifier as it is: the baseline that every other method is compared with."""

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


def check_entropies(*, eps: float, **weights: float) -> None:
    """Check the options of a loss of entropies when a method is made, not at its first step.

    Args:
        eps: added inside the logarithms.
        weights: of the loss's terms, by name.

    Raises:
        TypeError, ValueError: one is not a number, or float32 cannot work with it.
    """
    check_number("eps", eps, sign="not negative")
    for name, weight in weights.items():
        check_number(name, weight, sign="any", most=LARGEST_FACTOR)


def choices_of(method: Method) -> str:
    """The fields of a method that is a dataclass, if they are numbers, words or ``None``.

    Other values are left out: their ``repr`` may differ in another process.
    """
    if not dataclasses.is_dataclass(method):
        return ""
    values = {field.name: getattr(method, field.name) for field in dataclasses.fields(method)}
    plain = (str, int, float, type(None))
    return ", ".join(f"{name}={v}" for name, v in values.items() if isinstance(v, plain))


class LossMethod(Method):
    """A method that is a loss of each batch, minimised by the common training loop."""

    def check(
        self, config: TrainerConfig, images: int | None = None, tower: nn.Module | None = None
    ) -> None:
        if config.prompt_lr == config.affine_lr == 0:
            raise ValueError(
                f"prompt_lr and affine_lr are both 0, so {self.title} has nothing to train: make "
                "one of them positive, or choose method 'zeroshot'"
            )
        size = config.batch_size if images is None else min(config.batch_size, images)
        if size == 1 and self.compares_images():
            what = "batch_size is 1" if config.batch_size == 1 else "there is 1 image"
            raise ValueError(
                f"{what}, but {self.title} compares the images of a batch: the mean prediction of "
                "a single image is its own, so that the terms of the loss cancel. Take batches of "
                "at least 2 images (the authors' have 64), or a method that looks at each image "
                "by itself (entmin)"
            )

    def compares_images(self) -> bool:
        """Whether a batch of one image makes no sense, as its mean is the image itself."""
        return False

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
        config = config or TrainerConfig()
        self.check(config, len(target), classifier.model.visual)
        objective = self.objective(classifier, target)
        objective.choices = choices_of(self)
        images = target.training_images
        if target.augmented is None and not self.trains_tower(config):
            images = target.evaluation_images
        start = target.cosines
        history = train(classifier, images, objective, config=config, hooks=hooks, zero_shot=start)
        history.online = objective.predictions()
        return history
