"""Budget, optimiser and precision of a training run."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from ueo_fast.ranges import (
    LARGEST_FACTOR,
    MOST,
    MOST_WORKERS,
    check_count,
    check_number,
    check_one_of,
)

Schedule = Literal["cosine", "constant"]
Precision = Literal["fp32", "bf16", "fp16"]

SCHEDULES: tuple[Schedule, ...] = get_args(Schedule)
PRECISIONS: tuple[Precision, ...] = get_args(Precision)

# What may differ between a run and its resumption without changing the result.
_FREE = ("num_workers", "checkpoint_every")


@dataclass(frozen=True)
class TrainerConfig:
    """Budget, optimiser and precision; budget and optimiser default to the authors', but for
    DomainNet, on which they take 5 epochs.

    Attributes:
        epochs: passes over the unlabelled images.
        batch_size: images per step; the last batch of an epoch may be smaller. Where a single
            image is left over, a method that compares the images of a batch (UEO, InfoMax) learns
            nothing from its step; in the next epoch it is another image.
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
        TypeError, ValueError: a value of another type, or outside its range.
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
        for name, least, most in (
            ("epochs", 1, MOST),
            ("batch_size", 1, MOST),
            ("micro_batch_size", 1, MOST),
            ("early_stop", 1, MOST),
            ("num_workers", 0, MOST_WORKERS),
            ("checkpoint_every", 0, MOST),
            ("seed", 0, 2**63 - 1),
        ):
            value = getattr(self, name)
            if value is not None or name not in ("micro_batch_size", "early_stop"):
                check_count(name, value, least, most)
        for name in ("prompt_lr", "affine_lr", "weight_decay"):
            check_number(name, getattr(self, name), sign="not negative", most=LARGEST_FACTOR)
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must lie in [0, 1), got {self.momentum}")
        check_one_of("schedule", self.schedule, SCHEDULES)
        check_one_of("precision", self.precision, PRECISIONS)

    def decisive(self) -> dict[str, Any]:
        """The choices that a resumed run must share with the run that it goes on with."""
        return {name: value for name, value in asdict(self).items() if name not in _FREE}
