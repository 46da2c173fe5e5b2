"""Patched towers on a GPU."""

from __future__ import annotations

import copy

import pytest
import torch

pytest.importorskip("open_clip")

from patch_models import images, tower

from ueo_fast import freeze_all_but_affine, patch_visual

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

TOWERS = {
    "RN50": (64, {"layers": [1, 2, 1, 1], "width": 16}),
    "ViT-B-32": (64, {"layers": 2, "width": 64}),
    "convnext_base": (64, {"timm_model_name": "test_convnext"}),
}


@pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "memory_format", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "last"]
)
@pytest.mark.parametrize("name", TOWERS)
def test_gradients_are_as_exact_as_eagers(name, memory_format, dtype):
    """Patched on the CPU, then moved to the GPU."""
    size, vision = TOWERS[name]
    eager = tower(name, size, **vision).to(memory_format=memory_format)
    freeze_all_but_affine(eager)
    patched, exact = copy.deepcopy(eager), copy.deepcopy(eager).double()
    patch_visual(patched)
    x = images(8, size, memory_format)
    found = {}
    for label, model in (("truth", exact), ("eager", eager), ("patched", patched)):
        model.cuda()
        half = dtype is not None and label != "truth"
        with torch.autocast("cuda", dtype or torch.float16, enabled=half):
            y = model(x.cuda().double() if label == "truth" else x.cuda())
        y.double().square().mean().backward()
        gradients = [p.grad.double().flatten() for p in model.parameters() if p.grad is not None]
        found[label] = torch.cat([y.detach().double().flatten(), *gradients])
    truth = found["truth"]
    error, eagers = ((found[label] - truth).norm() for label in ("patched", "eager"))
    # TensorFloat-32 and half formats: errors are of similar size, not equal.
    assert error <= 1.5 * eagers + 1e-5 * truth.norm()


def test_an_affine_step_holds_half_the_memory_on_a_gpu():
    model = tower("RN50", 64).cuda()
    freeze_all_but_affine(model)
    x = images(16, 64, torch.contiguous_format).cuda()

    def held() -> int:
        before = torch.cuda.memory_allocated()
        y = model(x)
        return torch.cuda.memory_allocated() - before - y.numel() * y.element_size()

    held()  # libraries allocate their workspaces in the first call
    eager = held()
    patch_visual(model)
    held()
    assert held() <= 0.55 * eager
