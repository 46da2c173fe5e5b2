"""Names of files and classes, as they are shown and compared."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Sequence

_SEPARATORS = r"[\s_\-\u2010-\u2015]+"  # spaces, underscores, hyphens and dashes


def printable(path: str | os.PathLike[str]) -> str:
    """A path as valid Unicode: bytes of a file name that are not UTF-8 become ``\\xNN``."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def shown(name: str) -> str:
    """A name as it may be printed: what a terminal obeys or hides (control characters, line breaks,
    marks that reverse the text) is escaped."""
    return "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in name)


def clean_name(name: str) -> str:
    """What of a class name tells it from others: ``Alarm_Clock`` and ``alarm clock`` are one."""
    # NFC, as macOS hands out folder names with accents as characters of their own.
    return " ".join(unicodedata.normalize("NFC", name).replace("_", " ").casefold().split())


def loose_name(name: str) -> str:
    """What two spellings of a name have in common: ``T-Shirt`` and ``tshirt``, ``1.0`` and ``01``.

    Case, spaces, hyphens and underscores are ignored, except between digits: ``1-2`` is not ``12``.
    """
    number = whole_number(name)
    if number is not None:
        return str(number)
    kept = re.sub(rf"(?<=\d){_SEPARATORS}(?=\d)", "\0", clean_name(name))
    return re.sub(_SEPARATORS, "", kept)


def whole_number(text: str) -> int | None:
    """The number that ``text`` writes, also as ``1.0``; ``None`` where it is anything else."""
    found = re.fullmatch(r"([+-]?[0-9]{1,18})(?:\.0*)?", text.strip())
    return None if found is None else int(found[1])


def plural(number: int, word: str) -> str:
    """``"1 image"``, ``"2,000 images"``, ``"2 classes"``."""
    ending = "es" if word.endswith("s") else "s"
    return f"{number:,} {word if number == 1 else word + ending}"


def counted(names: Sequence[str]) -> str:
    """How many, and the first three."""
    dots = ", ..." if len(names) > 3 else ""
    return f"{len(names)} ({', '.join(map(shown, names[:3]))}{dots})"


def listed(names: Sequence[str], most: int = 4) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{', '.join(map(shown, names[:most]))}{more}"
