"""What autograd saves for backward if only the affines are trained, counted by storage."""

from __future__ import annotations

import pytest
import torch
from torch import nn

pytest.importorskip("open_clip")

from patch_models import images, patch_all, tower
from saved_activations import saved_bytes

from ueo_fast import backends, freeze_all_but_affine

pytestmark = pytest.mark.skipif(
    backends.unavailable_reason("cpp") is not None, reason="without the binary nothing is fused"
)


def ratio(model: nn.Module, x: torch.Tensor, scope: str = "all") -> float:
    """Bytes saved with the patch over bytes saved without."""
    freeze_all_but_affine(model, scope)
    eager = saved_bytes(model, lambda: model(x))
    with patch_all(model):
        return saved_bytes(model, lambda: model(x)) / eager


@pytest.mark.parametrize("scope", ["all", "authors"])
@pytest.mark.parametrize("size", [64, pytest.param(224, marks=pytest.mark.slow)])
def test_rn50_holds_half(size, scope):
    x = images(16, size, torch.contiguous_format)
    assert ratio(tower("RN50", size), x, scope) <= 0.5


def test_autocast_holds_half_as_well():
    x = images(16, 64, torch.contiguous_format)
    with torch.autocast("cpu", torch.bfloat16):
        assert ratio(tower("RN50", 64), x) <= 0.5


@pytest.mark.parametrize("name", ["ViT-B-16", "ViT-B-32"])
def test_a_vision_transformer_holds_what_it_held(name):
    """Attention, GELU and LayerNorm save their inputs either way; no frozen convolution follows a
    trained parameter."""
    x = images(2, 32 if name == "ViT-B-16" else 64, torch.contiguous_format)
    assert ratio(tower(name, x.shape[-1], layers=2), x) <= 1.0


def test_a_convnext_holds_less():
    x = images(2, 64, torch.contiguous_format)
    model = tower("convnext_base", 64, timm_model_name="test_convnext")
    assert ratio(model, x) < 0.9
