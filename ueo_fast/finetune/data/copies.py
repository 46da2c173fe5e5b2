"""Small copies of images, kept on disk so that each photograph is decoded only once."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL
import torch
import torchvision
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from ueo_fast.finetune.data import Decoding, check_cache
from ueo_fast.finetune.data.decode import OVERSAMPLING, Decoded, as_rgb, opened
from ueo_fast.finetune.data.names import plural, printable

try:
    import sqlite3
except ImportError:  # Python may be built without it
    sqlite3 = None  # type: ignore[assignment]

Size = tuple[int, int]  # (width, height)

COPIES = "copies.sqlite"
"""The file in which a folder keeps copies."""

_MOST_PIXELS = 2**26
"""Beyond this, Pillow resizes, slowly: PyTorch would need a second copy of all pixels."""
_RESERVE = 10**9
"""Bytes left free on the disk, for the run's own files and for everybody else."""
_PAGE = 32768
"""Bytes per page, the pieces in which SQLite reads a copy."""
_PATIENCE = 60
"""Seconds that a process waits while others write."""
_COLUMNS = """(
    path BLOB, made TEXT, bytes INTEGER, mtime_ns INTEGER, width INTEGER, height INTEGER,
    columns INTEGER, rows INTEGER, crc INTEGER, pixels BLOB, PRIMARY KEY (path, made))"""
# Other versions may resize to other pixels.
_MAKERS = f"Pillow {PIL.__version__}, torch {torch.__version__}, tv {torchvision.__version__}"


class Picture(NamedTuple):
    """The pixels of an image, perhaps of a smaller copy of it.

    Attributes:
        pixels: (3, H, W) uint8 RGB, with the channels last in memory.
        size: (width, height) of the image itself.
    """

    pixels: Tensor
    size: Size

    def __reduce__(self) -> tuple[Any, ...]:
        # As an array: a process that receives a tensor keeps a file open for it.
        return _from_array, (self.pixels.permute(1, 2, 0).numpy(), self.size)


def _from_array(pixels: NDArray[np.uint8], size: Size) -> Picture:
    return Picture(torch.from_numpy(pixels).permute(2, 0, 1), size)


def read_picture(path: str | os.PathLike[str], view: Size) -> Picture:
    """Read a copy of an image file: twice the pixels per side that views need, or all it has.

    JPEG is decoded at the smallest size that leaves twice the pixels per side; the rest is resized
    (bicubic, antialiased).

    Args:
        path: of the file.
        view: (width, height) that the model takes; the copy covers it twice per side.

    Raises:
        UnreadableImageError: the file cannot be decoded.
    """
    with opened(path) as encoded:
        shrink = _shrink(encoded.size, view)
        return _shrunk(encoded.decode(shrink), encoded.size, shrink)


def as_picture(image: Image.Image, name: str, view: Size) -> Picture:
    """As :func:`read_picture`, from an image that PIL has opened; errors name ``name``."""
    whole = as_rgb(image, name)
    return _shrunk(Decoded(whole), whole.size, _shrink(whole.size, view))


def _shrink(size: Size, view: Size) -> float:
    return max(
        1.0, min(side / needed for side, needed in zip(size, view, strict=True)) / OVERSAMPLING
    )


def _shrunk(decoded: Decoded, size: Size, shrink: float) -> Picture:
    image = decoded.image
    width, height = (max(1, round(side / shrink)) for side in size)
    box = decoded.box(size)
    if shrink == 1:
        return _from_array(np.array(image), size)
    if box != (0, 0, *image.size) or image.width * image.height > _MOST_PIXELS:
        # A reduced image's sides are rounded up, so the whole one may end between its pixels.
        shrunk = image.resize((width, height), Image.Resampling.BICUBIC, box)
        return _from_array(np.array(shrunk), size)
    pixels = _from_array(np.array(image), size).pixels
    return Picture(functional.resize(pixels, [height, width], InterpolationMode.BICUBIC), size)


class Copies:
    """Copies of image files in an SQLite file, for all processes that load images.

    The key of a copy is the path, size and modification time of its file, and how it was made, so
    that a changed file is read again. So is the file whose copy was lost or damaged. Several runs
    may use one folder at a time, and any of them may be killed.

    Args:
        folder: where they are kept; created if missing.
        most_bytes: maximum size of the file; ``None``: half of the disk's free space now.

    Raises:
        OSError: the folder cannot be made.
    """

    def __init__(self, folder: str | os.PathLike[str], most_bytes: int | None = None) -> None:
        self.folder = Path(folder).absolute()  # worker processes may start elsewhere
        self.folder.mkdir(parents=True, exist_ok=True)
        self._file = self.folder / COPIES
        if most_bytes is None:
            most_bytes = self._used() + shutil.disk_usage(self.folder).free // 2
        self._most = most_bytes
        # By process, as SQLite's connections must not cross a fork.
        self._databases: dict[int, Any] = {}
        # In memory shared by worker processes: why no more copies are kept, and whether those that
        # exist can be read.
        self._said = torch.zeros(300, dtype=torch.uint8, device="cpu").share_memory_()
        self._readable = torch.ones(1, dtype=torch.bool, device="cpu").share_memory_()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_databases": {}}

    def read(self, path: str | os.PathLike[str], view: Size) -> Picture:
        """As :func:`read_picture`, from the copy if there is one; otherwise make and keep one."""
        key = self._key(path, view)
        found = None if key is None else self._find(key)
        if found is not None:
            return found
        picture = read_picture(path, view)
        # Not where the file was changed while it was read.
        if key is not None and self.stopped is None and key == self._key(path, view):
            self._keep(key, picture)
        return picture

    @property
    def stopped(self) -> str | None:
        """Why no more copies are kept; ``None`` as long as all are."""
        return bytes(self._said.tolist()).rstrip(b"\0").decode(errors="ignore") or None

    def text(self) -> str:
        """A sentence for the terminal: how many copies there are, and whether that is all."""
        count = 0
        with contextlib.suppress(sqlite3.Error, OSError):
            count = self._database().execute("SELECT count(*) FROM copies").fetchone()[0]
        folder, images = printable(self.folder), plural(count, "image")
        text = f"{folder} keeps small copies of {images} ({_size(self._used())})"
        if self.stopped is None:
            return text
        return f"{text} and takes no more: {self.stopped}; the others are decoded in every epoch"

    def close(self) -> None:
        """Close the file in this process; reading the next image opens it again."""
        database = self._databases.pop(os.getpid(), None)
        if database is not None:
            with contextlib.suppress(sqlite3.Error):
                database.close()

    def remove(self) -> None:
        """Delete the copies, and the folder if that leaves it empty. From then on, images are read
        from their files."""
        self._readable[0] = False
        self._stop("it was removed")
        self.close()
        remove_copies(self.folder)

    def _used(self) -> int:
        """Bytes of the file."""
        try:
            return self._file.stat().st_size
        except OSError:
            return 0

    def _key(self, path: str | os.PathLike[str], view: Size) -> tuple[Any, ...] | None:
        try:
            found = os.stat(path)
        except OSError:  # reading says what is wrong
            return None
        made = f"{OVERSAMPLING} x {view[0]} x {view[1]}, {_MAKERS}"
        moment = found.st_mtime_ns % 2**63  # SQLite's integers end in the year 2262
        return os.fsencode(os.path.abspath(path)), made, found.st_size, moment

    def _database(self) -> Any:
        process = os.getpid()
        if process not in self._databases:
            if self._file.is_symlink():  # in a run folder from others it could lead anywhere
                raise OSError(f"{self._file} is a link to another file: remove it")
            database = sqlite3.connect(
                self._file, _PATIENCE, isolation_level=None, check_same_thread=False
            )
            try:
                self._prepare(database)
            except BaseException:
                database.close()
                raise
            self._databases[process] = database
        return self._databases[process]

    def _prepare(self, database: Any) -> None:
        database.execute("PRAGMA trusted_schema = OFF")  # the file may come from others
        database.execute(f"PRAGMA page_size = {_PAGE}")
        # A killed process leaves the file intact. A power cut may not, but the checksums detect
        # that; waiting for the disk at every image would cost more.
        database.execute("PRAGMA synchronous = OFF")
        database.execute("PRAGMA journal_mode = PERSIST")  # no file made per image
        database.execute(f"CREATE TABLE IF NOT EXISTS copies {_COLUMNS}")
        # Someone else's view or trigger could run forever.
        found = database.execute("SELECT sql FROM sqlite_master WHERE sql IS NOT NULL").fetchall()
        if found != [(f"CREATE TABLE copies {_COLUMNS}",)]:
            raise sqlite3.DatabaseError("it holds something other than copies: remove it")
        page = database.execute("PRAGMA page_size").fetchone()[0]
        database.execute(f"PRAGMA max_page_count = {max(1, self._most // page)}")

    def _find(self, key: tuple[Any, ...]) -> Picture | None:
        if not self._readable:
            return None
        try:
            row = self._database().execute(
                "SELECT width, height, columns, rows, crc, pixels FROM copies "
                "WHERE path = ? AND made = ? AND bytes = ? AND mtime_ns = ?",
                key,
            )
            found = row.fetchone()
        except (sqlite3.Error, OSError) as error:
            self._readable[0] = False
            self._stop(f"it cannot be read ({error})")
            return None
        return None if found is None else _picture(*found)

    def _keep(self, key: tuple[Any, ...], picture: Picture) -> None:
        pixels = picture.pixels.permute(1, 2, 0).contiguous()
        content = pixels.numpy().tobytes()
        try:
            if shutil.disk_usage(self.folder).free < _RESERVE + len(content):
                self._stop(f"less than {_size(_RESERVE)} is free on its disk")
                return
            self._database().execute(
                "INSERT OR REPLACE INTO copies VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    *key,
                    *picture.size,
                    pixels.shape[1],
                    pixels.shape[0],
                    zlib.crc32(content),
                    content,
                ),
            )
        except (sqlite3.Error, OSError) as error:
            reached = self._most < self._used() + len(content) + 2 * _PAGE
            limit = f"its limit of {_size(self._most)} is reached"
            self._stop(limit if reached else f"it cannot be written ({error})")

    def _stop(self, reason: str) -> None:
        text = printable(reason).encode()[: len(self._said)].ljust(len(self._said), b"\0")
        self._said.copy_(torch.frombuffer(bytearray(text), dtype=torch.uint8))


def _picture(*row: Any) -> Picture | None:
    """A row of the table; ``None`` where it is damaged."""
    *numbers, crc, pixels = row
    if not all(isinstance(number, int) and number > 0 for number in numbers):
        return None
    width, height, columns, rows = numbers
    if not isinstance(pixels, bytes) or len(pixels) != 3 * rows * columns:
        return None
    if columns > width or rows > height or zlib.crc32(pixels) != crc:
        return None
    flat = torch.frombuffer(bytearray(pixels), dtype=torch.uint8)
    return Picture(flat.view(rows, columns, 3).permute(2, 0, 1), (width, height))


def _size(count: int) -> str:
    return f"{count / 1e9:.3g} GB" if count >= 10**9 else f"{count / 1e6:.3g} MB"


def remove_copies(folder: Path) -> None:
    """Delete the copies in a folder, and the folder if nothing else is in it."""
    for name in (COPIES, f"{COPIES}-journal"):
        (folder / name).unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        folder.rmdir()


def open_copies(
    cache: str | os.PathLike[str], folder: Path, decode: Decoding, most_bytes: int | None = None
) -> Copies | None:
    """Open the place where copies of image files are kept; ``None`` if they are not kept.

    Args:
        cache: ``auto``, ``off``, or a folder.
        folder: what ``auto`` stands for.
        decode: with ``full`` there are no copies.
        most_bytes: as for :class:`Copies`.

    Raises:
        TypeError, ValueError: see :func:`ueo_fast.finetune.data.check_cache`.
        OSError: the folder cannot be made.
    """
    check_cache(cache, decode)
    if decode == "full" or cache == "off":
        return None
    if sqlite3 is None:
        warnings.warn(
            "images are decoded in every epoch, because this Python has no sqlite3 module; "
            "cache='off' (--cache off) silences this",
            stacklevel=2,
        )
        return None
    return Copies(folder if cache == "auto" else cache, most_bytes)


@contextlib.contextmanager
def temporary_copies(cache: str | os.PathLike[str], decode: Decoding) -> Iterator[Copies | None]:
    """As :func:`open_copies`, where ``auto`` stands for a folder that exists while the block runs.

    If none can be made (a read-only container) no copies are kept. Warns at the end if some copies
    could not be kept.
    """
    if cache != "auto" or decode == "full":
        copies = open_copies(cache, Path(), decode)
        try:
            yield copies
        finally:
            if copies is not None:
                _warn_if_stopped(copies)
                copies.close()
        return
    with contextlib.ExitStack() as stack:
        try:
            own = tempfile.TemporaryDirectory(prefix="ueo_fast-", ignore_cleanup_errors=True)
            copies = open_copies(cache, Path(stack.enter_context(own)), decode)
        except OSError as error:
            warnings.warn(
                f"images are decoded in every pass, as their copies have no place: {error}. Set "
                "TMPDIR to a writable folder (in Python, cache=DIR works too)",
                stacklevel=2,
            )
            copies = None
        if copies is not None:
            stack.callback(copies.remove)
            stack.callback(_warn_if_stopped, copies)
        yield copies


def _warn_if_stopped(copies: Copies) -> None:
    if copies.stopped is not None:
        warnings.warn(copies.text(), stacklevel=2)
