"""The authors' training loop: SGD, cosine schedule, evaluation mode, one loss per batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ueo_fast.finetune.batches import indexed_loader
from ueo_fast.finetune.model import ClipClassifier

OnStep = Callable[[int, int, float], None]
"""Called after each step with (steps done, steps in all, loss)."""


class BatchLoss(Protocol):
    """A loss of one batch: ``(logits (B, C), confidence (B,) or None) -> 0-d``."""

    def __call__(self, logits: Tensor, confidence: Tensor | None) -> Tensor: ...


@dataclass(frozen=True)
class TrainerConfig:
    """Budget and optimiser; the defaults are the authors'.

    Attributes:
        epochs: passes over the unlabelled images.
        batch_size: images per step; the last batch of an epoch may be smaller.
        prompt_lr: learning rate of the prompt's context; 0 keeps the prompt frozen.
        affine_lr: learning rate of the visual tower's affine parameters; 0 keeps them frozen.
        seed: order of the images.
        num_workers: worker processes of the loader.
    """

    epochs: int = 50
    batch_size: int = 64
    prompt_lr: float = 1e-4
    affine_lr: float = 1e-4
    seed: int = 0
    num_workers: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("prompt_lr", "affine_lr"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")


@dataclass
class History:
    """One entry per step.

    Attributes:
        loss: the value of the method's loss.
        conditional_entropy: mean entropy of the batch's predictions, nats; every image weighs the
            same, so that methods can be compared.
        marginal_entropy: entropy of the batch's mean prediction, nats, at most log C. Near 0 it
            says that everything is put into one class: the training has collapsed.
    """

    loss: list[float] = field(default_factory=list)
    conditional_entropy: list[float] = field(default_factory=list)
    marginal_entropy: list[float] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.loss)


class NonFiniteLossError(RuntimeError):
    """The loss became NaN or infinite; the weights are those of the step before."""


def train(
    classifier: ClipClassifier,
    images: Dataset[Any] | Tensor,
    loss: BatchLoss,
    *,
    confidence: Tensor | None = None,
    config: TrainerConfig | None = None,
    on_step: OnStep | None = None,
) -> History:
    """Train ``classifier`` in place on unlabelled images.

    SGD without momentum or weight decay; the learning rates follow one cosine from their start to
    0 over all steps; the model stays in evaluation mode, so the statistics of BatchNorm are never
    touched and dropout is off.

    Args:
        classifier: what is trained: its prompt context and affine parameters.
        images: N images, augmented by the dataset itself if at all.
        loss: of a batch's logits and confidence.
        confidence: (N,) by image index, from ``zero_shot_confidence``; ``None`` leaves it to the
            loss.
        config: budget and optimiser; ``None`` takes the authors'.
        on_step: called after each step with (steps done, steps in all, loss).

    Returns:
        The history, one entry per step.

    Raises:
        ValueError: ``confidence`` does not fit ``images``, or both learning rates are 0.
        NonFiniteLossError: the loss is NaN or infinite.

    Source: authors' ``demo.py``, ``train_clip``.
    """
    config = config or TrainerConfig()
    loader = indexed_loader(
        images, config.batch_size, shuffle_seed=config.seed, num_workers=config.num_workers
    )
    count = len(loader.dataset)  # type: ignore[arg-type]
    if confidence is not None and confidence.shape != (count,):
        raise ValueError(
            f"confidence has shape {tuple(confidence.shape)}, but there are {count} images: "
            f"it needs shape ({count},), one value per image in the order of images"
        )
    device = classifier.logit_scale.device
    if confidence is not None:
        confidence = confidence.to(device)
    optimizer = _optimizer(classifier, config)
    total = config.epochs * len(loader)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total)
    classifier.eval()  # before anything is computed: the fixed text features must have no dropout
    fixed_text = None
    if config.prompt_lr == 0:
        with torch.no_grad():
            fixed_text = classifier.text_features()

    history = History()
    for _ in range(config.epochs):
        for batch, index in loader:
            logits = classifier(batch.to(device), fixed_text).logits
            weights = None if confidence is None else confidence[index.to(device)]
            value = loss(logits, weights)
            # One synchronisation per step, small beside a forward pass of CLIP, and the only way
            # to stop before a NaN reaches the weights.
            loss_value = float(value.detach())
            if not torch.isfinite(value.detach()):
                raise NonFiniteLossError(
                    f"the loss became {loss_value} at step {len(history) + 1} of {total} "
                    f"(prompt_lr={config.prompt_lr}, affine_lr={config.affine_lr}); the weights "
                    "are those of the step before. Lower the learning rates, and check the images "
                    "for NaN"
                )
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            schedule.step()
            _record(history, loss_value, logits.detach())
            if on_step is not None:
                on_step(len(history), total, loss_value)
    return history


def _optimizer(classifier: ClipClassifier, config: TrainerConfig) -> torch.optim.SGD:
    groups = []
    for parameters, rate in (
        (classifier.prompt_parameters(), config.prompt_lr),
        (classifier.affine_parameters(), config.affine_lr),
    ):
        trained = rate > 0
        for parameter in parameters:
            parameter.requires_grad_(trained)
        if trained and parameters:
            groups.append({"params": parameters, "lr": rate})
    if not groups:
        raise ValueError("nothing to train: prompt_lr and affine_lr are both 0")
    return torch.optim.SGD(groups, lr=0.0)


def _record(history: History, loss: float, logits: Tensor) -> None:
    p = torch.softmax(logits.float(), dim=1)
    history.loss.append(loss)
    history.conditional_entropy.append(float(torch.special.entr(p).sum(dim=1).mean()))
    history.marginal_entropy.append(float(torch.special.entr(p.mean(dim=0)).sum()))
