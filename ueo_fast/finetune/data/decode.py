"""From an image file to RGB, whatever kind of file it is."""

from __future__ import annotations

import contextlib
import os
import stat

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from ueo_fast.finetune.data.names import printable

Levels = npt.NDArray[np.float64]

_MAX_ASPECT = 1000
"""Resizing enlarges the short side to the model's size, and the long side with it."""


class UnreadableImageError(ValueError):
    """An image file that cannot be decoded. It survives pickling, as workers send it on.

    Args:
        path: of the file.
        reason: what is wrong with it.
    """

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


def open_rgb(path: str | os.PathLike[str]) -> Image.Image:
    """Decode an image file as 8-bit RGB.

    The camera's orientation (EXIF) is applied. Grey, palette and CMYK are converted as Pillow does
    (Adobe's inverted CMYK included). What is transparent lies on white. Of an animation the first
    frame is taken. Grey levels of more than 8 bits are scaled, not clipped: those of 16 bits by
    257; integers of 32 bits as 16 bits where they fit, else from their own minimum and maximum to 0
    and 255; floating point from [0, 1] or [0, 255] where it fits, else from its own minimum and
    maximum.

    Raises:
        UnreadableImageError: the file is missing, empty, truncated, corrupt or not an image; it has
            more than ``2 * PIL.Image.MAX_IMAGE_PIXELS`` pixels, or sides of more than 1000 to 1
            (either would take gigabytes to decode or to resize).
    """
    try:
        mode = os.stat(path).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):  # reading one may wait for ever
            raise ValueError("a pipe, a socket or a device, and no file")
        with Image.open(path) as image:
            if max(image.size) > _MAX_ASPECT * min(image.size):
                raise ValueError(
                    f"sides of {image.width} x {image.height} pixels, more than {_MAX_ASPECT} to 1"
                )
            image.load()
            # Its EXIF may be broken where its pixels are not.
            with contextlib.suppress(Exception):
                ImageOps.exif_transpose(image, in_place=True)
            return _rgb(image)
    except MemoryError:  # says nothing about the file
        raise
    # On broken bytes Pillow's decoders raise anything: OSError, SyntaxError, struct.error, ...
    except Exception as error:
        raise UnreadableImageError(printable(path), _reason(path, error)) from error


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    if image.mode.startswith("I;16"):
        return _grey(np.asarray(image) / 257)
    if image.mode == "I":
        return _grey(_scaled(np.asarray(image).astype(np.float64), (65535,)))
    if image.mode == "F":
        return _grey(_scaled(np.asarray(image).astype(np.float64), (1, 255)))
    if image.has_transparency_data:
        opaque = Image.new("RGBA", image.size, "white")
        opaque.alpha_composite(image.convert("RGBA"))
        return opaque.convert("RGB")
    return image.convert("RGB")


def _scaled(levels: Levels, ranges: tuple[int, ...]) -> Levels:
    """Levels brought to [0, 255]: from 0 to the first of ``ranges`` that holds them all, else from
    their own minimum to their maximum."""
    if not np.isfinite(levels).all():
        raise ValueError("grey levels that are infinite or not a number")
    low, high = levels.min(), levels.max()
    for top in ranges:
        if low >= 0 and high <= top:
            return levels * (255 / top)
    halves = levels / 2 - low / 2  # the difference of two floats may be infinite
    return halves * (255 / halves.max()) if high > low else np.zeros_like(levels)


def _grey(levels: Levels) -> Image.Image:
    return Image.fromarray(np.rint(levels).astype(np.uint8)).convert("RGB")


def _reason(path: str | os.PathLike[str], error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        empty = os.path.getsize(path) == 0
        return "the file is empty" if empty else "no image in a format that Pillow knows"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    words = printable(str(error)).split()
    return " ".join(words) if words else type(error).__name__


def as_rgb(image: Image.Image, name: str) -> Image.Image:
    """As :func:`open_rgb`, of an image that is open already; it is not changed.

    Raises:
        UnreadableImageError: of ``name``; the image cannot be decoded.
    """
    try:
        image.load()
        with contextlib.suppress(Exception):
            image = ImageOps.exif_transpose(image)
        return _rgb(image)
    except MemoryError:
        raise
    except Exception as error:
        raise UnreadableImageError(name, _reason(name, error)) from error
