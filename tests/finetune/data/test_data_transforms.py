"""Transforms: the model's own for testing, the authors' augmentation for training."""

from __future__ import annotations

import pickle
from collections.abc import Callable

import numpy as np
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform, image_transform_v2
from PIL import Image
from torch import nn
from torchvision import transforms as tv

from ueo_fast.finetune.data import transforms
from ueo_fast.finetune.data.loader import seeded
from ueo_fast.finetune.demo.tiny_clip import tiny_clip

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def photo(width: int = 60, height: int = 40) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def normalized(
    pixels: torch.Tensor,
    mean: tuple[float, ...] = CLIP_MEAN,
    std: tuple[float, ...] = CLIP_STD,
    **_: object,
) -> torch.Tensor:
    return transforms.normalize(pixels, torch.tensor(mean), torch.tensor(std))


def config(**values: object) -> dict[str, object]:
    return {**vars(PreprocessCfg()), "size": 32, **values}


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"size": (32, 32), "interpolation": "bilinear", "mean": (0.5,) * 3, "std": (0.5,) * 3},
        {"resize_mode": "squash"},
        {"resize_mode": "longest", "fill_color": 7},
        {"size": (32, 48)},
    ],
)
def test_testing_is_open_clips_own_preprocessing(values: dict[str, object]) -> None:
    wanted = image_transform_v2(PreprocessCfg(**config(**values)), is_train=False)(photo())
    found = transforms.test_transform(config(**values))(photo())
    assert torch.equal(normalized(found, **values), wanted)


def test_testing_is_the_authors_for_clip() -> None:
    authors = tv.Compose(
        [
            tv.Resize(32, interpolation=tv.InterpolationMode.BICUBIC),
            tv.CenterCrop(32),
            tv.ToTensor(),
            tv.Normalize(CLIP_MEAN, CLIP_STD),
        ]
    )
    found = transforms.test_transform({"size": 32})(photo())
    assert torch.equal(normalized(found), authors(photo()))


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_training_is_the_authors_augmentation(interpolation: str) -> None:
    authors = tv.Compose(
        [
            tv.RandomResizedCrop(
                32, scale=(0.5, 1), interpolation=tv.InterpolationMode(interpolation)
            ),
            tv.RandomHorizontalFlip(p=0.5),
            tv.ToTensor(),
            tv.Normalize(CLIP_MEAN, CLIP_STD),
        ]
    )
    ours = transforms.training_transform(config(interpolation=interpolation))
    drawn = []
    for seed in range(5):
        with seeded(seed):
            wanted = authors(photo())
        with seeded(seed):
            drawn.append(normalized(ours(photo())))
        assert torch.equal(drawn[-1], wanted)
    assert not torch.equal(drawn[0], drawn[1])


def test_the_model_says_how_it_wants_its_images() -> None:
    model = tiny_clip("vit", seed=0)
    assert transforms.preprocessing(model) == {
        "size": (32, 32),
        "mean": CLIP_MEAN,
        "std": CLIP_STD,
        "interpolation": "bicubic",
        "resize_mode": "shortest",
        "fill_color": 0,
    }
    model.visual.preprocess_cfg = {"size": 48, "mean": (0.5,) * 3, "resize_mode": "squash"}
    found = transforms.preprocessing(model)
    assert (found["size"], found["mean"], found["std"]) == (48, (0.5,) * 3, CLIP_STD)
    assert transforms.test_transform(found)(photo()).shape == (3, 48, 48)
    assert transforms.training_transform(found)(photo()).shape == (3, 48, 48)


def test_a_model_that_says_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Linear has neither visual\.preprocess_cfg nor"):
        transforms.preprocessing(nn.Linear(2, 2))


def test_the_default_of_the_factory_is_what_we_assume() -> None:
    assert {**vars(PreprocessCfg()), "size": 0} == {
        **transforms._DEFAULTS,
        "size": 0,
        "mode": "RGB",
    }


@pytest.mark.parametrize("make", [transforms.test_transform, transforms.training_transform])
def test_transforms_can_be_sent_to_workers(make: Callable[..., transforms.Transform]) -> None:
    """By pickling, where workers are not forked."""
    transform = make({"size": 32})
    again = pickle.loads(pickle.dumps(transform))
    with seeded(0):
        wanted = transform(photo())
    with seeded(0):
        assert torch.equal(again(photo()), wanted)


@pytest.mark.parametrize(
    ("mean", "std"), [(0.5, 0.25), (None, None), ([0, 0, 0], [1, 1, 1]), ([0.4], [0.2])]
)
def test_statistics_are_what_open_clip_takes(mean: object, std: object) -> None:
    model = nn.Module()
    model.visual = nn.Module()
    model.visual.preprocess_cfg = {"size": 32, "mean": mean, "std": std}
    whole = image_transform(32, is_train=False, mean=mean, std=std)
    pixels = transforms.test_transform(transforms.preprocessing(model))(photo())
    statistics = transforms.pixel_statistics(model)
    assert [value.shape for value in statistics] == [(3,), (3,)]
    assert torch.equal(transforms.normalize(pixels, *statistics), whole(photo()))
