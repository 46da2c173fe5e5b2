"""How images are read: what can be chosen. Without PIL and PyTorch, for the modules of options."""

from __future__ import annotations

import os
from typing import Literal, get_args

Decoding = Literal["auto", "full"]
"""``auto``: views are made from a copy with twice the model's pixels per side, for which a JPEG is
decoded at 1/2, 1/4 or 1/8 of its size; ``full``: from all pixels."""


def check_decode(decode: object) -> None:
    """Raise ``ValueError`` unless ``decode`` is a :data:`Decoding`."""
    if decode not in get_args(Decoding):
        raise ValueError(f"decode must be 'auto' or 'full', got {decode!r}")


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
