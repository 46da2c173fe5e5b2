"""A patched tower gives the outputs and gradients of the unpatched one."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

open_clip = pytest.importorskip("open_clip")
timm = pytest.importorskip("timm")

from patch_models import (  # noqa: E402
    assert_as_exact_as_eager,
    images,
    patch_all,
    perturbed,
    tower,
)

from ueo_fast import freeze_all_but_affine  # noqa: E402

LAYOUTS = [torch.contiguous_format, torch.channels_last]

# name: image size, config changes that save time but keep every kind of layer
TOWERS = {
    "RN50": (64, {"layers": [1, 2, 1, 1], "width": 16}),
    "ViT-B-32": (64, {"layers": 2, "width": 64}),
    "ViT-B-16-SigLIP": (160, {"timm_model_name": "test_vit2"}),
    "convnext_base": (64, {"timm_model_name": "test_convnext"}),
    "MobileCLIP-S1": (64, {"timm_model_name": "test_byobnet"}),
}
FULL_TOWERS = ["RN50", "RN50x4", "ViT-B-32", "ViT-B-16", "ViT-B-16-SigLIP", "convnext_base"]

# Sums of many terms in another order. Under autocast a fused chain rounds once where eager
# rounds twice, and a rounding difference can turn a ReLU on or off at zero.
TOLERANCE = {False: 1e-5, True: 2e-2}


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("memory_format", LAYOUTS, ids=["contiguous", "last"])
@pytest.mark.parametrize("name", TOWERS)
def test_small_towers(name, memory_format, autocast):
    size, vision = TOWERS[name]
    assert_as_exact_as_eager(
        lambda: tower(name, size, **vision).to(memory_format=memory_format),
        patch_all,
        images(2, size, memory_format),
        autocast=autocast,
        tolerance=TOLERANCE[autocast],
    )


@pytest.mark.slow
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("name", FULL_TOWERS)
def test_published_towers(name, autocast):
    size = open_clip.get_model_config(name)["vision_cfg"].get("image_size", 224)
    assert_as_exact_as_eager(
        lambda: tower(name),
        patch_all,
        images(1, size, torch.contiguous_format),
        autocast=autocast,
        tolerance=TOLERANCE[autocast],
    )


@pytest.mark.parametrize("memory_format", LAYOUTS, ids=["contiguous", "last"])
@pytest.mark.parametrize("name", ["resnet18", pytest.param("mobilenet_v2", marks=pytest.mark.slow)])
def test_torchvision(name, memory_format):
    models = pytest.importorskip("torchvision").models

    def build():
        torch.manual_seed(0)
        return perturbed(models.get_model(name)).to(memory_format=memory_format)

    x = images(2, 32, memory_format)
    assert_as_exact_as_eager(build, patch_all, x, tolerance=1e-5)


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_convnext3"])
def test_timm(name):
    def build():
        torch.manual_seed(0)
        return perturbed(timm.create_model(name))

    x = images(2, 64, torch.contiguous_format)
    assert_as_exact_as_eager(build, patch_all, x, tolerance=1e-5)


def test_everything_trained():
    size, vision = TOWERS["RN50"]
    x = images(2, size, torch.contiguous_format)
    assert_as_exact_as_eager(
        lambda: tower("RN50", size, **vision), patch_all, x, tolerance=1e-5, freeze=False
    )


def one_of_each() -> nn.Sequential:
    """Convolutions, norms and pools of every dimension and option that is patched."""
    return nn.Sequential(
        nn.LayerNorm(32),
        nn.Conv2d(3, 8, 3, padding="same", padding_mode="circular"),
        nn.BatchNorm2d(8, affine=False),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=(1, 0), padding_mode="reflect"),
        nn.BatchNorm2d(8),
        nn.AvgPool2d(2, ceil_mode=True, count_include_pad=False),
        nn.Conv2d(8, 32, 1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d((4, None)),
        nn.Flatten(2),
        nn.Conv1d(32, 6, 3, groups=2, dilation=2),
        nn.BatchNorm1d(6),
        nn.Unflatten(1, (3, 2, 1)),
        nn.Conv3d(3, 4, (1, 1, 2), bias=False),
        nn.BatchNorm3d(4),
    )


@pytest.mark.parametrize("memory_format", LAYOUTS, ids=["contiguous", "last"])
def test_every_kind_of_site(memory_format):
    def build():
        torch.manual_seed(0)
        return perturbed(one_of_each())

    x = images(3, 32, memory_format)
    assert_as_exact_as_eager(build, patch_all, x, tolerance=1e-5)


@pytest.mark.parametrize("name", ["RN50", "convnext_base"])
def test_training_mode_is_the_original(name):
    """Batch statistics, their running averages, and every gradient, bit for bit."""
    size, vision = TOWERS[name]
    eager = tower(name, size, **vision).train()
    patched = copy.deepcopy(eager)
    patch_all(patched)
    x = images(4, size, torch.contiguous_format)
    for model in (eager, patched):
        torch.manual_seed(4)  # stochastic depth
        model(x).square().sum().backward()
    for (key, ours), theirs in zip(
        patched.state_dict().items(), eager.state_dict().values(), strict=True
    ):
        assert torch.equal(ours, theirs), key
    for ours, theirs in zip(patched.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=0)


def test_ten_steps_lead_to_the_same_parameters():
    size, vision = TOWERS["RN50"]
    eager = tower("RN50", size, **vision)
    patched = copy.deepcopy(eager)
    patch_all(patched)
    x = images(4, size, torch.contiguous_format)
    start = copy.deepcopy(eager.state_dict())
    for model in (eager, patched):
        optimizer = torch.optim.SGD(freeze_all_but_affine(model).values(), lr=1e-2)
        for _ in range(10):
            optimizer.zero_grad()
            torch.nn.functional.normalize(model(x), dim=-1).square().mean(0).std().backward()
            optimizer.step()
    moved = 0.0
    for key, ours in patched.state_dict().items():
        torch.testing.assert_close(ours, eager.state_dict()[key], rtol=1e-5, atol=1e-6)
        moved += (ours - start[key]).abs().sum().item()
    assert moved > 0
