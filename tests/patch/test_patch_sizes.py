"""On the CPU, batch norms leave small inputs to PyTorch; every call decides by size."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

pytest.importorskip("open_clip")

from open_clip.modified_resnet import Bottleneck
from patch_models import perturbed
from saved_activations import saved_bytes

from ueo_fast import backends, freeze_all_but_affine, patch_visual
from ueo_fast.patch import norms, unpatch

pytestmark = pytest.mark.skipif(
    backends.unavailable_reason("cpp") is not None, reason="without the binary nothing is fused"
)


def operations(model: nn.Module, x: torch.Tensor) -> set[str]:
    """Names of the autograd functions behind the output."""
    found, waiting = set(), [model(x.requires_grad_()).grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None:
            found.add(type(node).__name__.removesuffix("Backward"))
            waiting += [following for following, _ in node.next_functions]
    return found


def is_fused(model: nn.Module, x: torch.Tensor) -> bool:
    names = operations(model, x)
    ours = bool(names & {"ChannelAffineFunction", "ConvolutionNormFunction"})
    assert ours != any(name.startswith("NativeBatchNorm") for name in names)
    return ours


def norm_relu() -> nn.Module:
    torch.manual_seed(0)
    return perturbed(nn.Sequential(nn.BatchNorm2d(4), nn.ReLU()))


def image(elements: int) -> torch.Tensor:
    return torch.ones(1, 4, elements // 4, 1)


def test_the_size_that_was_measured_decides():
    model = norm_relu()
    patch_visual(model)
    limit = norms.MIN_ELEMENTS
    assert not is_fused(model, image(limit - 4))
    assert is_fused(model, image(limit))


def test_another_size_and_none_at_all():
    model = norm_relu()
    with patch_visual(model, min_elements=8):
        assert not is_fused(model, image(4))
        assert is_fused(model, image(8))
    with patch_visual(model, min_elements=0):
        assert is_fused(model, image(4))
    with patch_visual(model):  # nothing of the calls before is left
        assert not is_fused(model, image(8))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_keep_the_size_until_they_are_unpatched(copied):
    model = norm_relu()
    attributes = set(vars(model[0]))
    patch_visual(model, min_elements=8)
    twin = copied(model)
    assert is_fused(twin, image(8))
    unpatch(twin)
    assert set(vars(twin[0])) == attributes
    assert not is_fused(twin, image(8))
    assert is_fused(model, image(8))


def test_the_model_that_is_patched_second_keeps_the_first_size():
    model = norm_relu()
    patch_visual(model, min_elements=8)
    patch_visual(model, min_elements=0)
    assert not is_fused(model, image(4))


def test_small_inputs_give_what_eager_gives_bit_for_bit():
    torch.manual_seed(0)
    eager = perturbed(Bottleneck(16, 4))
    freeze_all_but_affine(eager)
    patched = copy.deepcopy(eager)
    patch_visual(patched)
    x = torch.randn(2, 16, 6, 6)
    for model in (eager, patched):
        model(x).square().sum().backward()
    for ours, theirs in zip(patched.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=0)


def test_a_shortcut_goes_by_the_wide_tensor_it_makes():
    conv = nn.Conv2d(2, 8, 1, stride=2, bias=False).requires_grad_(False)
    model = nn.Sequential(conv, nn.BatchNorm2d(8)).eval()
    x = torch.randn(1, 2, 8, 8)  # 128 elements in, 128 out
    patch_visual(model, min_elements=129)
    assert not is_fused(model, x)
    wide = nn.Conv2d(2, 16, 1, bias=False).requires_grad_(False)
    model = nn.Sequential(wide, nn.BatchNorm2d(16)).eval()
    patch_visual(model, min_elements=1024)
    assert operations(model, x) >= {"ConvolutionNormFunction"}  # 128 in, 1024 out
    few = 4 * 16 * 4 + 8
    assert saved_bytes(model, lambda: model(x.requires_grad_())) <= x.numel() * 4 + few


def test_timms_batch_norm_act():
    layers = pytest.importorskip("timm.layers")
    model = layers.BatchNormAct2d(4).eval()
    patch_visual(model, min_elements=8)
    assert not is_fused(model, image(4))
    assert is_fused(model, image(8))


def test_a_compiled_graph_is_fused_at_every_size():
    model = norm_relu()
    patch_visual(model)
    torch.compiler.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(str(graph.code))
        return graph

    torch.compile(model, fullgraph=True, backend=backend)(image(8))
    assert "batch_norm" not in graphs[0]


def test_the_report_states_the_size():
    def notes(**options) -> str:
        return " ".join(patch_visual(norm_relu(), **options).report.notes)

    assert "fewer than 400,000 elements on the CPU" in notes()
    assert "fewer than 8 elements" in notes(min_elements=8)
    assert notes(min_elements=0) == ""
    assert patch_visual(nn.Conv2d(1, 1, 1)).report.notes == ()


@pytest.mark.parametrize(
    ("value", "error", "words"),
    [
        (-1, ValueError, "min_elements must not be negative, got -1: 0 fuses every size"),
        (1e5, TypeError, "min_elements must be an int or None .*, got float"),
        (True, TypeError, "got bool"),
    ],
)
def test_sizes_that_are_none(value, error, words):
    model = norm_relu()
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(error, match=words):
        patch_visual(model, min_elements=value)
    assert [type(module) for module in model.modules()] == kinds
