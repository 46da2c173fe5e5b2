"""Notices when training puts all images into one class, or into few; needs no labels."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ueo_fast.finetune.engine.step_statistics import StepStatistics, Totals

_ROWS = 16384
"""Images whose zero-shot predictions are looked at in one go."""


@dataclass(frozen=True)
class CollapseThresholds:
    """When predictions count as collapsed; always measured against where the training started.

    A set of images may really be of one class, and few classes leave little entropy to lose: only
    the change says that training did it.

    Attributes:
        entropy: the marginal entropy fell below this share of that at the start. A quarter leaves
            2.6 of 50 evenly used classes. Making soft predictions certain does not do that: a
            two-class set whose zero-shot predictions are split 70 to 30 and which turns out to be
            95 to 5 keeps a third.
        others: the share of images outside the largest class fell below this share of that at the
            start: with 40% there at the start, below 4%.
        recovered: warn again once both are above this many times their thresholds.
        least_images: with fewer images shares are too coarse to judge.
        window: images of a window, where an epoch has at least two of them. Shuffled, so many
            images stand for all, and one needs not wait for the end of a long epoch.
    """

    entropy: float = 0.25
    others: float = 0.1
    recovered: float = 2.0
    least_images: int = 50
    window: int = 1024


class CollapseMonitor:
    """Judges windows of shuffled steps in long epochs, and whole epochs otherwise.

    Args:
        class_names: C names.
        images: N, of an epoch.
        shuffled: whether a window is a random sample of the images.
        start: predictions before the training; ``None`` takes the first window or epoch for it.
        thresholds: when to warn.
    """

    def __init__(
        self,
        class_names: Sequence[str],
        images: int,
        *,
        shuffled: bool = True,
        start: Totals | None = None,
        thresholds: CollapseThresholds | None = None,
    ) -> None:
        self._names = tuple(class_names)
        self._thresholds = thresholds or CollapseThresholds()
        self._by_window = shuffled and images >= 2 * self._thresholds.window
        self._start = start
        self._window = Totals(len(self._names))
        self._warned: set[str] = set()

    @property
    def collapsed(self) -> bool:
        """Whether it warned and has seen no recovery since."""
        return bool(self._warned)

    def step(self, statistics: StepStatistics) -> list[str]:
        """Take notice of a step.

        Returns:
            New warnings, mostly none; each kind once until recovered.
        """
        if not self._by_window:
            return []
        self._window.add(statistics)
        if self._window.images < self._thresholds.window:
            return []
        window, self._window = self._window, Totals(len(self._names))
        return self._judge(window)

    def epoch(self, totals: Totals) -> list[str]:
        """Take notice of a whole epoch; as :meth:`step`."""
        return [] if self._by_window else self._judge(totals)

    def _judge(self, now: Totals) -> list[str]:
        if len(self._names) < 2 or now.images < self._thresholds.least_images:
            return []
        if self._start is None:
            self._start = now
            return []
        found = {
            "entropy": (
                _ratio(now.marginal_entropy, self._start.marginal_entropy),
                self._thresholds.entropy,
            ),
            "others": (
                _ratio(1 - now.largest_share, 1 - self._start.largest_share),
                self._thresholds.others,
            ),
        }
        new = []
        for kind, (ratio, threshold) in found.items():
            if ratio < threshold and kind not in self._warned:
                self._warned.add(kind)
                new.append(self._sentence(kind, now, self._start))
        if all(ratio > self._thresholds.recovered * limit for ratio, limit in found.values()):
            self._warned.clear()
        return new

    def _sentence(self, kind: str, now: Totals, start: Totals) -> str:
        advice = "lower the learning rates, take fewer epochs, or set early_stop"
        if kind == "entropy":
            return (
                "the predictions are collapsing into few classes: their marginal entropy is "
                f"{now.marginal_entropy:.3f} nats, and was {start.marginal_entropy:.3f} at the "
                f"start (evenly over all {len(self._names)} classes it would be "
                f"{math.log(len(self._names)):.3f}); {advice}"
            )
        largest = int(now.histogram.argmax())
        return (
            f"the predictions are collapsing into one class: {now.largest_share:.1%} of the images "
            f"are taken for {self._names[largest]!r}, and at the start the largest class had "
            f"{start.largest_share:.1%}; {advice}"
        )

    def state(self) -> tuple[dict[str, Tensor], dict[str, object]]:
        """Tensors and values, for a checkpoint."""
        tensors = {f"window/{name}": value for name, value in self._window.tensors().items()}
        if self._start is not None:
            tensors |= {f"start/{name}": value for name, value in self._start.tensors().items()}
        return tensors, {"warned": sorted(self._warned)}

    def load(self, tensors: Mapping[str, Tensor], values: Mapping[str, object]) -> None:
        """The inverse of :meth:`state`."""
        self._window = Totals.of_tensors(_below("window/", tensors))
        start = _below("start/", tensors)
        self._start = Totals.of_tensors(start) if start else None
        warned = values["warned"]
        assert isinstance(warned, list)
        self._warned = set(warned)


def totals_of(cosines: Tensor, logit_scale: float) -> Totals:
    """What (N, C) cosines predict: where a training starts."""
    classes = cosines.shape[1]
    totals = Totals(classes)
    for rows in cosines.split(_ROWS):  # in double the whole would take more than all the rest
        p = torch.softmax(logit_scale * rows.cpu().double(), dim=1)
        conditional = float(torch.special.entr(p).sum(dim=1).mean())
        histogram = torch.bincount(p.argmax(dim=1), minlength=classes)
        totals.add(StepStatistics(0.0, conditional, 0.0, p.sum(dim=0), histogram))
    return totals


def _ratio(now: float, start: float) -> float:
    """What is left; 1 where there was nothing to lose."""
    return now / start if start > 0 else 1.0


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
