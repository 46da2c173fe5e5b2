"""Lists of images: their files, their names, and the label of each, if any."""

from __future__ import annotations

import csv
import io
import os
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ueo_fast.finetune.data.decode import UNREADABLE, readable_extensions
from ueo_fast.finetune.data.names import counted, lines, listed, plural, printable, read_text, shown

if TYPE_CHECKING:
    from torch import Tensor

Label = str | int | None
"""A class name or a place in a list of classes, as it is written, or nothing."""

# Where network storage and file managers keep thumbnails, deleted files and copies, lower case.
_SERVICE_FOLDERS = {
    *("@eadir", "#recycle", "@recycle", "#snapshot", "@recently-snapshot", "$recycle.bin"),
    *("system volume information", "__macosx", "lost+found"),
}
_OUTSIDE = "link that leads out of the folder (--follow-links follows it)"
_TWICE = "second path to what is read already (link)"


@dataclass(frozen=True)
class ImageList:
    """N images. One index means the same image in every field.

    Attributes:
        paths: where the files are, as ``open`` takes them.
        names: how the user calls them: relative to the folder or as written in the list. Always
            valid Unicode, also where a file's name is not.
        labels: per image a class name, a place in a list of classes (:func:`match_labels` tells
            them apart), or ``None``; ``None`` altogether where no image has a label.
        left_out: of a folder: kinds of files in it that are not in the list, and how many of each.
        followed: of a folder: links in it that were followed, ``name -> target``.

    Raises:
        ValueError: fields of different lengths.
    """

    paths: tuple[str, ...]
    names: tuple[str, ...]
    labels: tuple[Label, ...] | None = None
    left_out: tuple[tuple[str, int], ...] = ()
    followed: tuple[str, ...] = ()

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
        return replace(
            self,
            paths=tuple(self.paths[row] for row in rows),
            names=tuple(self.names[row] for row in rows),
            labels=None if self.labels is None else tuple(self.labels[row] for row in rows),
        )

    def remarks(self) -> list[str]:
        """What was left out of the folder, and which links were followed, a sentence each."""
        kinds = [f"{count} x {kind}" for kind, count in self.left_out]
        return [
            f"{title}: {listed(found, 8)}"
            for title, found in (
                ("files in the folder that are not read", kinds),
                ("links that were followed", self.followed),
            )
            if found
        ]


@cache
def image_extensions() -> frozenset[str]:
    """Extensions of image files, lower case with the dot. This includes images that cannot be read
    here (HEIC without pillow-heif, camera raw files), so that decoding reports them."""
    return readable_extensions() | UNREADABLE.keys()


def check_root(
    root: str | os.PathLike[str] | None, *sources: str | os.PathLike[str] | None
) -> None:
    """Refuse a ``root`` that none of ``sources`` can use.

    Raises:
        ValueError: ``root`` is given, and all of ``sources`` are folders or images.
    """
    paths = [Path(source) for source in sources if source is not None]
    if root is not None and not any(_is_list(path) for path in paths):
        raise ValueError(
            f"data_root={os.fspath(root)!r} says where the relative paths of a list or CSV start, "
            f"but neither is given, only {' and '.join(shown(printable(path)) for path in paths)}; "
            "leave it out"
        )


def read_images(
    source: str | os.PathLike[str],
    *,
    root: str | os.PathLike[str] | None = None,
    follow_links: bool = False,
) -> ImageList:
    """The images of a folder, a list file, a CSV or one image file.

    A folder is read to any depth, in the order of the paths. The first folder below it is an
    image's label; a flat folder has no labels. No file is read twice, whatever links lead to it.
    Links that lead out of the folder, hidden files, the folders in which network storage keeps
    thumbnails and deleted files (``@eaDir``, ``#recycle``), and files whose extension is not an
    image's (:func:`image_extensions`) are left out and counted.

    A list file has one image per line, ``path`` or ``path label``. The path may contain spaces: the
    label is the last word, or everything after a tab. Blank lines are skipped.

    A CSV (``*.csv``; with commas, semicolons or tabs) has a header with a column ``path`` or
    ``image`` and, optionally, ``label`` or ``class``, where an empty cell means no label. With both
    ``path`` and ``image``, the path locates the file and the image names it. Other columns are
    ignored.

    Labels are kept as they are written; :func:`match_labels` says what they mean. Text is UTF-8,
    with or without a byte order mark.

    Args:
        source: what to read.
        root: what relative paths of a list or CSV start from; ``None``: its own folder. Ignored
            for a folder of images.
        follow_links: follow the links of a folder that lead out of it.

    Raises:
        OSError: ``source``, or a file that it lists, does not exist; the folder has no image.
        ValueError: the list or CSV cannot be parsed, or is not text.
    """
    path = Path(source)
    if path.is_dir():
        return _read_folder(path, follow_links)
    if not path.exists():
        raise FileNotFoundError(
            f"{shown(printable(path))} does not exist; give a folder of images, a list file or a "
            "CSV"
        )
    if not _is_list(path):
        return ImageList((str(path),), (printable(path.name),))
    base = path.parent if root is None else Path(root)
    if not base.is_dir():
        raise FileNotFoundError(f"root={os.fspath(base)!r} is not a folder")
    return _read_list(path, base)


def _is_list(path: Path) -> bool:
    return not path.is_dir() and not _is_image(path.name)


def _is_image(name: str) -> bool:
    return _extension(name) in image_extensions()


def _read_folder(folder: Path, follow_links: bool) -> ImageList:
    tree = _Tree(folder, follow_links)
    names = sorted(tree.names)
    if not names:
        found = ", ".join(f"{count} x {shown(kind)}" for kind, count in tree.counted()[:5])
        raise FileNotFoundError(
            f"{shown(printable(folder))} has no image. Looked for, at any depth: files named "
            f"{' '.join(sorted(readable_extensions()))}. Found: {found or 'no file at all'}"
        )
    labels = tuple(printable(name.split("/", 1)[0]) if "/" in name else None for name in names)
    return ImageList(
        tuple(os.path.join(folder, name) for name in names),
        tuple(printable(name) for name in names),
        labels if any(labels) else None,
        tree.counted(),
        tuple(tree.followed),
    )


class _Tree:
    """The images below a folder, each file once. Unlike ``os.walk`` it fails at a folder that may
    not be read.

    Args:
        root: the folder.
        follow_links: also those that lead out of it.

    Attributes:
        names: of the images, below ``root``, with ``/`` between their parts.
        followed: links that were followed, ``name -> target``.
    """

    def __init__(self, root: Path, follow_links: bool) -> None:
        self.names: list[str] = []
        self.followed: list[str] = []
        self._root = root
        self._left_out: Counter[str] = Counter()
        self._folders: set[str] = set()  # all by their real paths
        self._files: set[str] = set()
        self._inodes: set[tuple[int, int]] = set()
        self._links: deque[str] = deque()
        top = os.path.realpath(root)
        self._walk("", top)
        # Last: of a file and a link to it the file is taken, whatever their names.
        while self._links:
            self._link(self._links.popleft(), top, follow_links)

    def counted(self) -> tuple[tuple[str, int], ...]:
        """Kinds of files that were left out, the most frequent first."""
        kinds = [(printable(kind), count) for kind, count in self._left_out.items() if count]
        return tuple(sorted(kinds, key=lambda one: (-one[1], one[0])))

    def _walk(self, name: str, real: str) -> None:
        """Take all files below the folder ``name``; links wait."""
        files: list[tuple[str, str, os.DirEntry[str], int]] = []
        links: list[str] = []
        waiting = [(name, real)]
        while waiting:
            name, real = waiting.pop()
            if real in self._folders:
                self._left_out[_TWICE] += 1
                continue
            self._folders.add(real)
            device = os.stat(real).st_dev
            for entry in _entries(real):
                below = f"{name}/{entry.name}" if name else entry.name
                kind = _extension(entry.name)
                if entry.name.startswith(".") or entry.name.casefold() in _SERVICE_FOLDERS:
                    self._leave_out(entry)
                elif entry.is_symlink():
                    links.append(below)
                elif entry.is_dir():
                    waiting.append((below, entry.path))
                elif kind not in image_extensions():
                    self._left_out[kind or "without extension"] += 1
                elif entry.is_file():
                    files.append((below, entry.path, entry, device))
                else:  # would block for ever
                    self._left_out["pipe, socket or device"] += 1
        for below, path, entry, device in sorted(files, key=lambda one: one[0]):
            self._take(below, path, (device, entry.inode()))
        self._links.extend(sorted(links))

    def _link(self, name: str, top: str, follow: bool) -> None:
        path = os.path.join(self._root, name)
        target = os.path.realpath(path)
        inside = target == top or target.startswith(os.path.join(top, ""))
        kind = _extension(name)
        if not os.path.exists(path):
            # Decoding reports a dead link.
            if kind in image_extensions():
                self.names.append(name)
            else:
                self._left_out[kind or "without extension"] += 1
        elif os.path.isfile(path) and kind not in image_extensions():
            self._left_out[kind or "without extension"] += 1
        elif not inside and not follow:
            self._left_out[_OUTSIDE] += 1
        elif os.path.isdir(path):
            if target not in self._folders:
                self.followed.append(f"{printable(name)} -> {printable(target)}")
            self._walk(name, target)
        elif os.path.isfile(path):
            found = os.stat(path)
            if self._take(name, target, (found.st_dev, found.st_ino)):
                self.followed.append(f"{printable(name)} -> {printable(target)}")
        else:
            self._left_out["pipe, socket or device"] += 1

    def _take(self, name: str, real: str, inode: tuple[int, int]) -> bool:
        """Add an image, if it was not read by another name; whether it was added."""
        # Hard links; some network file systems give all files one number, but one name each.
        twice = real in self._files or (inode in self._inodes and os.stat(real).st_nlink > 1)
        if twice:
            self._left_out[_TWICE] += 1
            return False
        self._files.add(real)
        self._inodes.add(inode)
        self.names.append(name)
        return True

    def _leave_out(self, entry: os.DirEntry[str]) -> None:
        if entry.is_dir(follow_symlinks=False):
            inside = sum(len(files) for _, _, files in os.walk(entry.path))
            self._left_out[f"in {entry.name}/"] += inside
        else:
            self._left_out["hidden"] += 1


def _entries(folder: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        raise type(error)(
            f"{shown(printable(folder))} cannot be read ({error.strerror or error}); make it "
            "readable, or move it away"
        ) from error


def _extension(name: str) -> str:
    return os.path.splitext(name)[1].lower()


class _Rows(NamedTuple):
    """What a list says about each image; ``labels`` is ``None`` where there are none at all."""

    paths: list[str]  # as written
    names: list[str]
    labels: list[str | None] | None


def _read_list(source: Path, base: Path) -> ImageList:
    is_csv = source.suffix.lower() == ".csv"
    rows = (_csv_rows if is_csv else _lines)(source, read_text(source, errors="surrogateescape"))
    if not rows.paths:
        raise ValueError(f"{source} lists no image; write one path per line")
    paths = tuple(os.path.join(base, path) for path in rows.paths)
    missing = [printable(path) for path in paths if not os.path.isfile(path)]
    if missing:
        # In "my photo.jpg alarm clock" the label would be "clock".
        one_word = rows.labels is not None and not is_csv
        raise FileNotFoundError(
            f"{shown(printable(source))}: {counted(missing)} of {plural(len(paths), 'file')} "
            f"{'does' if len(missing) == 1 else 'do'} not exist; relative paths start at "
            f"{shown(printable(os.path.abspath(base)))}; --data-root (root=) names another folder"
            f"{'; a label is one word, write alarm_clock or use a CSV' if one_word else ''}"
        )
    return ImageList(paths, tuple(rows.names), None if rows.labels is None else tuple(rows.labels))


def _lines(path: Path, text: str) -> _Rows:
    """Lines ``path`` or ``path label``. The label is the last word, unless the line ends as an
    image's name does, or what follows a tab after an image's name."""
    paths: list[str] = []
    labels: list[str | None] = []
    for number, line in lines(text):
        words = line.rsplit(None, 1)
        before, _, after = line.rpartition("\t")
        if _is_image(before.rstrip()):
            words = [before.rstrip(), after.strip()]
        elif len(words) == 1 or _is_image(line):
            words = [line]
        labelled = len(words) == 2
        if paths and labelled != bool(labels):
            raise ValueError(
                f"{path}, line {number}: {printable(line)!r} has {'a' if labelled else 'no'} "
                "label, unlike the lines before; give every image a label, or none"
            )
        paths.append(words[0])
        labels += map(printable, words[1:])
    return _Rows(paths, [printable(path) for path in paths], labels or None)


def _csv_rows(path: Path, text: str) -> _Rows:
    """Cells of the columns ``path`` or ``image``, and ``label`` or ``class``. The delimiter is the
    most frequent of commas, semicolons and tabs in the first line."""
    delimiter = max(",;\t", key=text.partition("\n")[0].count)
    reader = csv.DictReader(io.StringIO(text), strict=True, delimiter=delimiter)
    labels: list[str | None] = []
    rows = _Rows([], [], labels)
    try:
        header = list(reader.fieldnames or ())
        columns = {name.strip().lower(): name for name in header}
        where = [columns[name] for name in ("path", "image") if name in columns]
        labelled = [columns[name] for name in ("label", "class") if name in columns]
        if not where:
            raise ValueError(
                f"{path} has no column 'path' or 'image'; its first line, which must be the "
                f"header, is {', '.join(map(repr, map(printable, header[:5]))) or 'empty'}"
            )
        for row in reader:
            # Cells beyond the header are under the key None; missing cells have the value None.
            if None in row or None in row.values() or not row[where[0]].strip():
                raise ValueError(
                    f"{path}, line {reader.line_num}: {len(header)} cells and a path are needed, "
                    "as in the header; a path with the separator in it must be in quotes"
                )
            rows.paths.append(row[where[0]].strip())
            rows.names.append(printable(row[where[-1]].strip()))
            labels.append(printable(row[labelled[0]].strip()) or None if labelled else None)
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.reader.line_num}: {error}") from error
    return rows if any(labels) else rows._replace(labels=None)
