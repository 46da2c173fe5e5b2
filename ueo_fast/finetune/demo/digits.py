"""The demonstration's data: scikit-learn's digits, shifted, and what each seed draws of them."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits as sklearn_digits
from torch import Tensor

from ueo_fast.finetune.data.shifts import CategorySplit, split_classes
from ueo_fast.finetune.demo.config import DemoConfig

DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
IMAGE_SIZE = 32


@dataclass(frozen=True)
class Domain:
    """A list of images with labels.

    Attributes:
        images: (N, 3, 32, 32) float32 in [-1, 1].
        labels: (N,) int64, position in :data:`DIGIT_NAMES`.
        index: (N,) int64, position in scikit-learn's data set.
    """

    images: Tensor
    labels: Tensor
    index: Tensor

    def subset(self, rows: Tensor) -> Domain:
        """The images at ``rows``: positions, or a mask (N,)."""
        return Domain(self.images[rows], self.labels[rows], self.index[rows])

    def of_classes(self, classes: tuple[int, ...]) -> Domain:
        """The images of ``classes``, in the same order."""
        return self.subset(torch.isin(self.labels, torch.tensor(classes)))


@functools.cache
def load_digits() -> Domain:
    """All 1,797 digits (8 x 8, 17 grey levels), enlarged bilinearly to 32 x 32 RGB.

    Source: ``sklearn.datasets.load_digits``, a copy of the test set of UCI's "Optical Recognition
    of Handwritten Digits"; it comes with the scikit-learn package.
    """
    data = sklearn_digits()
    grey = torch.from_numpy(data.images).float()[:, None] / 16.0
    large = F.interpolate(grey, size=IMAGE_SIZE, mode="bilinear", align_corners=False)
    images = (2.0 * large - 1.0).expand(-1, 3, -1, -1).contiguous()
    return Domain(images, torch.from_numpy(data.target).long(), torch.arange(len(images)))


def split_domains(digits: Domain, generator: torch.Generator) -> tuple[Domain, Domain]:
    """Split at random into source and target, which share no image.

    Each class is halved on its own, so that both domains have the same class frequencies.
    """
    source: list[Tensor] = []
    target: list[Tensor] = []
    for label in range(len(DIGIT_NAMES)):
        members = torch.nonzero(digits.labels == label).flatten()
        members = members[torch.randperm(len(members), generator=generator)]
        half = len(members) // 2
        source.append(members[:half])
        target.append(members[half:])
    return digits.subset(torch.cat(source)), digits.subset(torch.cat(target))


def _contrast(images: Tensor, severity: float, generator: torch.Generator) -> Tensor:
    """Grey levels squeezed to ``1 - severity`` of their range, around a brighter middle."""
    return (1.0 - severity) * images + 0.5 * severity


def _noise(images: Tensor, severity: float, generator: torch.Generator) -> Tensor:
    """Gaussian noise of standard deviation ``severity``, independent per pixel and channel."""
    noise = torch.randn(images.shape, generator=generator)
    return (images + severity * noise).clamp(-1.0, 1.0)


def _rotation(images: Tensor, severity: float, generator: torch.Generator) -> Tensor:
    """Every image turned by the same ``90 * severity`` degrees, the border filled with -1."""
    angle = math.radians(90.0 * severity)
    cosine, sine = math.cos(angle), math.sin(angle)
    matrix = torch.tensor([[cosine, -sine, 0.0], [sine, cosine, 0.0]]).expand(len(images), 2, 3)
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    # Zero is the padding of grid_sample; the background of a digit is -1.
    return F.grid_sample(images + 1.0, grid, align_corners=False) - 1.0


def _texture(images: Tensor, severity: float, generator: torch.Generator) -> Tensor:
    """A smooth coloured pattern in place of the black background, different for every image."""
    count = len(images)
    coarse = torch.rand((count, 3, 5, 5), generator=generator) * 2.0 - 1.0
    pattern = F.interpolate(coarse, size=IMAGE_SIZE, mode="bicubic", align_corners=False)
    ink = (images + 1.0) / 2.0
    background = -1.0 + severity * (pattern.clamp(-1.0, 1.0) + 1.0)
    return ink + (1.0 - ink) * background


SHIFTS: dict[str, Callable[[Tensor, float, torch.Generator], Tensor]] = {
    "contrast": _contrast,
    "noise": _noise,
    "rotation": _rotation,
    "texture": _texture,
}


def apply_shift(domain: Domain, shift: str, severity: float, generator: torch.Generator) -> Domain:
    """The same images under a domain shift.

    Args:
        domain: images in [-1, 1].
        shift: ``contrast`` (low contrast, brighter), ``noise`` (Gaussian), ``rotation`` (all by
            one angle) or ``texture`` (a coloured background).
        severity: 0 changes nothing, 1 is the strongest.
        generator: draws the noise and the patterns.

    Raises:
        ValueError: unknown shift, or a severity outside [0, 1].
    """
    if shift not in SHIFTS:
        raise ValueError(f"unknown shift {shift!r}: choose one of {', '.join(SHIFTS)}")
    if not 0.0 <= severity <= 1.0:
        raise ValueError(f"severity must lie in [0, 1], got {severity}")
    return replace(domain, images=SHIFTS[shift](domain.images, severity, generator))


@dataclass(frozen=True)
class Draw:
    """What one seed draws: the images and classes of one run.

    Attributes:
        seed: the seed.
        source: labelled images of all ten digits, for pre-training.
        clean: the target before the shift; it shows what the shift costs.
        target: the same images after the shift; the test set.
        train: the part of the target that the methods adapt to, without labels.
        split: known, training and test classes, by name.
        labels: (len(target),) int64, position in ``split.known``, or -1 for unknown.
    """

    seed: int
    source: Domain
    clean: Domain
    target: Domain
    train: Domain
    split: CategorySplit
    labels: Tensor


def draw(config: DemoConfig, seed: int) -> Draw:
    """Draw the halves, the known digits and the shift of ``seed``.

    A seed has the same halves and known digits under every shift and tower. The known digits differ
    between seeds, so that a result does not rest on one lucky choice. As in the authors' code for
    Office and VisDA, the training images are also test images (transductive).
    """
    generator = torch.Generator().manual_seed(seed)
    source, clean = split_domains(load_digits(), generator)
    # Before the shift: noise and texture draw from the generator, the other shifts do not.
    order = torch.randperm(len(DIGIT_NAMES), generator=generator).tolist()
    target = apply_shift(clean, config.shift, config.effective_severity, generator)
    names = [DIGIT_NAMES[position] for position in order]
    known = names if config.scenario == "CSDA" else names[: config.known_classes]
    split = split_classes(config.scenario, known, names)
    train = target.of_classes(tuple(DIGIT_NAMES.index(name) for name in split.train))
    labels = torch.tensor([split.label(DIGIT_NAMES[digit]) for digit in target.labels.tolist()])
    return Draw(seed, source, clean, target, train, split, labels)
