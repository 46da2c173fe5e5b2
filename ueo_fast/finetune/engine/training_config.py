"""How images go through the image tower; budget, optimiser and precision of a training run."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
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


@dataclass(frozen=True, kw_only=True)
class ImagePass:
    """How images go through the image tower.

    Attributes:
        batch_size: images per step.
        num_workers: processes that load images; at most four per processor are started.
        precision: of the towers, under autocast; features, loss and trained weights stay fp32.
        channels_last: memory format of the images (for ResNets on a GPU or in bf16).

    Raises:
        TypeError, ValueError: a value of another type, or outside its range.
    """

    batch_size: int = field(default=256, metadata={"group": "speed"})
    num_workers: int = field(default=0, metadata={"group": "speed", "flag": "workers"})
    precision: Precision = field(default="fp32", metadata={"group": "speed"})
    channels_last: bool = field(default=False, metadata={"group": "speed"})

    def __post_init__(self) -> None:
        check_count("batch_size", self.batch_size)
        check_count("num_workers", self.num_workers, 0, MOST_WORKERS)
        check_one_of("precision", self.precision, PRECISIONS)


@dataclass(frozen=True, kw_only=True)
class TrainerConfig(ImagePass):
    """Budget, optimiser and precision; budget and optimiser default to the authors', but for
    DomainNet, on which they take 5 epochs.

    The rest is as in :class:`ImagePass`.

    Attributes:
        epochs: passes over the unlabelled images.
        batch_size: images per step; the last batch of an epoch may be smaller. If a single image
            is left over, a method that compares the images of a batch (UEO, InfoMax) learns
            nothing from its step; in the next epoch it is another image.
        channels_last: memory format of the images and of the image tower's weights, which keep it
            after the training (for ResNets on a GPU or in bf16).
        prompt_lr: learning rate of the prompt's context; 0 freezes it.
        affine_lr: learning rate of the scale and shift of the image tower's normalisation layers;
            0 freezes them.
        seed: determines the order of the images and their augmentation.
        momentum: of SGD, in [0, 1).
        weight_decay: of SGD.
        schedule: cosine lowers the learning rates to 0 over all steps; constant keeps them.
        shuffle: draw a new order in each epoch; ``False`` keeps the images' own.
        micro_batch_size: images that go through the image tower at a time, if a whole batch does
            not fit: the gradient is that of the whole batch, for one more forward pass; default:
            all at once.
        compile: run the towers through torch.compile, as one graph each. What cannot be compiled
            is an error, not a silent detour.
        checkpoint_every: steps between two checkpoints; 0: one at the end of each epoch. The last
            step always has one.
        early_stop: stop when the mutual information of image and prediction, which needs no
            labels, has not risen for this many epochs, or when the predictions collapse, and keep
            the best epoch; default: never.

    Raises:
        TypeError, ValueError: a value of another type, or outside its range.
    """

    epochs: int = 50
    batch_size: int = 64
    prompt_lr: float = 1e-4
    affine_lr: float = 1e-4
    momentum: float = 0.0
    weight_decay: float = 0.0
    schedule: Schedule = "cosine"
    shuffle: bool = True
    seed: int = 0
    early_stop: int | None = None
    micro_batch_size: int | None = field(default=None, metadata={"group": "speed"})
    compile: bool = field(default=False, metadata={"group": "speed"})
    checkpoint_every: int = field(default=100, metadata={"group": "output"})

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least, most in (
            ("epochs", 1, MOST),
            ("micro_batch_size", 1, MOST),
            ("early_stop", 1, MOST),
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

    def image_pass(self, batch_size: int) -> ImagePass:
        """How to run images through the tower that is trained without training it.

        Args:
            batch_size: images per step.
        """
        return ImagePass(
            batch_size=batch_size,
            num_workers=self.num_workers,
            precision=self.precision,
            channels_last=self.channels_last,
        )

    def decisive(self) -> dict[str, Any]:
        """The choices that a resumed run must share with the run that it goes on with."""
        return {name: value for name, value in asdict(self).items() if name not in _FREE}
