"""AdaBN: re-estimate the statistics of BatchNorm on the target, without any gradient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import Dataset

from ueo_fast.finetune.batches import indexed_loader
from ueo_fast.finetune.methods.base import Method
from ueo_fast.finetune.model import ClipClassifier
from ueo_fast.finetune.trainer import History, TrainerConfig


@dataclass(frozen=True)
class AdaBN(Method):
    """Replaces the running mean and variance of every BatchNorm by the target's.

    It repairs a shift that only moves and scales activations (brightness, contrast) and has
    nothing to do with entropy: a baseline that says how much of a gain is mere re-normalisation.
    The statistics are the mean over shuffled batches of ``batch_size`` images, one pass.

    Attributes:
        batch_size: images per batch of statistics.

    Source: Li et al., *Revisiting Batch Normalization for Practical Domain Adaptation*, 2016.
    """

    batch_size: int = 256

    name: ClassVar[str] = "adabn"
    title: ClassVar[str] = "AdaBN"

    @torch.no_grad()
    def adapt(
        self,
        classifier: ClipClassifier,
        images: Dataset[Any] | Tensor,
        *,
        confidence: Tensor | None = None,
        config: TrainerConfig | None = None,
        on_step: Callable[[int, int, float], None] | None = None,
    ) -> History:
        """As :meth:`Method.adapt`; of ``config`` only the seed and the workers are used.

        Raises:
            ValueError: the visual tower has no BatchNorm with running statistics.
        """
        layers = [
            module
            for module in classifier.model.visual.modules()
            if isinstance(module, _BatchNorm) and module.track_running_stats
        ]
        if not layers:
            raise ValueError(
                "AdaBN re-estimates BatchNorm statistics, but this visual tower has no BatchNorm "
                "(a ViT, for example): leave the method out, or take a ResNet tower"
            )
        config = config or TrainerConfig()
        loader = indexed_loader(
            images, self.batch_size, shuffle_seed=config.seed, num_workers=config.num_workers
        )
        device = classifier.logit_scale.device
        momenta = [layer.momentum for layer in layers]
        for layer in layers:
            layer.reset_running_stats()
            layer.momentum = None  # PyTorch's cumulative average over batches
            layer.train()
        try:
            for batch, _ in loader:
                classifier.image_features(batch.to(device))
        finally:
            for layer, momentum in zip(layers, momenta, strict=True):
                layer.momentum = momentum
                layer.eval()
        return History()
