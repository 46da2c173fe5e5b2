"""From images to the pixels that a CLIP model takes, in training and in testing."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from open_clip.transform import image_transform
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional

from ueo_fast.finetune.data.copies import Picture, Size

_DEFAULTS: dict[str, Any] = {
    "mean": OPENAI_DATASET_MEAN,
    "std": OPENAI_DATASET_STD,
    "interpolation": "bicubic",
    "resize_mode": "shortest",
    "fill_color": 0,
}


class Transform(ABC):
    """From an image to the pixels that the model takes, uint8 (3, H, W); :func:`normalize` does
    the rest, on the device.

    Attributes:
        size: (width, height) of the result.
    """

    size: Size

    @abstractmethod
    def __call__(self, image: Image.Image) -> Tensor:
        """Transform a whole RGB image, exactly as the transform's source does."""

    @abstractmethod
    def of(self, picture: Picture) -> Tensor:
        """Transform a copy: the same view to within a few grey levels, resized by PyTorch, which is
        faster than Pillow."""


def normalize(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Float32 images from pixels, with the same roundings as torchvision's ``ToTensor`` and
    ``Normalize``.

    Args:
        images: (B, 3, H, W) uint8.
        mean: (3,) float32, of pixels between 0 and 1.
        std: (3,) float32.
    """
    mean, std = mean[:, None, None], std[:, None, None]
    return images.float().div_(255).sub_(mean).div_(std)


def pixel_statistics(model: nn.Module) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation, each (3,), with which ``model`` expects pixels normalised. As in
    open_clip, one number stands for all channels, and nothing for OpenAI's."""
    config = _config(model)
    values = [config[name] or _DEFAULTS[name] for name in ("mean", "std")]
    mean, std = (torch.tensor(value, dtype=torch.float32, device="cpu") for value in values)
    return mean.broadcast_to(3), std.broadcast_to(3)


def preprocessing(model: nn.Module) -> dict[str, Any]:
    """How ``model`` expects its images: size, mean, std, interpolation, resize_mode, fill_color.

    Read from the visual tower's ``preprocess_cfg``, which open_clip's factory sets. The rest, or
    everything for a model made by hand, is as for OpenAI's CLIP at the tower's ``image_size``.

    Raises:
        ValueError: the model says nothing about the size of its images.
    """
    config = _config(model)
    size = config.get("size", getattr(getattr(model, "visual", None), "image_size", None))
    if size is None:
        raise ValueError(
            f"{type(model).__name__} has neither visual.preprocess_cfg nor visual.image_size, so "
            "the size of its images is unknown; make it with open_clip's factory"
        )
    return {**config, "size": size}


def _config(model: nn.Module) -> dict[str, Any]:
    visual: Any = getattr(model, "visual", None)
    return {**_DEFAULTS, **(getattr(visual, "preprocess_cfg", None) or {})}


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
        with torch.device("cpu"):  # it makes a tensor, which workers use
            self._crop = v2.RandomResizedCrop(config["size"], scale=(0.5, 1.0), interpolation=mode)
        rows, columns = self._crop.size
        self.size = columns, rows
        self._finish = v2.Compose([v2.RandomHorizontalFlip(), v2.PILToTensor()])

    def __call__(self, image: Image.Image) -> Tensor:
        seen: Tensor = self._finish(self._crop(image))
        return seen

    def of(self, picture: Picture) -> Tensor:
        # Drawn as of the whole image, so that the crop is the same but for rounding.
        width, height = picture.size
        shape = torch.empty(0, height, width, device="cpu")
        drawn = self._crop.make_params([shape])
        rows, columns = picture.pixels.shape[1:]
        top, bottom = _rounded(drawn["top"], drawn["height"], rows / height)
        left, right = _rounded(drawn["left"], drawn["width"], columns / width)
        crop = picture.pixels[:, top:bottom, left:right]
        size, mode = list(self._crop.size), self._crop.interpolation
        seen: Tensor = self._finish(functional.resize(crop, size, mode))
        return seen


def _rounded(start: int, length: int, scale: float) -> tuple[int, int]:
    first = round(start * scale)
    return first, max(first + 1, round((start + length) * scale))


class _Testing(Transform):
    def __init__(self, config: Mapping[str, Any]) -> None:
        size = config["size"]
        self.size = (size, size) if isinstance(size, int) else tuple(size)[::-1]
        self._mode = config["resize_mode"]
        # Its steps: resize, perhaps crop or pad, RGB, ToTensor, Normalize.
        self._resize, *between, _, _ = image_transform(
            config["size"],
            is_train=False,
            mean=config["mean"],
            std=config["std"],
            resize_mode=config["resize_mode"],
            interpolation=config["interpolation"],
            fill_color=config["fill_color"],
        ).transforms
        self._finish = v2.Compose([*between, v2.PILToTensor()])

    def __call__(self, image: Image.Image) -> Tensor:
        seen: Tensor = self._finish(self._resize(image))
        return seen

    def of(self, picture: Picture) -> Tensor:
        columns, rows = self._resized(picture.size)
        pixels = functional.resize(picture.pixels, [rows, columns], self._resize.interpolation)
        seen: Tensor = self._finish(pixels)
        return seen

    def _resized(self, size: Size) -> Size:
        """What open_clip resizes an image of ``size`` to; a copy's own sides were rounded."""
        if self._mode == "squash":
            return self.size
        (width, height), (columns, rows) = size, self.size
        if self._mode == "shortest" and columns == rows:  # torchvision's: rounded down
            return columns * width // min(size), rows * height // min(size)
        ratio = (max if self._mode == "longest" else min)(width / columns, height / rows)
        return max(1, round(width / ratio)), max(1, round(height / ratio))
