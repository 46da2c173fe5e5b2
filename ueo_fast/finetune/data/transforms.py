"""From RGB images to what a CLIP model takes, in training and in testing."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from open_clip.transform import image_transform
from PIL import Image
from torch import Tensor, nn
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from ueo_fast.finetune.data.decode import OVERSAMPLING, Decoded

Size = tuple[int, int]  # (width, height)

_DEFAULTS: dict[str, Any] = {
    "mean": OPENAI_DATASET_MEAN,
    "std": OPENAI_DATASET_STD,
    "interpolation": "bicubic",
    "resize_mode": "shortest",
    "fill_color": 0,
}


@dataclass(frozen=True)
class View:
    """What a transform makes of one image: a box of it is resized; then comes ``finish``.

    Attributes:
        box: (left, top, right, bottom) in pixels of the whole image.
        size: what the box is resized to.
        resample: how.
        finish: from the resized image to a tensor.
    """

    box: tuple[int, int, int, int]
    size: Size
    resample: Image.Resampling
    finish: Callable[[Image.Image], Tensor]

    @property
    def max_reduction(self) -> float:
        """How many times smaller the image may be decoded, per side, so that the box keeps at least
        twice the pixels of ``size``."""
        left, top, right, bottom = self.box
        width, height = self.size
        return min((right - left) / width, (bottom - top) / height) / OVERSAMPLING

    def of(self, decoded: Decoded) -> Tensor:
        """The view of an image that was decoded whole or reduced."""
        image, reduction, x, y = decoded
        left, top, right, bottom = (side / reduction for side in self.box)
        box = (left + x, top + y, right + x, bottom + y)
        # Cut first, as a crop does: pixels beyond the box take no part in resizing.
        outer = (int(box[0]), int(box[1]), math.ceil(box[2]), math.ceil(box[3]))
        if outer != (0, 0, *image.size):
            image = image.crop(outer)
        x, y = outer[:2]
        inner = (box[0] - x, box[1] - y, box[2] - x, box[3] - y)
        return self.finish(image.resize(self.size, self.resample, inner))


class Transform(ABC):
    """From an RGB image to a tensor, by way of a :class:`View`."""

    @abstractmethod
    def view(self, size: Size) -> View:
        """What is seen of an image of ``size``; random numbers are drawn here, if there are any,
        and by ``finish``."""

    def __call__(self, image: Image.Image) -> Tensor:
        return self.view(image.size).of(Decoded(image))


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
    return _Training({**_DEFAULTS, **preprocess})


def test_transform(preprocess: Mapping[str, Any]) -> Transform:
    """The model's own preprocessing: for CLIP the shorter side resized, then the centre cropped.

    Args:
        preprocess: from :func:`preprocessing` or open_clip's ``model.visual.preprocess_cfg``.
    """
    return _Testing({**_DEFAULTS, **preprocess})


test_transform.__test__ = False  # type: ignore[attr-defined]  # pytest goes by names


class _Training(Transform):
    def __init__(self, config: Mapping[str, Any]) -> None:
        bilinear = config["interpolation"] == "bilinear"
        mode = InterpolationMode.BILINEAR if bilinear else InterpolationMode.BICUBIC
        self._crop = transforms.RandomResizedCrop(
            config["size"], scale=(0.5, 1.0), interpolation=mode
        )
        self._finish = transforms.Compose(
            [
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(config["mean"], config["std"]),
            ]
        )

    def view(self, size: Size) -> View:
        width, height = size
        # Only the shape is looked at.
        shaped = torch.empty(0, height, width, device="cpu")
        top, left, rows, columns = self._crop.get_params(
            shaped, list(self._crop.scale), list(self._crop.ratio)
        )
        box = (left, top, left + columns, top + rows)
        return View(box, self._crop.size[::-1], _resample(self._crop), self._finish)


class _Testing(Transform):
    def __init__(self, config: Mapping[str, Any]) -> None:
        size = config["size"]
        self._size: Size = (size, size) if isinstance(size, int) else tuple(size)[::-1]
        self._mode = config["resize_mode"]
        # Of its steps the first resizes.
        self._resize, *finish = image_transform(
            config["size"],
            is_train=False,
            mean=config["mean"],
            std=config["std"],
            resize_mode=config["resize_mode"],
            interpolation=config["interpolation"],
            fill_color=config["fill_color"],
        ).transforms
        self._finish = transforms.Compose(finish)

    def view(self, size: Size) -> View:
        return View((0, 0, *size), self._resized(size), _resample(self._resize), self._finish)

    def _resized(self, size: Size) -> Size:
        """What open_clip resizes an image of ``size`` to; a view of a reduced image needs to know
        that of the whole one."""
        if self._mode == "squash":
            return self._size
        (width, height), (columns, rows) = size, self._size
        if self._mode == "shortest" and columns == rows:  # torchvision's: rounded down
            return columns * width // min(size), rows * height // min(size)
        ratio = (max if self._mode == "longest" else min)(width / columns, height / rows)
        return round(width / ratio), round(height / ratio)


def _resample(step: Any) -> Image.Resampling:
    return Image.Resampling[step.interpolation.name]
