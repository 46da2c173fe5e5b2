"""One adaptation problem per seed: which images and classes the user has, and which are unknown."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ueo_fast.finetune.data.shifts import CategorySplit, split_classes
from ueo_fast.finetune.demo.config import DemoConfig
from ueo_fast.finetune.demo.digits import DIGIT_NAMES, Domain, apply_shift, split_domains


@dataclass(frozen=True)
class Problem:
    """Images and classes of one seed.

    Attributes:
        seed: what everything here was drawn with.
        source: labelled images of all ten digits, for pre-training.
        clean: the target's images before the shift, to say what the shift costs.
        target: the same images shifted; the test set.
        train: those of the target whose classes occur in training, used without their labels.
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


def make_problem(config: DemoConfig, digits: Domain, seed: int) -> Problem:
    """Draw the halves, the known digits and the shift of ``seed``.

    The halves and the known digits are the same under every shift and tower. Which digits are known
    differs between seeds, so that a result is not about one lucky choice. As in the authors' code
    on Office and VisDA, the unlabelled training images are also test images: the setting is
    transductive (the method never sees a label).
    """
    generator = torch.Generator().manual_seed(seed)
    source, clean = split_domains(digits, generator)
    # Before the shift, which draws from the generator under noise and texture only.
    order = torch.randperm(len(DIGIT_NAMES), generator=generator).tolist()
    target = apply_shift(clean, config.shift, config.effective_severity, generator)
    names = [DIGIT_NAMES[position] for position in order]
    known = names if config.scenario == "CSDA" else names[: config.known_classes]
    split = split_classes(config.scenario, known, names)
    train = target.of_classes(tuple(DIGIT_NAMES.index(name) for name in split.train))
    labels = torch.tensor([split.label(DIGIT_NAMES[digit]) for digit in target.labels.tolist()])
    return Problem(seed, source, clean, target, train, split, labels)
