"""Which parameters count as the visual tower's normalisation affines."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from ueo_fast.patch import affine_parameters, freeze_all_but_affine, patch_visual

open_clip = pytest.importorskip("open_clip")
timm = pytest.importorskip("timm")


def full_size(name: str) -> nn.Module:
    """A published model without memory for its weights."""
    config = open_clip.get_model_config(name)
    config.pop("custom_text", None)
    with torch.device("meta"):
        return open_clip.model.CLIP(**config)


def with_visual(visual: nn.Module) -> nn.Module:
    model = nn.Module()
    model.visual = visual
    model.ln_final = nn.LayerNorm(4)  # a text norm, which is never to be found
    return model


def with_timm(name: str) -> nn.Module:
    return with_visual(open_clip.timm_model.TimmModel(name, embed_dim=8, image_size=64))


def count(parameters: dict[str, nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters.values())


@pytest.mark.parametrize(
    ("name", "scope", "expected"),
    [
        ("RN50", "all", 53_248),
        ("RN50", "authors", 45_568),
        ("ViT-B-16", "all", 39_936),
        ("ViT-B-16", "authors", 39_936),
    ],
)
def test_counts_of_the_published_towers(name: str, scope: str, expected: int) -> None:
    assert count(affine_parameters(full_size(name), scope)) == expected


def test_the_authors_rule_misses_exactly_the_downsampling_paths_of_rn50() -> None:
    model = full_size("RN50")
    missed = set(affine_parameters(model)) - set(affine_parameters(model, "authors"))
    assert missed == {
        f"visual.layer{layer}.0.downsample.1.{kind}"
        for layer in (1, 2, 3, 4)
        for kind in ("weight", "bias")
    }


def test_names_and_order_are_the_models_own() -> None:
    model = full_size("ViT-B-16")
    own = dict(model.named_parameters())
    for scope in ("all", "authors"):
        found = affine_parameters(model, scope)
        assert list(found) == [name for name in own if name in found]
        assert all(own[name] is parameter for name, parameter in found.items())
    assert not any(name.startswith(("ln_final", "transformer")) for name in found)


def test_timm_transformer_has_affines_by_type_and_none_by_name() -> None:
    model = with_timm("test_vit")
    expected = [
        name
        for name, _ in model.named_parameters()
        if name.startswith("visual.") and "norm" in name
    ]
    assert list(affine_parameters(model)) == expected
    assert len(expected) >= 8
    with pytest.raises(
        ValueError, match=r"scope='authors' finds no affine.*TimmModel.*scope='all'"
    ):
        affine_parameters(model, "authors")


@pytest.mark.parametrize(
    "name", ["test_convnext", "test_resnet", "test_efficientnet_evos", "test_nfnet"]
)
def test_only_vectors_are_found_in_timm_towers(name: str) -> None:
    """A matrix among them would mean that a weight was taken for a normalisation affine."""
    model = with_timm(name)
    if name == "test_nfnet":  # normaliser-free
        with pytest.raises(ValueError, match=r"scope='all' finds no affine.*train the prompt only"):
            affine_parameters(model)
        return
    found = affine_parameters(model)
    assert found
    assert all(parameter.ndim == 1 for parameter in found.values())


def timm_norms() -> Iterator[type[nn.Module]]:
    from timm.layers.create_norm import _NORM_MAP
    from timm.layers.create_norm_act import _NORM_ACT_MAP

    for cls in {*_NORM_MAP.values(), *_NORM_ACT_MAP.values()}:
        if isinstance(cls, type):
            yield cls


@pytest.mark.parametrize("cls", sorted(timm_norms(), key=lambda cls: cls.__name__))
def test_every_norm_that_timm_can_build(cls: type[nn.Module]) -> None:
    norm = cls(32)
    own = [norm.get_parameter(name) for name in ("weight", "bias") if name in norm._parameters]
    model = with_visual(nn.Sequential(nn.Linear(8, 8), norm, nn.BatchNorm1d(8)))
    found = affine_parameters(model)
    assert [id(p) for p in found.values()] == [
        *map(id, own),
        *map(id, model.visual[2].parameters()),
    ]


def test_every_norm_of_torch() -> None:
    norms = [
        nn.BatchNorm1d(4),
        nn.BatchNorm2d(4),
        nn.BatchNorm3d(4),
        nn.SyncBatchNorm(4),
        nn.LayerNorm((2, 4)),
        nn.GroupNorm(2, 4),
        nn.InstanceNorm2d(4, affine=True),
        nn.RMSNorm(4),
    ]
    without_affine = [nn.BatchNorm2d(4, affine=False), nn.InstanceNorm2d(4)]
    others = [nn.Linear(4, 4), nn.Conv2d(4, 4, 1), nn.Embedding(4, 4), nn.PReLU(4)]
    model = with_visual(nn.Sequential(*others, *norms, *without_affine))
    found = affine_parameters(model)
    expected = [parameter for norm in norms for parameter in norm.parameters()]
    assert list(map(id, found.values())) == list(map(id, expected))


def test_a_shared_norm_occurs_once() -> None:
    shared = nn.LayerNorm(4)
    tied = nn.LayerNorm(4)
    tied.weight = shared.weight
    found = affine_parameters(with_visual(nn.Sequential(shared, nn.ReLU(), shared, tied)))
    assert list(found) == ["visual.0.weight", "visual.0.bias", "visual.3.bias"]


@pytest.mark.parametrize("scope", ["all", "authors"])
def test_freezing_leaves_exactly_the_affines_trainable(scope: str) -> None:
    model = open_clip.create_model(
        "RN50",
        pretrained=None,
        vision_cfg={"layers": [1, 1, 1, 1], "width": 8, "image_size": 32},
        text_cfg={"width": 16, "heads": 2, "layers": 1, "vocab_size": 32},
        embed_dim=16,
    )
    next(model.parameters()).requires_grad_(False)
    model.visual.bn1.weight.requires_grad_(False)
    trained = freeze_all_but_affine(model, scope)
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trainable == list(trained) == list(affine_parameters(model, scope))
    model.eval()
    model.encode_image(torch.randn(2, 3, 32, 32)).square().sum().backward()
    with_gradient = [name for name, p in model.named_parameters() if p.grad is not None]
    assert with_gradient == trainable


def test_unknown_scope_is_refused_and_changes_nothing() -> None:
    model = with_visual(nn.Sequential(nn.LayerNorm(4)))
    with pytest.raises(ValueError, match=r"scope='bn' is unknown: choose one of all, authors"):
        freeze_all_but_affine(model, "bn")
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_model_without_visual_tower_is_the_tower_itself() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    assert list(affine_parameters(model)) == ["1.weight", "1.bias"]
    assert list(affine_parameters(model[1])) == ["weight", "bias"]


def test_neither_visual_tower_nor_norm_is_refused() -> None:
    with pytest.raises(
        TypeError, match=r"model is a Linear without a visual tower.*open_clip model"
    ):
        affine_parameters(nn.Linear(2, 2))


def test_a_patch_changes_nothing() -> None:
    model = with_timm("test_convnext")
    before = affine_parameters(model)
    patch_visual(model)
    after = affine_parameters(model)
    assert after.groups == before.groups
    assert list(after) == list(before)
    assert all(after[name] is parameter for name, parameter in before.items())


def test_the_summary_counts_by_type() -> None:
    model = with_visual(nn.Sequential(nn.BatchNorm2d(1000), nn.LayerNorm(4), nn.LayerNorm(4)))
    assert affine_parameters(model).summary().splitlines() == [
        "scope='all': 2,016 numbers in 6 tensors",
        "  BatchNorm2d: 2,000 numbers in 2 tensors",
        "  LayerNorm: 16 numbers in 4 tensors",
    ]


def test_tower_without_norms_is_refused_and_changes_nothing() -> None:
    model = with_visual(nn.Sequential(nn.Linear(4, 4)))
    with pytest.raises(
        ValueError, match=r"scope='all' finds no.*Sequential; train the prompt only"
    ):
        freeze_all_but_affine(model)
    assert all(parameter.requires_grad for parameter in model.parameters())


class HuggingFaceLike(nn.Module):
    """The names of transformers' CLIPModel."""

    def __init__(self) -> None:
        super().__init__()
        self.text_model = nn.Sequential(nn.Embedding(4, 4), nn.LayerNorm(4))
        self.vision_model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
        self.text_projection = nn.Linear(4, 4, bias=False)


class Lightning(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.clip = model
        self.head = nn.LayerNorm(4)


WRAPPERS = {
    "nothing": (lambda model: model, ""),
    "DataParallel": (nn.DataParallel, "module."),
    "compile": (lambda model: torch.compile(model, backend="eager"), "_orig_mod."),
    "both": (
        lambda model: nn.DataParallel(torch.compile(model, backend="eager")),
        "module._orig_mod.",
    ),
    "Lightning": (Lightning, "clip."),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("kind", ["open_clip", "HuggingFace"])
def test_the_image_tower_is_found_in_wrappers(kind: str, wrapper: str) -> None:
    wrap, prefix = WRAPPERS[wrapper]
    if kind == "open_clip":
        inner, tower = with_visual(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))), "visual"
    else:
        inner, tower = HuggingFaceLike(), "vision_model"
    model = wrap(inner)
    trained = freeze_all_but_affine(model)
    expected = [f"{prefix}{tower}.1.weight", f"{prefix}{tower}.1.bias"]
    assert list(trained) == expected
    assert [name for name, p in model.named_parameters() if p.requires_grad] == expected
    sites = patch_visual(model).report.sites
    assert [site.name for site in sites] == [f"{prefix}{tower}.1"]


def test_a_tower_under_two_names_is_one() -> None:
    model = nn.Module()
    model.clip = HuggingFaceLike()
    model.vision_model = model.clip.vision_model
    assert list(affine_parameters(model)) == [
        "clip.vision_model.1.weight",
        "clip.vision_model.1.bias",
    ]


def test_a_model_whose_image_tower_is_not_known_is_refused_and_left_alone() -> None:
    unknown = HuggingFaceLike()
    unknown.eyes = unknown.vision_model
    del unknown.vision_model
    twins = nn.ModuleDict({"student": HuggingFaceLike(), "teacher": HuggingFaceLike()})
    for model, message in (
        (unknown, r"HuggingFaceLike that has a text tower \(text_model\).*the image tower itself"),
        (twins, r"has 2 visual towers \(student.vision_model, teacher.vision_model\)"),
    ):
        with pytest.raises(TypeError, match=message):
            freeze_all_but_affine(model)
        assert all(parameter.requires_grad for parameter in model.parameters())


def test_hugging_faces_clip() -> None:
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    small["num_attention_heads"] = 2
    model = transformers.CLIPModel(
        transformers.CLIPConfig(
            text_config=small | {"vocab_size": 8},
            vision_config=small | {"image_size": 8, "patch_size": 4},
            projection_dim=8,
        )
    )
    trained = freeze_all_but_affine(model)
    assert trained
    assert all(name.startswith("vision_model.") for name in trained)
