"""A 1 x 1 convolution that widens, and its batch norm: one call that holds the narrow input."""

from __future__ import annotations

import copy

import pytest
import torch
from saved_activations import saved_bytes
from torch import nn

pytest.importorskip("open_clip")

from patch_models import assert_as_exact_as_eager, gradients, patch_all, perturbed

from ueo_fast import backends

pytestmark = pytest.mark.skipif(
    backends.unavailable_reason("cpp") is not None, reason="without the binary nothing is fused"
)


def shortcut(*after: nn.Module, stride: int = 1, bias: bool = False) -> nn.Module:
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 32, 1, stride=stride, bias=bias)
    return perturbed(nn.Sequential(conv, nn.BatchNorm2d(32), *after))


def image(memory_format: torch.memory_format = torch.contiguous_format) -> torch.Tensor:
    x = torch.randn(2, 3, 8, 6, generator=torch.Generator().manual_seed(0))
    return x.to(memory_format=memory_format)


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("after", ["nothing", "relu", "gelu"])
def test_gradients(after, stride, memory_format, autocast):
    modules = {"nothing": [], "relu": [nn.ReLU(inplace=True)], "gelu": [nn.GELU()]}[after]
    assert_as_exact_as_eager(
        lambda: shortcut(*modules, stride=stride),
        patch_all,
        image(memory_format),
        autocast=autocast,
        tolerance=2e-2 if autocast else 1e-5,
    )


@pytest.mark.parametrize("after", [(), (nn.ReLU(),)], ids=["nothing", "relu"])
def test_the_input_is_held_and_nothing_wide(after):
    model = shortcut(*after)
    model[0].requires_grad_(False)
    patch_all(model)
    x = image().requires_grad_()
    values_per_channel = 4 * 32 * 4 + 8  # scale, shift, statistics, and a few bits
    assert saved_bytes(model, lambda: model(x)) <= x.numel() * 4 + values_per_channel


@pytest.mark.parametrize("spoiler", ["bias", "trained", "hook on conv", "hook on norm", "training"])
def test_what_does_not_fit_runs_one_by_one(spoiler):
    eager = shortcut(nn.ReLU(), bias=spoiler == "bias")
    eager[0].requires_grad_(spoiler == "trained")
    patched = copy.deepcopy(eager)
    seen: list[nn.Module] = []
    for model in (eager, patched):
        model.train(spoiler == "training")
        if spoiler.startswith("hook"):
            watched = model[0 if spoiler.endswith("conv") else 1]
            watched.register_forward_hook(lambda m, a, out: seen.append(m))
    report = patch_all(patched).report
    ours, theirs = gradients(patched, image()), gradients(eager, image())
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-4, atol=1e-5)
    if spoiler.startswith("hook"):
        assert len(seen) == 2
        assert "convolution" not in report.sites[1].reason


def test_second_derivatives_are_refused():
    model = shortcut()
    model[0].requires_grad_(False)
    patch_all(model)
    x = image().requires_grad_()
    (gradient,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        gradient.square().sum().backward()
