"""The report lists every norm, convolution and pool, and says why one was left alone."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from ueo_fast import patch_visual
from ueo_fast.patch import apply
from ueo_fast.patch.sites import is_norm

open_clip = pytest.importorskip("open_clip")
timm = pytest.importorskip("timm")

from open_clip.model import _build_vision_tower  # noqa: E402


def meta_tower(name: str) -> nn.Module:
    config = open_clip.get_model_config(name)
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _build_vision_tower(
            config["embed_dim"], config["vision_cfg"], config.get("quick_gelu", False)
        )


def reasons(model: nn.Module) -> dict[str, tuple[bool, str]]:
    return {s.name: (s.patched, s.reason) for s in patch_visual(model).report.sites}


def test_the_55_batch_norms_of_rn50():
    model = nn.Module()
    model.visual = meta_tower("RN50").eval()
    report = patch_visual(model).report
    norms = [site for site in report.sites if site.kind == "norm"]
    count = {reason: sum(s.reason == reason for s in norms) for reason in {s.reason for s in norms}}
    assert count == {
        "fused with the ReLU that follows": 35,
        "fused with the addition and the ReLU that follows": 16,
        "fused with the 1 x 1 convolution before it, whose input is saved": 4,
    }
    assert {site.type for site in norms} == {"BatchNorm2d"}
    assert sum(site.kind == "conv" for site in report.sites) == 55
    assert sum(site.kind == "pool" for site in report.sites) == 8
    assert not report.left_alone
    names = dict(model.named_modules())
    assert all(site.name in names for site in report.sites)
    text = str(report)
    assert text.count("\n") > len(report.sites)
    assert "norm: 55 of 55 patched" in text
    assert "visual.layer1.0.downsample.-1" in text
    assert "training mode" not in text
    assert "training mode" in str(patch_visual(meta_tower("RN50")).report)


EXPLAINED = (
    "fused",
    "already patched",
    "saves no input",
    "no fused kernel",
    "of its own",
    "several dimensions",
    "maxima",
    "no replacement",
)

SAMPLE = [
    "RN50",
    "ViT-B-32",
    "ViT-B-16-SigLIP",
    "convnext_base",
    "coca_ViT-B-32",
    "EVA02-B-16",
    "swin_base_patch4_window7_224",
    "MobileCLIP-S1",
    "MobileCLIP2-S3",
    "ViTamin-S",
    "vit_medium_patch16_gap_256",
]


def assert_explained(name: str) -> None:
    model = meta_tower(name)
    sites = {n: m for n, m in model.named_modules() if is_norm(m)}
    report = patch_visual(model).report
    assert sites.keys() <= {site.name for site in report.sites}
    assert any(site.kind == "norm" and site.patched for site in report.sites)
    for site in report.sites:
        assert any(words in site.reason for words in EXPLAINED), site


@pytest.mark.parametrize("name", [n for n in SAMPLE if n in open_clip.list_models()])
def test_towers_of_open_clip_are_patched_or_explained(name):
    assert_explained(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", open_clip.list_models())
def test_every_tower_of_open_clip_is_patched_or_explained(name):
    assert_explained(name)


def own_forward(base: type[nn.Module]) -> type[nn.Module]:
    return type(f"Own{base.__name__}", (base,), {"forward": lambda self, x: x})


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (nn.GroupNorm(2, 4), "no fused kernel for GroupNorm"),
        (nn.RMSNorm(4), "no fused kernel for RMSNorm"),
        (nn.InstanceNorm2d(4), "no fused kernel for InstanceNorm2d"),
        (nn.LayerNorm((2, 4)), "it normalises over several dimensions"),
        (own_forward(nn.LayerNorm)(4), "OwnLayerNorm has a forward of its own"),
        (own_forward(nn.BatchNorm2d)(4), "OwnBatchNorm2d has a forward of its own"),
        (own_forward(nn.Conv2d)(4, 4, 1), "OwnConv2d has a forward of its own"),
        (timm.layers.FrozenBatchNormAct2d(4), "its weight and bias are buffers"),
        (nn.ConvTranspose2d(4, 4, 2), "transposed convolutions are left alone"),
        (nn.MaxPool2d(2), "max pooling's gradient needs to know where the maxima were"),
        (nn.AvgPool1d(2), "no replacement for AvgPool1d, only for 2-d averages"),
        (nn.AdaptiveAvgPool3d(2), "no replacement for AdaptiveAvgPool3d, only for 2-d averages"),
        (nn.LazyConv2d(4, 1), "it is not initialised: run the model once, then patch"),
        (timm.layers.Conv2dSame(4, 4, 3), "Conv2dSame has a forward of its own"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_what_is_left_alone_says_why(module, reason):
    original = type(module)
    patched, said = reasons(nn.Sequential(module))["0"]
    assert not patched
    assert said.startswith(reason)
    assert type(module) is original


def test_a_forward_of_the_instance_is_respected():
    conv = nn.Conv2d(1, 1, 1)
    conv.forward = lambda x: x
    assert reasons(nn.Sequential(conv))["0"] == (
        False,
        "its forward was replaced on this instance",
    )


def with_call(base: type[nn.Module], method: str = "__call__") -> type[nn.Module]:
    """A subclass whose call does more than its forward."""

    def call(self, *args):
        return 1 + getattr(base, method)(self, *args)

    return type(f"Called{base.__name__}", (base,), {method: call})


@pytest.mark.parametrize("method", ["__call__", "_call_impl", "_wrapped_call_impl"])
@pytest.mark.parametrize(
    ("base", "arguments"),
    [(nn.BatchNorm2d, (4,)), (nn.Conv2d, (4, 4, 1)), (nn.AvgPool2d, (1,)), (nn.LayerNorm, (8,))],
)
def test_a_call_of_its_own_is_respected(base, arguments, method):
    module = with_call(base, method)(*arguments)
    model = nn.Sequential(module, nn.ReLU()).eval().requires_grad_(False)
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    expected = model(x)
    patched, said = reasons(model)["0"]
    assert not patched
    assert said == f"Called{base.__name__} has a {method} of its own"
    patch_visual(model, min_elements=0)
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("method", ["forward", "_conv_forward", "_call_impl"])
@pytest.mark.parametrize("patched_first", [False, True])
def test_methods_of_the_instance_are_respected(patched_first, method):
    conv, norm = nn.Conv2d(4, 16, 1, bias=False), nn.BatchNorm2d(16)
    model = nn.Sequential(conv, norm, nn.ReLU()).eval()
    conv.requires_grad_(False)
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()

    def replace() -> None:
        original = getattr(conv, method)
        setattr(conv, method, lambda *arguments: 2 * original(*arguments))

    if patched_first:
        patch_visual(model, min_elements=0)
        replace()
    else:
        replace()
        handle = patch_visual(model, min_elements=0)
        assert handle.report.sites[0].reason == f"its {method} was replaced on this instance"
        assert type(conv) is nn.Conv2d
    wide = 2 * nn.functional.conv2d(x, conv.weight)
    expected = (wide / (1 + norm.eps) ** 0.5).relu()
    torch.testing.assert_close(model(x), expected)


class Final(nn.BatchNorm2d):
    def __init_subclass__(cls, **options):
        raise TypeError("Final is final")


class FinalSequence(nn.Sequential):
    def __init_subclass__(cls, **options):
        raise RuntimeError("no subclass of a sequence")


class Registered(type):
    def __new__(cls, name, bases, body):
        if name.startswith("Patched"):
            raise ValueError("not in the registry")
        return super().__new__(cls, name, bases, body)


class InRegistry(nn.Conv2d, metaclass=Registered):
    pass


class Locked(nn.AvgPool2d):
    def __setattr__(self, name, value):
        if name == "__class__":
            raise AttributeError("locked")
        super().__setattr__(name, value)


def test_a_class_that_refuses_subclasses_is_left_alone():
    model = FinalSequence(
        nn.Conv2d(3, 4, 3), Final(4), nn.ReLU(), InRegistry(4, 4, 1), Locked(2), nn.BatchNorm2d(4)
    ).eval()
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = model(x)
    before = [type(module) for module in model.modules()]
    handle = patch_visual(model, min_elements=0)
    assert [(site.patched, site.reason) for site in handle.report.sites] == [
        (True, "saves no input while its weight is frozen"),
        (False, "Final cannot be replaced by a subclass (TypeError: Final is final)"),
        (False, "InRegistry cannot be replaced by a subclass (ValueError: not in the registry)"),
        (False, "Locked cannot be replaced by a subclass (AttributeError: locked)"),
        (True, "fused, no ReLU known to follow"),
    ]
    torch.testing.assert_close(model(x), expected)
    handle.undo()
    assert all(type(m) is cls for m, cls in zip(model.modules(), before, strict=True))


def test_an_error_on_the_way_leaves_nothing_patched(monkeypatch):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    before = [type(module) for module in model.modules()]
    monkeypatch.setattr(apply, "block_of", lambda module: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        patch_visual(model)
    assert all(type(m) is cls for m, cls in zip(model.modules(), before, strict=True))


def test_batch_norm_act_says_what_is_fused():
    from timm.layers import BatchNormAct2d

    model = nn.Sequential(
        BatchNormAct2d(4), BatchNormAct2d(4, apply_act=False), BatchNormAct2d(4, act_layer=nn.SiLU)
    )
    assert [reason for _, reason in reasons(model).values()] == [
        "fused with its ReLU",
        "fused, it has no activation",
        "fused, not with its SiLU",
    ]


def test_a_block_from_another_version_of_its_library_is_not_fused():
    from open_clip.modified_resnet import Bottleneck

    model = Bottleneck(16, 4)
    model.gate = nn.Identity()
    patch_visual(model)
    assert type(model) is Bottleneck


def test_a_module_itself_and_one_without_sites():
    (site,) = patch_visual(nn.BatchNorm2d(4).eval()).report.sites
    assert (site.name, site.patched) == ("", True)
    assert "no norm, convolution or pool was found" in str(patch_visual(nn.Linear(2, 2)).report)
