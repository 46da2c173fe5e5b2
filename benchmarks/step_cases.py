"""A whole training step, ours and the authors', split at the features to time its parts.

Both models start from the same weights and see the same images with the same confidence.
"""

from __future__ import annotations

import copy
import functools
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from benchmarks.authors_step import EPS, SCALE, AuthorsTraining, confidence

CONTENDERS = ("ueo_fast", "authors")
PARTS = (
    "image forward",
    "text forward",
    "loss",
    "text backward",
    "image backward",
    "optimiser",
)
NAMES = Path(__file__).parents[1] / "ueo_fast/finetune/data/classes/domainnet.txt"
LOSSES_OFF = 1e-4
"""Largest difference of the contenders' losses, in nats, in float32 after up to three steps."""
SCHEDULE = 1000
"""Steps of the cosine schedule: more than are taken."""


@dataclass(frozen=True)
class StepCase:
    model: str
    batch: int
    classes: int = 300
    pixels: int = 224

    def __str__(self) -> str:
        return f"{self.model}-{self.batch}-{self.classes}"


CASES = tuple(StepCase(model, batch) for batch in (16, 64, 32) for model in ("RN50", "ViT-B-16"))
DRY_CASES = (StepCase("tiny", 3, classes=4, pixels=32),)


def class_names(count: int) -> list[str]:
    """The first of DomainNet's."""
    lines = (line.strip() for line in NAMES.read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line and not line.startswith("#")][:count]


@functools.lru_cache(maxsize=1)
def model(name: str) -> nn.Module:
    """Random weights; OpenAI's activation and temperature; statistics of its own activations."""
    import open_clip

    configuration = open_clip.get_model_config("RN50" if name == "tiny" else name)
    if name == "tiny":
        configuration["vision_cfg"].update(layers=(1, 1, 1, 1), width=16, image_size=32)
        configuration["text_cfg"].update(width=64, heads=4, layers=2)
    torch.manual_seed(0)
    made = open_clip.CLIP(**configuration, quick_gelu=True)
    norms = [one for one in made.visual.modules() if isinstance(one, nn.BatchNorm2d)]
    with torch.no_grad():
        made.logit_scale.fill_(torch.tensor(SCALE).log())
        # As far apart as trained ones; otherwise all classes would have nearly the same feature.
        made.token_embedding.weight.mul_(20)
        for norm in norms:
            norm.momentum = 1.0
            nn.init.uniform_(norm.weight, 0.5, 1.0)
        if norms:
            side = made.visual.image_size
            made.visual.train()(torch.randn(4, 3, side, side))
    return made.eval()


def _copy(made: nn.Module) -> nn.Module:
    """Copy the norms, which are trained; all other weights are frozen and shared."""
    frozen = [
        parameter
        for module in made.modules()
        if not isinstance(module, nn.BatchNorm2d | nn.LayerNorm)
        for parameter in module.parameters(recurse=False)
    ]
    return copy.deepcopy(made, {id(parameter): parameter for parameter in frozen})


class Training(Protocol):
    """What both contenders can do."""

    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler

    def image_features(self, images: Tensor) -> Tensor: ...

    def text_features(self) -> Tensor: ...

    def loss(self, image: Tensor, text: Tensor, weight: Tensor) -> Tensor: ...


class OurTraining:
    """The parts of ueo_fast's step: patched visual tower, packed prompts, fused loss."""

    def __init__(self, made: Any, tokenizer: Callable[..., Tensor], names: list[str]) -> None:
        from ueo_fast.finetune.clip.model import ClipClassifier
        from ueo_fast.finetune.clip.prompt import PromptLearner

        made.requires_grad_(False)
        prompt = PromptLearner(made, tokenizer, names)
        self.classifier = ClipClassifier(made, prompt, scope="authors")
        parameters = [self.classifier.prompt_parameters(), self.classifier.affine_parameters()]
        groups = [{"params": group, "lr": 1e-4} for group in parameters]
        self.optimizer = torch.optim.SGD(groups)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, SCHEDULE)
        self.image_features = self.classifier.image_features
        self.text_features = self.classifier.text_features

    def loss(self, image: Tensor, text: Tensor, weight: Tensor) -> Tensor:
        from ueo_fast import ueo_loss

        return ueo_loss(self.classifier.compare(image, text).logits, weight, eps=EPS)


class Step:
    """A sequence of training steps; each call returns the loss and the seconds of each part."""

    def __init__(self, name: str, case: StepCase) -> None:
        import open_clip

        made = _copy(model(case.model))
        names = class_names(case.classes)
        tokenizer = open_clip.SimpleTokenizer()
        self.training: Training = (
            OurTraining(made, tokenizer, names)
            if name == "ueo_fast"
            else AuthorsTraining(made, tokenizer, names, steps=SCHEDULE)
        )
        generator = torch.Generator().manual_seed(1)
        self.images = torch.randn(case.batch, 3, case.pixels, case.pixels, generator=generator)
        cosines = 0.2 + 0.05 * torch.randn(case.batch, case.classes, generator=generator)
        self.weight = confidence(cosines)

    def __call__(self) -> tuple[float, dict[str, float]]:
        training, clock = self.training, [time.perf_counter()]
        image = training.image_features(self.images)
        clock.append(time.perf_counter())
        text = training.text_features()
        clock.append(time.perf_counter())
        # Leaves in between: one backward call for each tower, the same arithmetic as a single one.
        leaves = [features.detach().requires_grad_() for features in (image, text)]
        value = training.loss(leaves[0], leaves[1], self.weight)
        loss = value.item()
        training.optimizer.zero_grad()
        value.backward()
        clock.append(time.perf_counter())
        text.backward(leaves[1].grad)
        clock.append(time.perf_counter())
        image.backward(leaves[0].grad)
        clock.append(time.perf_counter())
        training.optimizer.step()
        training.schedule.step()
        clock.append(time.perf_counter())
        spent = [after - before for before, after in itertools.pairwise(clock)]
        return loss, dict(zip(PARTS, spent, strict=True))
