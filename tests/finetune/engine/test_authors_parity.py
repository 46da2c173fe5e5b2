"""Our training, in the authors' setting, is their training: same losses, same parameters."""

from __future__ import annotations

import copy
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

pytest.importorskip("open_clip")

from open_clip.model import CLIP, CLIPTextCfg
from open_clip.tokenizer import SimpleTokenizer

from benchmarks.authors_step import AuthorsTraining, confidence
from ueo_fast import affine_parameters
from ueo_fast.finetune.clip.model import ClipClassifier
from ueo_fast.finetune.clip.prompt import PromptLearner
from ueo_fast.finetune.demo.tiny_clip import EMBED_DIM, TOWERS
from ueo_fast.finetune.engine.hooks import Hooks
from ueo_fast.finetune.engine.trainer import TrainerConfig
from ueo_fast.finetune.files.run_files import StepRecord
from ueo_fast.finetune.methods import UEO
from ueo_fast.finetune.target import Target

NAMES = ["airplane", "The_Great_Wall_of_China", "t-shirt", "hot_dog", "zebra", "alarm_clock"]
IMAGES, BATCH, EPOCHS, STEPS = 30, 8, 5, 20  # the fourth batch of an epoch has six images
RATES = {"bn": 0.001, "vit": 0.01}
"""By tower, so large that 20 steps go far, and not so large that rounding grows without bounds."""


class Recorded(Dataset[Tensor]):
    """Images that remember the order in which they were asked for."""

    def __init__(self, images: Tensor) -> None:
        self.images = images
        self.asked: list[int] = []

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        self.asked.append(int(index))
        return self.images[index]

    def batches(self) -> list[list[int]]:
        epochs = [self.asked[start : start + IMAGES] for start in range(0, len(self.asked), IMAGES)]
        return [order[i : i + BATCH] for order in epochs for i in range(0, IMAGES, BATCH)]


def make_clip(tower: str, dtype: torch.dtype) -> CLIP:
    """77 tokens, QuickGELU, and OpenAI's temperature, which is a constant in the authors' code."""
    torch.manual_seed(0)
    text = CLIPTextCfg(context_length=77, width=64, heads=4, layers=2)
    model = CLIP(EMBED_DIM, TOWERS[tower], text, quick_gelu=True)
    for module in model.visual.modules():
        if isinstance(module, nn.BatchNorm2d | nn.LayerNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0  # statistics of its own activations, as a trained tower has
    model = model.to(dtype)
    with torch.no_grad():
        model.visual.train()(torch.randn(64, 3, 32, 32, dtype=dtype))
        model.eval()
        model.token_embedding.weight.mul_(20)  # so that classes differ, as they do when trained
        model.logit_scale.copy_(torch.tensor(100.0, dtype=dtype).log())
    return model


class Runs(NamedTuple):
    """What both trainings did from the same start with the same images in the same order."""

    theirs: AuthorsTraining
    ours: ClipClassifier
    their_losses: Tensor
    our_losses: Tensor
    before: dict[str, Tensor]


def train_both(tower: str, dtype: torch.dtype, eps: float = 1e-5) -> Runs:
    model, rate = make_clip(tower, dtype), RATES[tower]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    tokenizer = SimpleTokenizer()
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(IMAGES, 3, 32, 32, generator=generator, dtype=dtype)

    theirs = AuthorsTraining(
        copy.deepcopy(model), tokenizer, NAMES, steps=STEPS, prompt_lr=rate, affine_lr=rate
    )
    with torch.no_grad():
        cosines = theirs.image_features(images) @ theirs.text_features().T
    weight = confidence(cosines)

    prompt = PromptLearner(model, tokenizer, NAMES)
    ours = ClipClassifier(model, prompt, scope="authors")
    torch.testing.assert_close(ours(images).cosines, cosines, rtol=0, atol=1e-6)
    augmented = Recorded(images)
    records: list[StepRecord] = []
    UEO(eps=eps).adapt(
        ours,
        Target(images, augmented, cosines),
        config=TrainerConfig(
            epochs=EPOCHS, batch_size=BATCH, prompt_lr=rate, affine_lr=rate, seed=3
        ),
        hooks=Hooks(on_step=records.append),
    )
    losses = [theirs.step(images[batch], weight[batch]) for batch in augmented.batches()]
    return Runs(
        theirs,
        ours,
        torch.tensor(losses, dtype=torch.float64),
        torch.tensor([record.loss for record in records], dtype=torch.float64),
        before,
    )


@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=str
)
def test_twenty_steps_are_theirs(tower: str, dtype: torch.dtype, tolerance: float) -> None:
    """Absolute, in nats and in the parameters' units; float32 to some twenty roundings."""
    runs = train_both(tower, dtype)
    assert len(runs.our_losses) == len(runs.their_losses) == STEPS
    torch.testing.assert_close(runs.our_losses, runs.their_losses, rtol=0, atol=tolerance)
    ours = {
        "context": runs.ours.prompt.context,
        **affine_parameters(runs.ours.model, "authors"),
    }
    theirs = {
        "context": runs.theirs.prompts.context,
        **{f"visual.{name}": value for name, value in runs.theirs.affine.items()},
    }
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert ours[name].dtype == dtype
        torch.testing.assert_close(
            ours[name], value, rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("tower", TOWERS)
def test_what_is_compared_has_moved_and_the_rest_has_not(tower: str) -> None:
    """Guards the test above: equality of what nobody has changed would say nothing."""
    runs = train_both(tower, torch.float64)
    trained = {f"visual.{name}" for name in runs.theirs.affine}
    for model in (runs.theirs.model, runs.ours.model):
        state = model.state_dict()
        for name, before in runs.before.items():
            moved = float((state[name] - before).abs().max())
            assert moved > 1e-6 if name in trained else moved == 0, name
    assert len(trained) >= 14
    context = runs.theirs.prompts.context
    embedded = runs.theirs.model.token_embedding(runs.theirs.prompts.tokens)[0, 1:5]
    assert (context - embedded).abs().max() > 1e-4


def test_a_small_difference_of_the_recipe_is_seen() -> None:
    """Without the authors' 1e-5 inside the logarithms: far outside of the tolerance above."""
    runs = train_both("vit", torch.float64, eps=0.0)
    assert (runs.our_losses - runs.their_losses).abs().max() > 1e-7
