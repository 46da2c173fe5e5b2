"""A folder as users have them: odd names, odd files, class folders; the pictures are digits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ueo_fast.finetune.demo.digits import DIGIT_NAMES, load_digits

KNOWN = ("zero", "one", "two", "three", "four", "five")
CORRUPT = "two/broken éü 猫.jpg"
ODD = {
    "greyscale": "zero/grey.png",
    "CMYK": "one/print shop, final (2).JPG",
    "16 bit": "two/scan'16.png",
    "palette": "three/palette.gif",
    "transparent": "six/glass.png",
    "rotated": "four/phone.jpeg",
}


def photo_folder(folder: Path, per_class: int = 6, *, unknown: int = 2) -> Path:
    """Fill ``folder`` with class folders of digits; returns it.

    ``zero`` to ``five`` and ``unknown`` further digits, ``per_class`` images each; one image of
    each kind in :data:`ODD`, one that is :data:`CORRUPT`, an empty class folder, and files that are
    no images.
    """
    digits = load_digits()
    for label, name in enumerate(DIGIT_NAMES[: len(KNOWN) + unknown]):
        (folder / name).mkdir(parents=True)
        rows = torch.nonzero(digits.labels == label)[:per_class, 0].tolist()
        for row in rows:
            picture(digits.images[row]).save(folder / name / f"IMG {row:04d}, größe.png")
    some = picture(digits.images[0])
    some.convert("L").save(folder / ODD["greyscale"])
    some.convert("CMYK").save(folder / ODD["CMYK"], format="JPEG")
    levels = np.asarray(some.convert("L")).astype(np.uint16) * 257
    Image.fromarray(levels).save(folder / ODD["16 bit"])
    some.convert("P").save(folder / ODD["palette"])
    if unknown:
        some.convert("RGBA").save(folder / ODD["transparent"])
    exif = Image.Exif()
    exif[0x0112] = 6
    some.save(folder / ODD["rotated"], exif=exif)
    (folder / CORRUPT).write_bytes(b"\xff\xd8\xff\xe0 not a photograph")
    (folder / "empty class").mkdir()
    (folder / "zero" / ".DS_Store").write_bytes(b"\0\0\0\1")
    (folder / "zero" / "notes.txt").write_text("no image")
    return folder


def picture(image: torch.Tensor) -> Image.Image:
    """From (3, H, W) in [-1, 1]."""
    pixels = ((image + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())
