"""Layer norms: PyTorch's own on the CPU, the kernels on a GPU, by the rules of each class."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

open_clip = pytest.importorskip("open_clip")
timm = pytest.importorskip("timm")

from open_clip.transformer import LayerNorm, LayerNormFp32  # noqa: E402
from timm.layers import norm as timm_norm  # noqa: E402

from ueo_fast import patch_visual  # noqa: E402
from ueo_fast.patch import norms  # noqa: E402

NORMS = {
    "torch": nn.LayerNorm(6),
    "torch, no affine": nn.LayerNorm(6, elementwise_affine=False),
    "torch, no bias": nn.LayerNorm(6, bias=False),
    "open_clip": LayerNorm(6),
    "open_clip, float32": LayerNormFp32(6),
    "timm": timm_norm.LayerNorm(6),
    "timm, float32": timm_norm.LayerNormFp32(6),
    "timm, 2-d": timm_norm.LayerNorm2d(6),
    "timm, 2-d, float32": timm_norm.LayerNorm2dFp32(6),
}


def pair(name: str) -> tuple[nn.Module, nn.Module]:
    """An unpatched and a patched norm with the same affines."""
    eager = copy.deepcopy(NORMS[name])
    torch.manual_seed(0)
    for parameter in eager.parameters():
        nn.init.normal_(parameter)
    patched = copy.deepcopy(eager)
    assert patch_visual(patched).report.patched
    return eager, patched


def inputs(name: str) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(3, 6, 4, 5) if "2-d" in name else torch.randn(3, 4, 6)


def run(norm: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    x = x.detach().requires_grad_()
    y = norm(x)
    upstream = torch.linspace(-1, 1, y.numel()).to(y).view(y.shape)
    return [y, *torch.autograd.grad(y, [x, *norm.parameters()], upstream)]


@pytest.mark.parametrize("name", NORMS)
def test_the_cpu_runs_the_original(name):
    eager, patched = pair(name)
    for ours, theirs in zip(run(patched, inputs(name)), run(eager, inputs(name)), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", NORMS)
def test_arguments_of_the_kernel(name, dtype, monkeypatch):
    """The GPU's path, with ueo_fast.layer_norm in place of the kernel."""
    eager, patched = (norm.to(dtype) for norm in pair(name))
    x = inputs(name).to(dtype)
    if "float32" in name and dtype == torch.float64:
        pytest.skip("a float32 class narrows float64, which nobody wants")
    theirs = run(eager, x)
    monkeypatch.setattr(norms, "layer_norm_is_fused", lambda norm, x: True)
    torch.testing.assert_close(run(patched, x), theirs)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", NORMS)
def test_on_a_gpu(name, dtype):
    eager, patched = (norm.cuda() for norm in pair(name))
    x = inputs(name).cuda()
    if dtype is not None:
        x = x.to(dtype)
    with torch.autocast("cuda", dtype or torch.float16, enabled=dtype is not None):
        theirs, ours = run(eager, x), run(patched, x)
    for our, their in zip(ours, theirs, strict=True):
        assert our.dtype == their.dtype
        tolerance = 1e-5 if dtype is None else 2e-2
        torch.testing.assert_close(our, their, rtol=tolerance, atol=tolerance)
