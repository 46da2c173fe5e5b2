"""An adapted tiny classifier, for the tests of deltas."""

from __future__ import annotations

import torch
from torch import Tensor

from ueo_fast.finetune.clip.model import ClipClassifier, adapted_tensors
from ueo_fast.finetune.clip.prompt import PromptLearner
from ueo_fast.finetune.demo.tiny_clip import tiny_clip, tiny_tokenizer

CLASSES = ["cat", "great_wall", "t-shirt"]


def zero_shot(tower: str = "bn", *, scope: str = "all", seed: int = 0) -> ClipClassifier:
    model = tiny_clip(tower, seed)
    prompt = PromptLearner(model, tiny_tokenizer(), CLASSES, context="an image of", suffix=" !")
    return ClipClassifier(model, prompt, scope=scope)


@torch.no_grad()
def disturb(classifier: ClipClassifier) -> ClipClassifier:
    """Everything that adaptation may change, changed: what training does, without its time."""
    generator = torch.Generator().manual_seed(1)
    for tensor in adapted_tensors(classifier).values():
        if tensor.is_floating_point():
            tensor.add_(0.1 * torch.rand(tensor.shape, generator=generator))
        else:
            tensor.add_(7)
    return classifier


def images() -> Tensor:
    return torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(2))
