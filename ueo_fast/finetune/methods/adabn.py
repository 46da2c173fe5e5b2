"""AdaBN: re-estimate the statistics of BatchNorm on the target, without any gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ueo_fast.finetune.clip.model import ClipClassifier
from ueo_fast.finetune.data.loader import even_loader
from ueo_fast.finetune.engine.forward import RunningStatistics
from ueo_fast.finetune.engine.hooks import History, Hooks, NonFiniteLossError
from ueo_fast.finetune.engine.training_config import TrainerConfig
from ueo_fast.finetune.methods.base import Method
from ueo_fast.finetune.target import Target
from ueo_fast.ranges import check_count


@dataclass(frozen=True)
class AdaBN(Method):
    """Replaces the running mean and variance of every BatchNorm by the target's.

    It repairs a shift that only moves and scales activations (brightness, contrast), without any
    entropy: a baseline that says how much of a gain is mere re-normalisation. One pass over
    shuffled batches of nearly equal size. The mean is that of all images; the variance is the
    average of the batches' own (the spread of their means is left out). Both weigh every image the
    same. Layers after the first see activations normalised with the batch's statistics.

    Attributes:
        batch_size: the most images per batch of statistics, at least 2.

    Source: Li et al., *Revisiting Batch Normalization for Practical Domain Adaptation*, 2016.
    """

    batch_size: int = 256

    name: ClassVar[str] = "adabn"
    title: ClassVar[str] = "AdaBN"

    def __post_init__(self) -> None:
        check_count("batch_size", self.batch_size, least=2)

    def check(
        self, config: TrainerConfig, images: int | None = None, tower: nn.Module | None = None
    ) -> None:
        if tower is not None and not _with_statistics(tower):
            raise ValueError(
                "AdaBN re-estimates BatchNorm statistics, but this visual tower has no BatchNorm "
                "(a ViT, for example): choose another method, or a ResNet tower"
            )

    def trains_tower(self, config: TrainerConfig) -> bool:
        return True

    @torch.no_grad()
    def adapt(
        self,
        classifier: ClipClassifier,
        target: Target,
        *,
        config: TrainerConfig | None = None,
        hooks: Hooks | None = None,
    ) -> History:
        """As :meth:`Method.adapt`; of ``config`` only the seed and the workers are used.

        Raises:
            ValueError: the visual tower has no BatchNorm with running statistics, or there are
                fewer than two images.
            NonFiniteLossError: a statistic became NaN or infinite.
            Whatever is raised, ``classifier`` is as it was.
        """
        config = config or TrainerConfig()
        self.check(config, len(target), classifier.model.visual)
        layers = _with_statistics(classifier.model.visual)
        loader = even_loader(
            target.images, self.batch_size, seed=config.seed, num_workers=config.num_workers
        )
        device = classifier.logit_scale.device
        before = [(layer.momentum, layer.training) for layer in layers]
        for layer in layers:
            layer.train()
        statistics = RunningStatistics(classifier.model.visual)
        statistics.keep()
        try:
            for layer in layers:
                layer.reset_running_stats()
            seen = 0
            for batch, _ in loader:
                seen += len(batch)
                for layer in layers:
                    # The running average over images: PyTorch's own cumulative one, momentum None,
                    # is over batches, whatever their sizes.
                    layer.momentum = len(batch) / seen
                classifier.image_features(batch.to(device))
            for layer in layers:
                if not all(value.isfinite().all() for value in layer.buffers(recurse=False)):
                    raise NonFiniteLossError(
                        "the statistics of BatchNorm became NaN or infinite; they are put back as "
                        "they were. Check the images for NaN."
                    )
        except BaseException:
            statistics.restore()
            raise
        finally:
            for layer, (momentum, training) in zip(layers, before, strict=True):
                layer.momentum = momentum
                layer.train(training)
        return History()


def _with_statistics(tower: nn.Module) -> list[_BatchNorm]:
    return [
        module
        for module in tower.modules()
        if isinstance(module, _BatchNorm) and module.track_running_stats
    ]
