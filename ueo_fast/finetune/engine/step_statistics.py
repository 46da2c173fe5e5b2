"""What a step's predictions look like, and their sums over an epoch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ueo_fast.finetune.files.run_files import EpochRecord


class StepStatistics(NamedTuple):
    """Of one batch of B images, on the CPU.

    Attributes:
        loss: of the method.
        conditional_entropy: mean entropy of the predictions, nats.
        largest_gradient: largest absolute value in any gradient; NaN if there is one.
        probabilities: (C,) float64, sum of the predictions over the images.
        histogram: (C,) int64, images per predicted class.
    """

    loss: float
    conditional_entropy: float
    largest_gradient: float
    probabilities: Tensor
    histogram: Tensor

    @property
    def images(self) -> int:
        """B."""
        return int(self.histogram.sum())

    @property
    def marginal_entropy(self) -> float:
        """Entropy of the mean prediction, nats."""
        return entropy(self.probabilities)

    @property
    def largest_share(self) -> float:
        """Share of the images that is put into the most frequent class."""
        return int(self.histogram.max()) / self.images


@torch.no_grad()
def measure(loss: Tensor, logits: Tensor, gradients: Sequence[Tensor]) -> StepStatistics:
    """Statistics of a batch, brought to the CPU in one copy: one wait for the device.

    Args:
        loss: 0-d.
        logits: (B, C), float32 or float64.
        gradients: of all that is trained.
    """
    logits = logits.detach()
    classes = logits.shape[1]
    p = torch.softmax(logits, dim=1)
    dtype = torch.promote_types(p.dtype, loss.dtype)
    largest = torch.nn.utils.get_total_norm(gradients, norm_type=float("inf"))
    # Not bincount, which waits for the device.
    predicted = logits.argmax(dim=1)[:, None] == torch.arange(classes, device=logits.device)
    scalars = (loss.detach(), torch.special.entr(p).sum(dim=1).mean(), largest)
    packed = torch.cat(
        [
            torch.stack([value.to(p.device, dtype).reshape(()) for value in scalars]),
            p.sum(dim=0).to(dtype),
            predicted.sum(dim=0).to(dtype),
        ]
    ).cpu()
    value, conditional, gradient = packed[:3].tolist()
    probabilities, histogram = packed[3:].split(classes)
    return StepStatistics(value, conditional, gradient, probabilities.double(), histogram.long())


def entropy(weights: Tensor) -> float:
    """Entropy of (C,) weights, not negative, divided by their sum; nats."""
    return float(torch.special.entr(weights / weights.sum()).sum())


class Totals:
    """Sums of step statistics: of an epoch, or of a window of steps.

    Args:
        classes: C.
    """

    def __init__(self, classes: int) -> None:
        self.steps = 0
        self.loss = 0.0
        self.conditional = 0.0
        self.probabilities = torch.zeros(classes, dtype=torch.float64, device="cpu")
        self.histogram = torch.zeros(classes, dtype=torch.int64, device="cpu")

    @property
    def images(self) -> int:
        """Seen so far."""
        return int(self.histogram.sum())

    @property
    def marginal_entropy(self) -> float:
        """Entropy of the mean prediction, nats."""
        return entropy(self.probabilities)

    @property
    def largest_share(self) -> float:
        """Share of the images in the most frequent class."""
        return int(self.histogram.max()) / self.images

    def add(self, step: StepStatistics) -> None:
        """Count one more step."""
        self.steps += 1
        self.loss += step.loss
        self.conditional += step.conditional_entropy * step.images
        self.probabilities += step.probabilities
        self.histogram += step.histogram

    def record(self, epoch: int) -> EpochRecord:
        """What is told of the epoch."""
        return EpochRecord(
            epoch=epoch,
            loss=self.loss / self.steps,
            conditional_entropy=self.conditional / self.images,
            marginal_entropy=self.marginal_entropy,
            histogram=tuple(self.histogram.tolist()),
        )

    def tensors(self) -> dict[str, Tensor]:
        """All of it, for a checkpoint; exact."""
        scalars = [self.steps, self.loss, self.conditional]
        return {
            "scalars": torch.tensor(scalars, dtype=torch.float64, device="cpu"),
            "probabilities": self.probabilities.clone(),
            "histogram": self.histogram.clone(),
        }

    @classmethod
    def of_tensors(cls, tensors: dict[str, Tensor]) -> Totals:
        """The inverse of :meth:`tensors`."""
        totals = cls(len(tensors["histogram"]))
        steps, totals.loss, totals.conditional = tensors["scalars"].tolist()
        totals.steps = int(steps)
        totals.probabilities = tensors["probabilities"].clone()
        totals.histogram = tensors["histogram"].clone()
        return totals
