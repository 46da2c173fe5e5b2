"""Names of files and classes, as they are shown and compared."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Sequence


def printable(path: str | os.PathLike[str]) -> str:
    """A path as valid Unicode: bytes of a file name that are not UTF-8 become ``\\xNN``."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def clean_name(name: str) -> str:
    """What of a class name tells it from others: ``Alarm_Clock`` and ``alarm clock`` are one."""
    # NFC, as macOS hands out folder names with accents as characters of their own.
    return " ".join(unicodedata.normalize("NFC", name).replace("_", " ").casefold().split())


def plural(number: int, word: str) -> str:
    """``"1 image"``, ``"2,000 images"``, ``"2 classes"``."""
    ending = "es" if word.endswith("s") else "s"
    return f"{number:,} {word if number == 1 else word + ending}"


def counted(names: Sequence[str]) -> str:
    """How many, and the first three."""
    dots = ", ..." if len(names) > 3 else ""
    return f"{len(names)} ({', '.join(names[:3])}{dots})"
