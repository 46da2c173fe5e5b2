"""The fine-tuning code uses the patch, and gives the same result without it."""

from __future__ import annotations

import pytest
import torch

from ueo_fast.finetune.clip.model import ClipClassifier
from ueo_fast.finetune.clip.prompt import PromptLearner
from ueo_fast.finetune.demo.config import DemoConfig
from ueo_fast.finetune.demo.tiny_clip import tiny_clip, tiny_tokenizer
from ueo_fast.finetune.engine.trainer import TrainerConfig
from ueo_fast.finetune.evaluation.predict import predict_cosines
from ueo_fast.finetune.methods import UEO, AdaBN
from ueo_fast.finetune.target import zero_shot_target
from ueo_fast.patch import norms


def classifier(tower: str, patch: bool) -> ClipClassifier:
    model = tiny_clip(tower, seed=0)
    prompt = PromptLearner(model, tiny_tokenizer(), ["one", "two", "three"])
    return ClipClassifier(model, prompt, patch=patch)


def test_patched_by_default():
    model = tiny_clip("bn", seed=0)
    prompt = PromptLearner(model, tiny_tokenizer(), ["one", "two"])
    handle = ClipClassifier(model, prompt).patch_handle
    assert handle is not None
    assert not handle.report.left_alone
    assert type(model.visual.bn1).__name__ == "PatchedBatchNorm2d"
    assert classifier("bn", patch=False).patch_handle is None


@pytest.mark.parametrize("method", [UEO(), AdaBN()], ids=["UEO", "AdaBN"])
@pytest.mark.parametrize("tower", ["bn", "vit"])
def test_the_result_is_the_same_either_way(tower, method, monkeypatch):
    monkeypatch.setattr(norms, "MIN_ELEMENTS", 0)  # images so small would not be fused
    if tower == "vit" and isinstance(method, AdaBN):
        pytest.skip("AdaBN is for towers with BatchNorm")
    images = torch.rand(12, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    config = TrainerConfig(epochs=3, batch_size=4, prompt_lr=0.05, affine_lr=0.02, seed=3)
    found = {}
    for patch in (True, False):
        adapted = classifier(tower, patch)
        history = method.adapt(adapted, zero_shot_target(adapted, images), config=config)
        found[patch] = torch.tensor(history.loss), predict_cosines(adapted, images)
    torch.testing.assert_close(found[True], found[False], rtol=1e-4, atol=1e-5)


def test_the_flag_is_part_of_the_command():
    assert DemoConfig(patch=False).command() == "ueo-fast demo --patch false"
    assert DemoConfig().command() == "ueo-fast demo"
    assert DemoConfig().as_dict()["patch"] is True
