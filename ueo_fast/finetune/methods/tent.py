"""Tent: adapt online, while the images are being predicted, by lowering their entropy."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from ueo_fast import ueo_loss
from ueo_fast.finetune.clip.model import ClipClassifier
from ueo_fast.finetune.data.names import plural
from ueo_fast.finetune.engine.hooks import Hooks
from ueo_fast.finetune.engine.objective import Objective, Step
from ueo_fast.finetune.engine.trainer import History, TrainerConfig, train
from ueo_fast.finetune.methods.base import Method, check_entropies, choices_of
from ueo_fast.finetune.target import Target


@dataclass(frozen=True)
class Tent(Method):
    """``L = mean_i H(p_i)`` of the batch, one step per batch, in one pass over the stream.

    The images come once, in their own order, un-augmented. Each batch is predicted by the forward
    pass of its own step, before its update: :attr:`History.online` holds these predictions, which
    are the method's result. The affine parameters of the visual tower are trained; the prompt is
    frozen. BatchNorm normalises with the statistics of the batch; in a tower without it (a ViT)
    the affine parameters of LayerNorm are all that changes.

    What differs from the paper: the authors drop the running statistics, here they follow the
    stream (with each layer's momentum), so that the adapted classifier can predict single images
    afterwards. The optimiser is that of the common loop, at a constant learning rate, as nobody
    knows where a stream ends. With BatchNorm a last batch of one image would have no spread: the
    batch size is then raised until none is left over.

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

    def check(self, config: TrainerConfig, images: int | None = None) -> None:
        if config.affine_lr == 0:
            raise ValueError(
                "affine_lr is 0, but Tent trains the affine parameters and nothing else: give a "
                "positive affine_lr"
            )

    def objective(self, classifier: ClipClassifier, target: Target) -> OnlineEntropy:
        """The loss, which also records the predictions."""
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
        self.check(config)
        size = config.batch_size
        if batch_norms(classifier):
            size = _without_single(len(target), size)
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
        objective = self.objective(classifier, target)
        objective.choices = choices_of(self)
        history = train(
            classifier,
            target.images,
            objective,
            config=config,
            hooks=hooks,
            zero_shot=target.cosines,
        )
        history.online = objective.online.cpu()
        return history


def batch_norms(classifier: ClipClassifier) -> list[_BatchNorm]:
    """The BatchNorms of the visual tower."""
    return [
        module for module in classifier.model.visual.modules() if isinstance(module, _BatchNorm)
    ]


def _without_single(count: int, batch_size: int) -> int:
    """The smallest batch size from ``batch_size`` on that leaves no batch of one image."""
    if count < 2 or batch_size < 2:
        raise ValueError(
            f"{plural(count, 'image')} in batches of batch_size={batch_size}: this tower has "
            "BatchNorm, whose statistics need at least 2 images per batch"
        )
    while count % batch_size == 1:
        batch_size += 1
    return batch_size


class OnlineEntropy(Objective):
    """Mean entropy of a batch, and the predictions that were made on the way.

    Attributes:
        online: (N, C) float32 cosines of each image, from the forward pass of its own step; NaN
            before that.
    """

    online: Tensor

    def __init__(self, eps: float, images: int, classes: int) -> None:
        super().__init__()
        self.eps = eps
        self.register_buffer("online", torch.full((images, classes), math.nan, device="cpu"))

    def prepare(self, classifier: ClipClassifier) -> None:
        for layer in batch_norms(classifier):
            layer.train()

    def forward(self, step: Step) -> Tensor:
        ones = step.logits.new_ones(len(step.logits))
        return ueo_loss(step.logits, ones, trade_off=0.0, eps=self.eps)

    def remember(self, step: Step) -> None:
        self.online[step.positions] = step.cosines.to(self.online.dtype)
