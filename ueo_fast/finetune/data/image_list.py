"""Which images there are, how the user calls them, and what label each has, if any."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from ueo_fast.finetune.data.names import clean_name, counted, printable
from ueo_fast.finetune.data.text_files import Label, Rows, csv_rows, lines, list_rows, read_text

if TYPE_CHECKING:
    from torch import Tensor

# Formats of which Pillow knows only the name without a plugin (BUFR, GRIB, HDF5, MPEG), or which
# another program has to draw (EPS, WMF). Beside photographs such files are data, films and papers.
_NOT_PHOTOGRAPHS = {"BUFR", "GRIB", "HDF5", "MPEG", "IPTC", "EPS", "WMF"}


@dataclass(frozen=True)
class ImageList:
    """N images. One index means the same image in every field.

    Attributes:
        paths: where the files are, as ``open`` takes them.
        names: how the user calls them: relative to the folder or as written in the list. Always
            valid Unicode, also where a file's name is not.
        labels: per image a class name, an index into a list of classes, or ``None``; ``None``
            altogether where no image has a label.

    Raises:
        ValueError: fields of different lengths.
    """

    paths: tuple[str, ...]
    names: tuple[str, ...]
    labels: tuple[Label, ...] | None = None

    def __post_init__(self) -> None:
        for field in ("names", "labels"):
            value = getattr(self, field)
            if value is not None and len(value) != len(self):
                raise ValueError(
                    f"{field} has {len(value)} entries, but there are {len(self)} paths"
                )

    def __len__(self) -> int:
        return len(self.paths)

    def __repr__(self) -> str:
        first = f", the first is {self.names[0]!r}" if self.names else ""
        return f"ImageList({len(self)} images{first}{'' if self.labels is None else ', labelled'})"

    def subset(self, positions: Sequence[int] | Tensor) -> ImageList:
        """The images at ``positions``, in that order."""
        rows = positions if isinstance(positions, Sequence) else positions.tolist()
        return ImageList(
            tuple(self.paths[row] for row in rows),
            tuple(self.names[row] for row in rows),
            None if self.labels is None else tuple(self.labels[row] for row in rows),
        )


@cache
def image_extensions() -> frozenset[str]:
    """Extensions of image files, lower case with the dot: those that Pillow can open."""
    return frozenset(
        extension
        for extension, name in Image.registered_extensions().items()
        if name in Image.OPEN and name not in _NOT_PHOTOGRAPHS
    )


def read_images(
    source: str | os.PathLike[str], *, root: str | os.PathLike[str] | None = None
) -> ImageList:
    """The images of a folder, a list file, a CSV or one image file.

    A folder is read to any depth, in the order of the paths. The first folder below it is an
    image's label; a flat folder has no labels. Hidden files, and files whose extension is not an
    image's (:func:`image_extensions`), are ignored; links are followed.

    A list file has one image per line, ``path`` or ``path label``. The path may contain spaces: the
    label is the last word, or all behind a tab. Blank lines are skipped.

    A CSV (``*.csv``; with commas, semicolons or tabs) has a header with a column ``path`` or
    ``image`` and, if it likes, ``label`` or ``class``, where an empty cell is no label. With both
    ``path`` and ``image`` the path says where the file is and the image how it is called. Other
    columns are ignored.

    Labels of a list or CSV that are all whole numbers are indices into the list of classes; else
    they are names. Text is UTF-8, with or without a byte order mark.

    Args:
        source: what to read.
        root: what relative paths of a list or CSV start from; ``None``: the folder it lies in.

    Raises:
        OSError: ``source``, or a file that it lists, does not exist; the folder has no image.
        ValueError: a list or CSV that cannot be understood, or ``root`` beside a folder.
    """
    path = Path(source)
    is_image = path.suffix.lower() in image_extensions()
    if (path.is_dir() or is_image) and root is not None:
        raise ValueError(
            f"root={os.fspath(root)!r} says where the relative paths of a list file start, but "
            f"{path} is no list file; leave root out"
        )
    if path.is_dir():
        return _read_folder(path)
    if not path.exists():
        raise FileNotFoundError(
            f"{printable(path)} does not exist; give a folder of images, a list file or a CSV"
        )
    if is_image:
        return ImageList((str(path),), (printable(path.name),))
    base = path.parent if root is None else Path(root)
    if not base.is_dir():
        raise FileNotFoundError(f"root={os.fspath(base)!r} is not a folder")
    is_csv = path.suffix.lower() == ".csv"
    return _existing(path, base, csv_rows(path) if is_csv else list_rows(path, image_extensions()))


def read_class_names(path: str | os.PathLike[str]) -> tuple[str, ...]:
    """Class names from a UTF-8 file, one per line.

    Blank lines and lines that begin with ``#`` are skipped.

    Raises:
        OSError: the file cannot be read.
        ValueError: it names no class, two that are the same to a prompt, or is not UTF-8.
    """
    if os.path.isdir(path):
        raise IsADirectoryError(
            f"classes={os.fspath(path)!r} is a folder; give a text file with one class name per "
            "line"
        )
    names: list[str] = []
    first: dict[str, int] = {}
    for number, name in lines(read_text(Path(path))):
        if name.startswith("#"):
            continue
        cleaned = clean_name(name)
        if not cleaned:
            raise ValueError(f"{path}, line {number}: {name!r} is blank; name the class")
        if cleaned in first:
            raise ValueError(
                f"{path}, line {number}: {name!r} is there already, in line {first[cleaned]} "
                "(capitals, underscores and spaces tell no classes apart); list it once"
            )
        first[cleaned] = number
        names.append(name)
    if not names:
        raise ValueError(f"{path} names no class; write one class name per line")
    return tuple(names)


def match_labels(images: ImageList, class_names: Sequence[str]) -> Tensor | None:
    """The images' labels as positions in ``class_names``.

    Names are compared without regard to capitals, underscores and repeated spaces; numbers are
    positions already, and unknown where they are out of range.

    Returns:
        (N,) int64, -1 where the label is not among the classes; ``None`` where no image has a label
        that is: then the folders are not classes, and there is nothing to measure by.

    Raises:
        ValueError: two ``class_names`` are the same, or some images have a label that is a class
            and others have no label at all.
    """
    import torch

    position: dict[str, int] = {}
    for index, name in enumerate(class_names):
        if position.setdefault(clean_name(name), index) != index:
            other = class_names[position[clean_name(name)]]
            raise ValueError(f"class_names has both {other!r} and {name!r}; list each class once")

    def match(label: Label) -> int:
        if isinstance(label, int):
            return label if 0 <= label < len(class_names) else -1
        return -1 if label is None else position.get(clean_name(label), -1)

    found = torch.tensor([match(label) for label in images.labels or ()], dtype=torch.int64)
    if images.labels is None or not bool((found >= 0).any()):
        return None
    pairs = zip(images.names, images.labels, strict=True)
    missing = [name for name, label in pairs if label is None]
    if missing:
        raise ValueError(
            f"{counted(missing)} of {len(images)} images have no label, while others have labels "
            "that are classes; give every image a label, or none. In a folder, move the images "
            "that lie beside the class folders into one; if its name is no class they are unknown"
        )
    return found


def _read_folder(folder: Path) -> ImageList:
    ignored: Counter[str] = Counter()
    names = sorted(_walk(folder, "", (), lambda name: ignored.update([_extension(name)])))
    if not names:
        found = ", ".join(f"{count} x {kind or 'none'}" for kind, count in ignored.most_common(5))
        raise FileNotFoundError(
            f"{printable(folder)} has no image. Looked for, at any depth: files named "
            f"{' '.join(sorted(image_extensions()))}. Found: {printable(found) or 'no file at all'}"
        )
    labels = tuple(printable(name.split("/", 1)[0]) if "/" in name else None for name in names)
    return ImageList(
        tuple(os.path.join(folder, name) for name in names),
        tuple(printable(name) for name in names),
        labels if any(labels) else None,
    )


def _walk(
    folder: Path, prefix: str, above: tuple[str, ...], ignore: Callable[[str], None]
) -> Iterator[str]:
    """Names of the images below ``folder``, with ``/`` between their parts. Unlike ``os.walk`` it
    fails at a folder that may not be read, and stops where a link leads back up."""
    real = os.path.realpath(folder)
    if real in above:
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            # One that leads to itself included, of which is_dir() and is_file() raise.
            dead_link = entry.is_symlink() and not os.path.exists(entry.path)
            if not dead_link and entry.is_dir():
                yield from _walk(Path(entry.path), f"{prefix}{entry.name}/", (*above, real), ignore)
            elif _extension(entry.name) not in image_extensions():
                ignore(entry.name)
            # A dead link is told of when it is decoded; a pipe would block for ever.
            elif dead_link or entry.is_file():
                yield prefix + entry.name


def _extension(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _existing(source: Path, base: Path, rows: Rows) -> ImageList:
    if not rows.paths:
        raise ValueError(f"{source} lists no image; write one path per line")
    paths = tuple(os.path.join(base, path) for path in rows.paths)
    missing = [printable(path) for path in paths if not os.path.isfile(path)]
    if missing:
        # In "my photo.jpg alarm clock" the label would be "clock".
        several = rows.labels is not None and source.suffix.lower() != ".csv"
        raise FileNotFoundError(
            f"{source}: {counted(missing)} of {len(paths)} files do not exist; relative paths "
            f"start at {printable(base)}; --data-root (root=) names another folder"
            f"{'; a label is one word, write alarm_clock or use a CSV' if several else ''}"
        )
    return ImageList(paths, rows.names, rows.labels)
