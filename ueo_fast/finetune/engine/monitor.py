"""Predictions of a step and an epoch; warns of a collapse and stops early. Needs no labels."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ueo_fast.finetune.clip.model import ClipClassifier, adapted_state, load_adapted_state
from ueo_fast.finetune.files.run_files import EpochRecord

_ROWS = 16384
"""Images whose zero-shot predictions are looked at in one go."""

# When predictions count as collapsed. Always compared with the start of the training: the images
# may really be of one class, and few classes leave little entropy to lose.
_ENTROPY = 0.25
"""The marginal entropy fell below this share of the one at the start. A quarter leaves 2.6 of 50
evenly used classes. Becoming certain alone does not get there: a two-class set whose zero-shot
predictions are split 70 to 30, and which turns out to be 95 to 5, keeps a third."""
_OTHERS = 0.1
"""The share of images outside the largest class fell below this share of the one at the start."""
_RECOVERED = 2.0
"""Warn again once both are above this many times their limits."""
_LEAST_IMAGES = 50
"""With fewer images shares are too coarse to judge."""
_WINDOW = 1024
"""So many shuffled images stand for all; used where an epoch has at least two such windows."""


def entropy(weights: Tensor) -> float:
    """Entropy of (C,) weights, not negative, divided by their sum; nats."""
    return float(torch.special.entr(weights / weights.sum()).sum())


class _Predictions:
    """Of some images: sums of probabilities (C,) float64, and images per class (C,) int64."""

    probabilities: Tensor
    histogram: Tensor

    @property
    def images(self) -> int:
        return int(self.histogram.sum())

    @property
    def marginal_entropy(self) -> float:
        """Entropy of the mean prediction, nats."""
        return entropy(self.probabilities)

    @property
    def largest_share(self) -> float:
        """Share of the images that is put into the most frequent class."""
        return int(self.histogram.max()) / self.images


@dataclass(frozen=True)
class StepStatistics(_Predictions):
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


@torch.no_grad()
def measure(loss: Tensor, logits: Tensor, gradients: Sequence[Tensor]) -> StepStatistics:
    """Statistics of a batch with ``logits`` (B, C), copied to the CPU at once: one device sync."""
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


class Totals(_Predictions):
    """Sums of step statistics, of an epoch or of a window of steps, over ``classes`` classes."""

    def __init__(self, classes: int) -> None:
        self.steps = 0
        self.loss = 0.0
        self.conditional = 0.0
        self.probabilities = torch.zeros(classes, dtype=torch.float64, device="cpu")
        self.histogram = torch.zeros(classes, dtype=torch.int64, device="cpu")

    def add(self, step: StepStatistics) -> None:
        """Count one more step."""
        self.steps += 1
        self.loss += step.loss
        self.conditional += step.conditional_entropy * step.images
        self.probabilities += step.probabilities
        self.histogram += step.histogram

    def record(self, epoch: int) -> EpochRecord:
        """The epoch's record for the hooks."""
        return EpochRecord(
            epoch=epoch,
            loss=self.loss / self.steps,
            conditional_entropy=self.conditional / self.images,
            marginal_entropy=self.marginal_entropy,
            histogram=tuple(self.histogram.tolist()),
        )

    def tensors(self) -> dict[str, Tensor]:
        """For a checkpoint; exact."""
        scalars = [self.steps, self.loss, self.conditional]
        return {
            "scalars": torch.tensor(scalars, dtype=torch.float64, device="cpu"),
            "probabilities": self.probabilities.clone(),
            "histogram": self.histogram.clone(),
        }

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, Tensor]) -> Totals:
        """The inverse of :meth:`tensors`."""
        totals = cls(0)
        steps, totals.loss, totals.conditional = tensors["scalars"].tolist()
        totals.steps = int(steps)
        totals.probabilities = tensors["probabilities"].clone()
        totals.histogram = tensors["histogram"].clone()
        return totals


def totals_of(cosines: Tensor, logit_scale: float) -> Totals:
    """What (N, C) cosines predict: where a training starts."""
    classes = cosines.shape[1]
    totals = Totals(classes)
    for rows in cosines.split(_ROWS):  # all at once in double would take too much memory
        p = torch.softmax(logit_scale * rows.cpu().double(), dim=1)
        conditional = float(torch.special.entr(p).sum(dim=1).mean())
        histogram = torch.bincount(p.argmax(dim=1), minlength=classes)
        totals.add(StepStatistics(0.0, conditional, 0.0, p.sum(dim=0), histogram))
    return totals


class CollapseMonitor:
    """Warns when training puts all images into one class, or into few.

    Judges windows of shuffled steps in long epochs, and whole epochs otherwise. :meth:`step` and
    :meth:`epoch` return new warnings, mostly none; each kind once until recovered.

    Args:
        class_names: C names.
        images: N, of an epoch.
        shuffled: whether a window is a random sample of the images.
        start: predictions before the training; ``None`` takes the first window or epoch.
    """

    def __init__(
        self,
        class_names: Sequence[str],
        images: int,
        *,
        shuffled: bool = True,
        start: Totals | None = None,
    ) -> None:
        self._names = tuple(class_names)
        self._by_window = shuffled and images >= 2 * _WINDOW
        self._start = start
        self._window = Totals(len(self._names))
        self._warned: set[str] = set()

    @property
    def collapsed(self) -> bool:
        """Whether it warned and has seen no recovery since."""
        return bool(self._warned)

    def step(self, statistics: StepStatistics) -> list[str]:
        if not self._by_window:
            return []
        self._window.add(statistics)
        if self._window.images < _WINDOW:
            return []
        window, self._window = self._window, Totals(len(self._names))
        return self._judge(window)

    def epoch(self, totals: Totals) -> list[str]:
        return [] if self._by_window else self._judge(totals)

    def _judge(self, now: Totals) -> list[str]:
        if len(self._names) < 2 or now.images < _LEAST_IMAGES:
            return []
        start = self._start
        if start is None:
            self._start = now
            return []
        advice = "lower the learning rates, take fewer epochs, or set early_stop"
        left, at_start = now.marginal_entropy, start.marginal_entropy
        entropy_warning = (
            f"the predictions are collapsing into few classes: their marginal entropy is {left:.3f}"
            f" nats, and was {at_start:.3f} at the start (evenly over all {len(self._names)} "
            f"classes it would be {math.log(len(self._names)):.3f}); {advice}"
        )
        share, first_share = now.largest_share, start.largest_share
        others_warning = (
            f"the predictions are collapsing into one class: {share:.1%} of the images are taken "
            f"for {self._names[int(now.histogram.argmax())]!r}, and at the start the largest class "
            f"had {first_share:.1%}; {advice}"
        )
        new, recovered = [], True
        for kind, value, before, limit, warning in (
            ("entropy", left, at_start, _ENTROPY, entropy_warning),
            ("others", 1 - share, 1 - first_share, _OTHERS, others_warning),
        ):
            ratio = value / before if before > 0 else 1.0  # 1: there was nothing to lose
            if ratio < limit and kind not in self._warned:
                self._warned.add(kind)
                new.append(warning)
            recovered = recovered and ratio > _RECOVERED * limit
        if recovered:
            self._warned.clear()
        return new

    def state(self) -> tuple[dict[str, Tensor], dict[str, object]]:
        """Tensors and values, for a checkpoint."""
        tensors = {f"window/{name}": value for name, value in self._window.tensors().items()}
        if self._start is not None:
            tensors |= {f"start/{name}": value for name, value in self._start.tensors().items()}
        return tensors, {"warned": sorted(self._warned)}

    def load(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """The inverse of :meth:`state`."""
        self._window = Totals.of_tensors(below("window/", tensors))
        start = below("start/", tensors)
        self._start = Totals.of_tensors(start) if start else None
        self._warned = set(values["warned"])


class EarlyStop:
    """Keeps the state of the epoch with the most mutual information of image and prediction.

    Mutual information (marginal minus conditional entropy) is high where predictions are certain
    and spread over the classes. It is measured on the predictions made while training.

    Args:
        classifier: before the training; its state is the best until an epoch is over.
        patience: epochs without a rise after which to stop.
    """

    def __init__(self, classifier: ClipClassifier, patience: int) -> None:
        self._classifier = classifier
        self._patience = patience
        self._information: float | None = None
        self._state = adapted_state(classifier)
        self.best_epoch = 0

    def epoch(self, record: EpochRecord) -> str | None:
        """Call at the end of each epoch; returns why to stop, or ``None`` to continue."""
        if self._information is None or record.mutual_information > self._information:
            self._information = record.mutual_information
            self._state = adapted_state(self._classifier)
            self.best_epoch = record.epoch
        elif record.epoch - self.best_epoch >= self._patience:
            return (
                f"the mutual information has not risen for {self._patience} epoch(s) since epoch "
                f"{self.best_epoch}, whose state was kept"
            )
        return None

    def restore(self) -> int:
        """Put the best epoch's state back, and return that epoch; 0 is before the training."""
        load_adapted_state(self._classifier, self._state)
        return self.best_epoch

    def state(self) -> tuple[dict[str, Tensor], dict[str, object]]:
        """Tensors and values, for a checkpoint."""
        return self._state, {"information": self._information, "best_epoch": self.best_epoch}

    def load(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """The inverse of :meth:`state`."""
        self._state = dict(tensors)
        self._information, self.best_epoch = values["information"], values["best_epoch"]


def below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin with ``prefix``, without it."""
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
