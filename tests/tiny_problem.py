"""What the tests of the methods share: a tiny CLIP, a few images, and steps made by hand."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ueo_fast.finetune.clip.model import ClipClassifier
from ueo_fast.finetune.clip.prompt import PromptLearner
from ueo_fast.finetune.demo.tiny_clip import tiny_clip, tiny_tokenizer
from ueo_fast.finetune.engine.objective import Objective, Step

NAMES = ["one", "two", "three"]


def make_classifier(tower: str = "bn") -> ClipClassifier:
    model = tiny_clip(tower, seed=0)
    return ClipClassifier(model, PromptLearner(model, tiny_tokenizer(), NAMES))


def make_images(count: int = 12) -> Tensor:
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1


def step_of(images: Tensor, text: Tensor, positions: Tensor, scale: float = 7.0) -> Step:
    """The step of features (B, E) and (C, E), which are normalised here."""
    images, text = F.normalize(images, dim=1), F.normalize(text, dim=1)
    cosines = images @ text.T
    return Step(cosines, scale * cosines, images, text, positions)


def random_features(rows: int, seed: int, features: int = 6) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, features, generator=generator, dtype=torch.float64)


def random_step(positions: Tensor, classes: int = 4, seed: int = 0) -> Step:
    return step_of(
        random_features(len(positions), seed), random_features(classes, seed + 1), positions
    )


def check_gradients(objective: Objective, positions: Tensor, classes: int = 4) -> None:
    """Finite differences in double, by the features of images and classes."""

    def loss(images: Tensor, text: Tensor) -> Tensor:
        return objective(step_of(images, text, positions))

    function: Callable[..., Tensor] = loss
    leaves = [
        random_features(len(positions), seed=5).requires_grad_(),
        random_features(classes, seed=6).requires_grad_(),
    ]
    assert torch.autograd.gradcheck(function, leaves)
