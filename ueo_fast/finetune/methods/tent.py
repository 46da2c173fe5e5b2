"""Tent: adapt online, while the images are being predicted, by lowering their entropy."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ueo_fast.finetune.clip.model import ClipClassifier
from ueo_fast.finetune.engine.hooks import History, Hooks
from ueo_fast.finetune.engine.objective import Step
from ueo_fast.finetune.engine.training_config import TrainerConfig
from ueo_fast.finetune.methods.base import LossMethod, check_entropies
from ueo_fast.finetune.methods.ueo import WeightedEntropy
from ueo_fast.finetune.target import Target


@dataclass(frozen=True)
class Tent(LossMethod):
    """``L = mean_i H(p_i)`` of the batch, one step per batch, in one pass over the stream.

    The images come once, in their own order, un-augmented. Each batch is predicted by the forward
    pass of its own step, before its update: :attr:`History.online` holds these predictions, which
    are the method's result. The affine parameters of the visual tower are trained; the prompt is
    frozen. BatchNorm normalises with the statistics of the batch; in a tower without it (a ViT)
    the affine parameters of LayerNorm are all that changes.

    The authors drop the running statistics; here they follow the stream (with each layer's
    momentum), so that the adapted classifier can predict single images afterwards. The optimiser
    is that of the common loop, at a constant learning rate, because a stream has no known end. With
    BatchNorm a last batch of one image would have no spread: the batch size is then raised until
    none is left over.

    Attributes:
        eps: added inside the logarithms.

    Source: Wang et al., *Tent: Fully Test-Time Adaptation by Entropy Minimization*, ICLR 2021,
    arXiv 2006.10726, section 3: entropy objective (3.1), modulation parameters (3.2), algorithm
    (3.3); authors' ``tent.py``.
    """

    eps: float = 0.0

    name: ClassVar[str] = "tent"
    title: ClassVar[str] = "Tent"

    def __post_init__(self) -> None:
        check_entropies(eps=self.eps)

    def check(
        self, config: TrainerConfig, images: int | None = None, tower: nn.Module | None = None
    ) -> None:
        if config.affine_lr == 0:
            raise ValueError(
                "affine_lr is 0, but Tent trains the affine parameters and nothing else: give a "
                "positive affine_lr"
            )
        if tower is None or not batch_norms(tower):
            return
        if config.batch_size < 2 or (images is not None and images < 2):
            count = "batch_size is 1" if config.batch_size < 2 else "there is 1 image"
            raise ValueError(
                f"{count}, but this tower has BatchNorm, whose statistics Tent takes from each "
                "batch: they need at least 2 images per batch"
            )
        micro = config.micro_batch_size
        if micro is not None and micro < config.batch_size:
            raise ValueError(
                f"micro_batch_size is {micro}, but this tower has BatchNorm, whose statistics Tent "
                "takes from the whole batch: leave micro_batch_size out, or take smaller batches"
            )

    def objective(self, classifier: ClipClassifier, target: Target) -> OnlineEntropy:
        return OnlineEntropy(self.eps, len(target), len(classifier.prompt.class_names))

    def adapt(
        self,
        classifier: ClipClassifier,
        target: Target,
        *,
        config: TrainerConfig | None = None,
        hooks: Hooks | None = None,
    ) -> History:
        """As :meth:`Method.adapt`.

        Of ``config`` the epochs, ``prompt_lr``, shuffling, schedule and early stopping are not
        used: there is one pass over the stream.

        Raises:
            ValueError: ``affine_lr`` is 0; with BatchNorm, fewer than two images, batches of one
                image, or micro-batches.
        """
        config, hooks = config or TrainerConfig(), hooks or Hooks()
        tower = classifier.model.visual
        self.check(config, len(target), tower)
        size = config.batch_size
        while batch_norms(tower) and len(target) % size == 1:
            size += 1
        if size != config.batch_size:
            hooks.on_warning(
                f"batch_size raised from {config.batch_size} to {size}: the last batch of "
                f"{len(target)} images would be a single one, which has no spread for BatchNorm"
            )
        config = dataclasses.replace(
            config,
            epochs=1,
            batch_size=size,
            prompt_lr=0.0,
            shuffle=False,
            schedule="constant",
            early_stop=None,
        )
        target = dataclasses.replace(target, augmented=None)
        return super().adapt(classifier, target, config=config, hooks=hooks)


def batch_norms(tower: nn.Module) -> list[_BatchNorm]:
    """The BatchNorms of a visual tower."""
    return [module for module in tower.modules() if isinstance(module, _BatchNorm)]


class OnlineEntropy(WeightedEntropy):
    """Mean entropy of a batch, and the predictions that were made on the way.

    Attributes:
        online: (N, C) float32 cosines of each image, from the forward pass of its own step; NaN
            before that.
    """

    online: Tensor

    def __init__(self, eps: float, images: int, classes: int) -> None:
        super().__init__(0.0, eps)
        self.register_buffer("online", torch.full((images, classes), math.nan, device="cpu"))

    def prepare(self, classifier: ClipClassifier) -> None:
        for layer in batch_norms(classifier.model.visual):
            layer.train()

    def remember(self, step: Step) -> None:
        self.online[step.positions] = step.cosines.to(self.online.dtype)

    def predictions(self) -> Tensor:
        return self.online.cpu()
