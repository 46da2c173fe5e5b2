"""Images in the page itself: small JPEGs as data URIs."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable
from dataclasses import dataclass

from PIL import Image

from ueo_fast.finetune.data.decode import UnreadableImageError, open_rgb
from ueo_fast.finetune.report.predictions import Prediction

LONGEST_SIDE = 160
"""Pixels; of some 6 kB each, two dozen leave the page small."""


@dataclass(frozen=True)
class Thumbnail:
    """An image with what was predicted.

    Attributes:
        prediction: of the image.
        uri: ``data:image/jpeg;base64,...``; ``None`` where the file cannot be shown.
        width: pixels; 0 without ``uri``.
        height: the same.
        reason: why it cannot be shown; else empty.
        verdict: ``right`` or ``wrong`` for an image of a known class, ``unknown`` for another,
            empty without a label.
    """

    prediction: Prediction
    uri: str | None
    width: int
    height: int
    reason: str
    verdict: str


def thumbnails(predictions: Iterable[Prediction], known: Iterable[str]) -> list[Thumbnail]:
    """One for each prediction; a file that is gone or broken has its reason instead of a picture.

    Args:
        predictions: a few of them: each file is decoded.
        known: names of the known classes.
    """
    known = frozenset(known)
    return [_thumbnail(one, known) for one in predictions]


def _thumbnail(one: Prediction, known: frozenset[str]) -> Thumbnail:
    verdict = ""
    if one.label is not None:
        right = "right" if one.label == one.adapted_class else "wrong"
        verdict = right if one.label in known else "unknown"
    try:
        image = open_rgb(one.path)
    except UnreadableImageError as error:
        return Thumbnail(one, None, 0, 0, error.reason, verdict)
    image.thumbnail((LONGEST_SIDE, LONGEST_SIDE), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    # Without what the file carries besides its pixels: a place, a name, a colour profile.
    image.info.clear()
    image.save(file, "JPEG", quality=80, optimize=True)
    uri = f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
    return Thumbnail(one, uri, image.width, image.height, "", verdict)
