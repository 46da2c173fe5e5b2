"""Images and labels from the disk: folders, lists and the paper's data sets.

Here are the choices of how images are read, without PIL and PyTorch, so that options can be checked
before either is imported. Everything else is imported from its module, e.g.
``from ueo_fast.finetune.data.image_list import read_images``.
"""

from __future__ import annotations

import os
from typing import Literal, get_args

from ueo_fast.ranges import check_one_of

Decoding = Literal["auto", "full"]
"""``auto``: views are made from a copy with twice the model's pixels per side, for which a JPEG is
decoded at 1/2, 1/4 or 1/8 of its size; ``full``: from all pixels."""


def check_decode(decode: object) -> None:
    """Raise ``ValueError`` unless ``decode`` is a :data:`Decoding`."""
    check_one_of("decode", decode, get_args(Decoding))


def check_cache(cache: object, decode: Decoding) -> None:
    """Check where copies are kept: ``auto``, ``off`` or a folder.

    Raises:
        TypeError: ``cache`` is neither text nor a path.
        ValueError: it is empty, or a folder although ``decode`` is ``full``.
    """
    if not isinstance(cache, str | os.PathLike):
        raise TypeError(f"cache must be 'auto', 'off', or a folder, got {cache!r}")
    if cache == "":
        raise ValueError("cache is empty: it is 'auto', 'off', or a folder")
    if decode == "full" and cache not in ("auto", "off"):
        raise ValueError(
            f"cache={os.fspath(cache)!r} keeps small copies of images, but decode='full' makes "
            "views of all pixels: leave out one of the two"
        )
