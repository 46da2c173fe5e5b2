"""Lists of images as people write them: lines of ``path label``, and CSV."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NamedTuple

from ueo_fast.finetune.data.names import printable, shown

Label = str | int | None
"""A class name or a place in a list of classes, as it is written, or nothing."""

MOST_BYTES = 2**29
"""Of a list: more than the paths of some million images take, and less than a device's."""

_PATH_COLUMNS = ("path", "image")
_LABEL_COLUMNS = ("label", "class")


class Rows(NamedTuple):
    """What a list says about each image; ``labels`` is ``None`` where there are none at all."""

    paths: tuple[str, ...]  # as written
    names: tuple[str, ...]
    labels: tuple[Label, ...] | None


def list_rows(path: Path, extensions: Collection[str]) -> Rows:
    """Lines ``path`` or ``path label``. The path may contain spaces: the label is the last word,
    unless the line ends as an image's name does, or what follows a tab behind an image's name.

    Args:
        path: of the list.
        extensions: of images, lower case with the dot.

    Raises:
        ValueError: some lines have a label and others none, or the file is no text.
    """
    paths: list[str] = []
    labels: list[str] = []
    for number, line in lines(read_text(path, errors="surrogateescape")):
        words = line.rsplit(None, 1)
        before, _, after = line.rpartition("\t")
        behind_tab = _extension(before.rstrip()) in extensions
        if behind_tab:
            words = [before.rstrip(), after.strip()]
        labelled = behind_tab or (len(words) == 2 and _extension(line) not in extensions)
        if paths and labelled != bool(labels):
            raise ValueError(
                f"{path}, line {number}: {printable(line)!r} has {'a' if labelled else 'no'} "
                "label, unlike the lines before; give every image a label, or none"
            )
        paths.append(words[0] if labelled else line)
        labels += words[1:] if labelled else []
    return Rows(
        tuple(paths),
        tuple(map(printable, paths)),
        tuple(map(printable, labels)) if labels else None,
    )


def csv_rows(path: Path) -> Rows:
    """Cells of the columns ``path`` or ``image``, and ``label`` or ``class``. What the first line
    has most of, commas, semicolons or tabs, separates them.

    Raises:
        ValueError: no such column, a row that does not fit the header, or the file is no text.
    """
    text = read_text(path, errors="surrogateescape")
    delimiter = max(",;\t", key=text.partition("\n")[0].count)
    rows = csv.DictReader(io.StringIO(text), strict=True, delimiter=delimiter)
    try:
        return _csv_rows(path, rows)
    except csv.Error as error:
        raise ValueError(f"{path}, line {rows.reader.line_num}: {error}") from error


def _csv_rows(path: Path, rows: csv.DictReader[str]) -> Rows:
    header = list(rows.fieldnames or ())
    columns = {name.strip().lower(): name for name in header}
    where = [columns[name] for name in _PATH_COLUMNS if name in columns]
    labelled = [columns[name] for name in _LABEL_COLUMNS if name in columns]
    if not where:
        raise ValueError(
            f"{path} has no column 'path' or 'image'; its first line, which has to be the header, "
            f"is {', '.join(map(repr, map(printable, header[:5]))) or 'empty'}"
        )
    paths: list[str] = []
    names: list[str] = []
    labels: list[str] = []
    for row in rows:
        # Cells beyond the header are under the key None; cells that lack have the value None.
        if None in row or None in row.values() or not row[where[0]].strip():
            raise ValueError(
                f"{path}, line {rows.line_num}: {len(header)} cells and a path are needed, as in "
                "the header; a path with the separator in it has to be in quotes"
            )
        paths.append(row[where[0]].strip())
        names.append(printable(row[where[-1]].strip()))
        labels.append(row[labelled[0]].strip() if labelled else "")
    written = tuple(printable(label) or None for label in labels)
    return Rows(tuple(paths), tuple(names), written if any(written) else None)


def lines(text: str) -> Iterator[tuple[int, str]]:
    """Lines with something in them, without the space around them, and their numbers from 1."""
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, line.strip()


def read_text(path: Path, *, errors: str = "strict") -> str:
    """A UTF-8 file, with or without a byte order mark; every line break becomes ``\\n``.

    Args:
        path: of the file.
        errors: ``"surrogateescape"`` keeps names of files that are not UTF-8.

    Raises:
        OSError: it cannot be read; the message names it.
        ValueError: it is not UTF-8, or no text.
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
        raise ValueError(f"{name} is not UTF-8 text (UTF-16, or no text?); save it as UTF-8")
    return text


def _extension(name: str) -> str:
    return os.path.splitext(name)[1].lower()
