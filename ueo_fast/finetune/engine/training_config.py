"""Budget, optimiser and precision of a training run."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

from ueo_fast.finetune.evaluation.predict import PRECISIONS

Schedule = Literal["cosine", "constant"]
Precision = Literal["fp32", "bf16", "fp16"]

SCHEDULES: tuple[Schedule, ...] = ("cosine", "constant")

MOST_WORKERS = 256
"""Processes of some hundred MB each; a shared config may ask for any number."""

# What may differ between a run and its resumption without changing the result.
_FREE = ("num_workers", "checkpoint_every")


@dataclass(frozen=True)
class TrainerConfig:
    """Budget, optimiser and precision; the defaults are the authors'.

    Attributes:
        epochs: passes over the unlabelled images.
        batch_size: images per step; the last batch of an epoch may be smaller.
        prompt_lr: learning rate of the prompt's context; 0 keeps the prompt frozen.
        affine_lr: learning rate of the visual tower's affine parameters; 0 keeps them frozen.
        seed: order of the images, and their augmentation.
        num_workers: worker processes of the loader.
        momentum: of SGD, in [0, 1).
        weight_decay: of SGD.
        schedule: ``cosine`` lets the learning rates fall to 0 over all steps; ``constant``.
        shuffle: draw a new order in each epoch; ``False`` keeps the images' own.
        micro_batch_size: images that go through the visual tower at a time, to the gradient of the
            whole batch; ``None``: all at once.
        precision: of both towers, under autocast; weights, features and loss stay float32.
        channels_last: memory format of the images and of the visual tower's weights. It stays
            after the training.
        compile: run the towers through ``torch.compile``, as one graph each. What cannot be
            compiled is an error, not a silent detour.
        checkpoint_every: steps between two checkpoints; 0: one at the end of each epoch. The last
            step always has one.
        early_stop: stop when the mutual information of image and prediction, which needs no
            labels, has not risen for so many epochs, or when the predictions collapse; the state
            of the best epoch is kept. ``None``: never.

    Raises:
        ValueError: a value outside its range.
    """

    epochs: int = 50
    batch_size: int = 64
    prompt_lr: float = 1e-4
    affine_lr: float = 1e-4
    seed: int = 0
    num_workers: int = 0
    momentum: float = 0.0
    weight_decay: float = 0.0
    schedule: Schedule = "cosine"
    shuffle: bool = True
    micro_batch_size: int | None = None
    precision: Precision = "fp32"
    channels_last: bool = False
    compile: bool = False
    checkpoint_every: int = 100
    early_stop: int | None = None

    def __post_init__(self) -> None:
        for name, least in (
            ("epochs", 1),
            ("batch_size", 1),
            ("micro_batch_size", 1),
            ("early_stop", 1),
            ("num_workers", 0),
            ("checkpoint_every", 0),
            ("seed", 0),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if self.num_workers > MOST_WORKERS:
            raise ValueError(f"num_workers must be at most {MOST_WORKERS}, got {self.num_workers}")
        for name in ("prompt_lr", "affine_lr", "weight_decay"):
            value = getattr(self, name)
            if value < 0:
                raise ValueError(f"{name} must not be negative, got {value}")
            if not math.isfinite(value):
                raise ValueError(f"{name} must be finite, got {value}")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must lie in [0, 1), got {self.momentum}")
        if self.schedule not in SCHEDULES:
            raise ValueError(
                f"schedule={self.schedule!r} is unknown; choose one of {', '.join(SCHEDULES)}"
            )
        if self.precision not in PRECISIONS:
            raise ValueError(
                f"precision={self.precision!r} is unknown; choose one of {', '.join(PRECISIONS)}"
            )

    def decisive(self) -> dict[str, Any]:
        """The choices that a resumed run must share with the run that it goes on with."""
        return {name: value for name, value in asdict(self).items() if name not in _FREE}
