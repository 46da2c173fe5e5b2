"""Small copies of images: all that the views of a model need of a photograph."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from ueo_fast.finetune.data.decode import OVERSAMPLING, Decoded, as_rgb, opened

Size = tuple[int, int]  # (width, height)

COPIES = "copies.sqlite"
"""The file in which a folder keeps copies."""

_MOST_PIXELS = 2**26
"""From here on Pillow shrinks, slowly, as PyTorch would need the pixels in memory a second time."""


class Picture(NamedTuple):
    """The pixels of an image, perhaps of a smaller copy of it.

    Attributes:
        pixels: (3, H, W) uint8 RGB, with the channels last in memory.
        size: (width, height) of the image itself.
    """

    pixels: Tensor
    size: Size

    def __reduce__(self) -> tuple[Any, ...]:
        # As an array: of a tensor, a process that is sent it keeps a file open.
        return _from_array, (self.pixels.permute(1, 2, 0).numpy(), self.size)


def _from_array(pixels: NDArray[np.uint8], size: Size) -> Picture:
    return Picture(torch.from_numpy(pixels).permute(2, 0, 1), size)


def read_picture(path: str | os.PathLike[str], view: Size) -> Picture:
    """A copy of an image file: twice as large per side as views need it, or the image's own size.

    JPEG is decoded at the smallest size that leaves twice the pixels per side; the rest is resized
    (bicubic, antialiased).

    Args:
        path: of the file.
        view: (width, height) that the model takes; the copy covers it twice per side.

    Raises:
        UnreadableImageError: the file cannot be decoded.
    """
    with opened(path) as encoded:
        shrink = _shrink(encoded.size, view)
        return _shrunk(encoded.decode(shrink), encoded.size, shrink)


def as_picture(image: Image.Image, name: str, view: Size) -> Picture:
    """As :func:`read_picture`, of an image that PIL has opened; errors name ``name``."""
    whole = as_rgb(image, name)
    return _shrunk(Decoded(whole), whole.size, _shrink(whole.size, view))


def remove_copies(folder: Path) -> None:
    """Delete the copies in a folder, and the folder if nothing else is in it."""
    for name in (COPIES, f"{COPIES}-journal"):
        (folder / name).unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        folder.rmdir()


def _shrink(size: Size, view: Size) -> float:
    return max(
        1.0, min(side / needed for side, needed in zip(size, view, strict=True)) / OVERSAMPLING
    )


def _shrunk(decoded: Decoded, size: Size, shrink: float) -> Picture:
    image = decoded.image
    width, height = (max(1, round(side / shrink)) for side in size)
    box = decoded.box(size)
    if shrink == 1:
        return _from_array(np.array(image), size)
    if box != (0, 0, *image.size) or image.width * image.height > _MOST_PIXELS:
        # A reduced image's sides are rounded up, so the whole one may end between its pixels.
        shrunk = image.resize((width, height), Image.Resampling.BICUBIC, box)
        return _from_array(np.array(shrunk), size)
    pixels = _from_array(np.array(image), size).pixels
    return Picture(functional.resize(pixels, [height, width], InterpolationMode.BICUBIC), size)
