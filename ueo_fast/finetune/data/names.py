"""Names of files and classes, how they are shown and compared, and text files with such names."""

from __future__ import annotations

import io
import os
import re
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path

MOST_BYTES = 2**29
"""Limit for a list: more than the paths of a few million images, less than a device file yields."""

_SEPARATORS = r"[\s_\-\u2010-\u2015]+"  # spaces, underscores, hyphens and dashes


def printable(path: str | os.PathLike[str]) -> str:
    """A path as valid Unicode: bytes of a file name that are not UTF-8 become ``\\xNN``."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def shown(name: str) -> str:
    """A name that is safe to print: control characters, line breaks and marks that reverse the text
    are escaped."""
    return "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in name)


def clean_name(name: str) -> str:
    """What distinguishes a class name: ``Alarm_Clock`` and ``alarm clock`` are the same class."""
    # NFC, because macOS stores the accents of folder names as separate characters.
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
    """The whole number written in ``text``, also as ``1.0``; ``None`` for anything else."""
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


def lines(text: str) -> Iterator[tuple[int, str]]:
    """Line numbers, from 1, and stripped lines; blank lines are skipped."""
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, line.strip()


def read_text(path: Path, *, errors: str = "strict") -> str:
    """Read a UTF-8 file, with or without a byte order mark; every line break becomes ``\\n``.

    Args:
        path: of the file.
        errors: ``"surrogateescape"`` keeps file names that are not UTF-8.

    Raises:
        OSError: it cannot be read; the message names it.
        ValueError: it is not UTF-8 text, or too long.
    """
    name = shown(printable(path))
    try:
        with path.open("rb") as file:
            data = file.read(MOST_BYTES + 1)
        if len(data) > MOST_BYTES:
            raise ValueError(f"{name} has more than {MOST_BYTES:,} bytes; give a shorter list")
        text = io.IncrementalNewlineDecoder(None, translate=True).decode(
            data.decode("utf-8-sig", errors), final=True
        )
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8 ({error.reason}); save it as UTF-8") from error
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{name} does not exist; check the name, which is relative to the current folder"
        ) from error
    except OSError as error:
        raise type(error)(
            f"{name} cannot be read ({error.strerror or error}); give a text file that you may read"
        ) from error
    if "\0" in text:
        raise ValueError(f"{name} is not UTF-8 text (UTF-16, or a binary file?); save it as UTF-8")
    return text
