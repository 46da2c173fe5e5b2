"""From RGB images to what a CLIP model takes, in training and in testing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from open_clip.transform import image_transform
from PIL import Image
from torch import Tensor, nn
from torchvision import transforms
from torchvision.transforms import InterpolationMode

Transform = Callable[[Image.Image], Tensor]

_DEFAULTS: dict[str, Any] = {
    "mean": OPENAI_DATASET_MEAN,
    "std": OPENAI_DATASET_STD,
    "interpolation": "bicubic",
    "resize_mode": "shortest",
    "fill_color": 0,
}


def preprocessing(model: nn.Module) -> dict[str, Any]:
    """How ``model`` wants its images: size, mean, std, interpolation, resize_mode, fill_color.

    What open_clip's factory noted at the visual tower (``preprocess_cfg``); the rest, or all of it
    for a model made by hand, as OpenAI's CLIP at the tower's ``image_size``.

    Raises:
        ValueError: the model says nothing about the size of its images.
    """
    visual: Any = getattr(model, "visual", None)
    config = dict(getattr(visual, "preprocess_cfg", None) or {})
    size = config.get("size", getattr(visual, "image_size", None))
    if size is None:
        raise ValueError(
            f"{type(model).__name__} has neither visual.preprocess_cfg nor visual.image_size, so "
            "the size of its images is unknown; make it with open_clip's factory"
        )
    return {**_DEFAULTS, **config, "size": size}


def training_transform(preprocess: Mapping[str, Any]) -> Transform:
    """The authors' augmentation at the model's size: a random crop of half to all of the area, with
    an aspect ratio of 3/4 to 4/3, resized; then a flip for every second image.

    Args:
        preprocess: from :func:`preprocessing` or open_clip's ``model.visual.preprocess_cfg``.
            ``resize_mode`` plays no part: the crop is brought to the size as it is.

    Source: authors' ``demo.py``, ``image_clip_train``.
    """
    config = {**_DEFAULTS, **preprocess}
    bilinear = config["interpolation"] == "bilinear"
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(
                config["size"],
                scale=(0.5, 1.0),
                interpolation=(
                    InterpolationMode.BILINEAR if bilinear else InterpolationMode.BICUBIC
                ),
            ),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(config["mean"], config["std"]),
        ]
    )


def test_transform(preprocess: Mapping[str, Any]) -> Transform:
    """The model's own preprocessing: for CLIP the shorter side resized, then the centre cropped.

    Args:
        preprocess: from :func:`preprocessing` or open_clip's ``model.visual.preprocess_cfg``.
    """
    config = {**_DEFAULTS, **preprocess}
    return image_transform(
        config["size"],
        is_train=False,
        mean=config["mean"],
        std=config["std"],
        resize_mode=config["resize_mode"],
        interpolation=config["interpolation"],
        fill_color=config["fill_color"],
    )


test_transform.__test__ = False  # type: ignore[attr-defined]  # pytest goes by names
