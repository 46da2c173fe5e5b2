"""Small JPEGs of the images that a report shows, kept in the run folder.

A run makes them at its end, when it has just read its own images. A report only reads them back, so
that it never opens a file that a run folder names: such a folder may come from somebody else.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from PIL import Image

from ueo_fast.finetune.data.decode import OVERSAMPLING, UnreadableImageError, opened
from ueo_fast.finetune.data.names import printable
from ueo_fast.finetune.files.run_folder import RunFolder
from ueo_fast.finetune.report.predictions import read_predictions

THUMBNAILS = "thumbnails.json"

LONGEST_SIDE = 160
"""Pixels; of some 6 kB each, two dozen leave the page small."""

MOST_BYTES = 100_000
"""Of one JPEG: more than any that is made here, and little enough for a page."""


@dataclass(frozen=True)
class Thumbnail:
    """An image as a report shows it.

    Attributes:
        jpeg: the file, base64; empty where the image cannot be shown.
        width: pixels; 0 without ``jpeg``.
        height: the same.
        reason: why it cannot be shown; else empty.
    """

    jpeg: str
    width: int
    height: int
    reason: str


def write_thumbnails(folder: RunFolder, paths: Sequence[str], known: Iterable[str]) -> None:
    """Keep a thumbnail of each image that a report of the run will show.

    Args:
        folder: of a run that has just written its ``predictions.csv``.
        paths: of the images in it, as the run opened them.
        known: names of the known classes.
    """
    predictions = read_predictions(folder.path / "predictions.csv", frozenset(known))
    by_name = {printable(path): path for path in paths}
    shown = (*predictions.likely_unknown, *predictions.most_confident)
    folder.write_json(
        THUMBNAILS, {one.path: asdict(_thumbnail(by_name[one.path])) for one in shown}
    )


def read_thumbnail(value: Mapping[str, Any]) -> Thumbnail:
    """One value of ``thumbnails.json``.

    Raises:
        KeyError, TypeError, ValueError: it is not one.
    """
    jpeg, reason = value["jpeg"], value["reason"]
    if not isinstance(jpeg, str) or not isinstance(reason, str):
        raise TypeError(f"jpeg={jpeg!r:.50} and reason={reason!r:.50} must be text")
    if len(base64.b64decode(jpeg, validate=True)) > MOST_BYTES:
        raise ValueError(f"a thumbnail has more than {MOST_BYTES} bytes")
    for name in ("width", "height"):
        if type(value[name]) is not int or not 0 <= value[name] <= LONGEST_SIDE:
            raise ValueError(f"{name} is {value[name]!r:.50}, expected 0 to {LONGEST_SIDE}")
    return Thumbnail(jpeg, value["width"], value["height"], reason)


def _thumbnail(path: str) -> Thumbnail:
    try:
        with opened(path) as encoded:
            image = encoded.decode(max(encoded.size) / (OVERSAMPLING * LONGEST_SIDE)).image
    except UnreadableImageError as error:
        return Thumbnail("", 0, 0, error.reason)
    image.thumbnail((LONGEST_SIDE, LONGEST_SIDE), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    # Without what the file carries besides its pixels: a place, a name, a colour profile.
    image.info.clear()
    image.save(file, "JPEG", quality=80, optimize=True)
    return Thumbnail(base64.b64encode(file.getvalue()).decode(), image.width, image.height, "")
