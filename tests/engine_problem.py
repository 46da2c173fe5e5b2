"""What the tests of the training engine share: a tiny CLIP, a loss with a memory, stores."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from ueo_fast.finetune.clip.model import ClipClassifier
from ueo_fast.finetune.clip.prompt import PromptLearner
from ueo_fast.finetune.demo.tiny_clip import tiny_clip, tiny_tokenizer
from ueo_fast.finetune.engine.hooks import Checkpoint, Hooks
from ueo_fast.finetune.engine.objective import Objective, Step
from ueo_fast.finetune.engine.trainer import TrainerConfig
from ueo_fast.finetune.methods import InfoMax
from ueo_fast.finetune.target import Target

NAMES = ["one", "two", "three", "four"]
CONFIG = TrainerConfig(epochs=2, batch_size=4, prompt_lr=0.05, affine_lr=0.02, seed=3)


def make_classifier(
    tower: str = "vit", dtype: torch.dtype = torch.float32, *, names: list[str] = NAMES
) -> ClipClassifier:
    model = tiny_clip(tower, seed=0).to(dtype)
    return ClipClassifier(model, PromptLearner(model, tiny_tokenizer(), names))


def make_images(count: int = 10, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return (torch.rand(count, 3, 32, 32, generator=generator) * 2 - 1).to(dtype)


def infomax(images: Tensor) -> Objective:
    """A loss that couples the images of a batch; it needs no zero-shot predictions."""
    return InfoMax().objective(make_classifier(), Target(images))


class Remembering(Objective):
    """The loss of ``inner``, plus the distance to what each image's features were last time.

    As DANCE: what it computes depends on all steps before.
    """

    bank: Tensor

    def __init__(self, inner: Objective, images: int, features: int = 64) -> None:
        super().__init__(inner.subset)
        self.inner = inner
        self.register_buffer("bank", torch.zeros(images, features))

    def forward(self, step: Step) -> Tensor:
        loss: Tensor = self.inner(step)
        return loss + (step.image_features * self.bank[step.positions]).sum(dim=1).mean()

    def remember(self, step: Step) -> None:
        self.bank[step.positions] = step.image_features


class Breaking(Objective):
    """The loss of ``inner`` until ``steps`` were remembered; then what ``spoil`` makes of it."""

    def __init__(self, inner: Objective, steps: int, spoil: Any) -> None:
        super().__init__(inner.subset)
        self.inner = inner
        self.steps = steps
        self.spoil = spoil
        self.register_buffer("done", torch.zeros((), dtype=torch.int64))

    def forward(self, step: Step) -> Tensor:
        loss: Tensor = self.inner(step)
        return self.spoil(loss) if int(self.done) >= self.steps else loss

    def remember(self, step: Step) -> None:
        self.done += 1


class NanGradient(torch.autograd.Function):
    """A number that stays as it is, and whose gradient is NaN."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * float("nan")


class MemoryStore:
    """Keeps all checkpoints that are saved; resumes from ``start``."""

    def __init__(self, start: Checkpoint | None = None) -> None:
        self.start = start
        self.saved: list[Checkpoint] = []

    def load(self) -> Checkpoint | None:
        return self.start

    def save(self, checkpoint: Checkpoint) -> None:
        self.saved.append(copy.deepcopy(checkpoint))


class Told:
    """Everything that a run tells, in order."""

    def __init__(self) -> None:
        self.starts: list[Any] = []
        self.steps: list[Any] = []
        self.epochs: list[Any] = []
        self.warnings: list[str] = []

    def hooks(self, checkpoints: Any = None) -> Hooks:
        return Hooks(
            self.starts.append,
            self.steps.append,
            self.epochs.append,
            self.warnings.append,
            checkpoints,
        )


def state_of(classifier: ClipClassifier) -> dict[str, Tensor]:
    return copy.deepcopy(classifier.state_dict())


def assert_same_state(classifier: ClipClassifier, expected: dict[str, Tensor]) -> None:
    """Bit for bit."""
    state = classifier.state_dict()
    assert state.keys() == expected.keys()
    for name, value in state.items():
        assert torch.equal(value, expected[name]), name
