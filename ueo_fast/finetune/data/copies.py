"""Copies of photographs on disk, so that each is decoded once and not in every epoch."""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import zlib
from pathlib import Path
from typing import Any

import PIL
import torch
import torchvision

from ueo_fast.finetune.data.decode import OVERSAMPLING
from ueo_fast.finetune.data.names import plural, printable
from ueo_fast.finetune.data.pictures import COPIES, Picture, Size, read_picture, remove_copies

_RESERVE = 10**9
"""Bytes that are left free on the disk, for the run's own files and for everybody else."""
_PAGE = 32768
"""Bytes per page: SQLite reads a copy in so many pieces."""
_PATIENCE = 60
"""Seconds that a process waits while others write."""
_COLUMNS = """(
    path BLOB, made TEXT, bytes INTEGER, mtime_ns INTEGER, width INTEGER, height INTEGER,
    columns INTEGER, rows INTEGER, crc INTEGER, pixels BLOB, PRIMARY KEY (path, made))"""
# Other versions may resize to other pixels.
_MAKERS = f"Pillow {PIL.__version__}, torch {torch.__version__}, tv {torchvision.__version__}"


class Copies:
    """Keeps the copies of image files in an SQLite file, for all processes that load images.

    The key of a copy is the path, size and time of modification of its file, and how it was made,
    so that a changed file is read again. So is the file of a copy that was lost or damaged. Several
    runs may use one folder at a time, and any of them may be killed.

    Args:
        folder: where they are kept; it is made.
        most_bytes: size of the file at most; ``None``: half of what is free on its disk now.

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
        # By process. A forked one leaves its parent's alone: SQLite wants none to cross a fork.
        self._databases: dict[int, Any] = {}
        # In memory that worker processes share: why no more copies are kept, and whether those that
        # are can be read.
        self._said = torch.zeros(300, dtype=torch.uint8, device="cpu").share_memory_()
        self._readable = torch.ones(1, dtype=torch.bool, device="cpu").share_memory_()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_databases": {}}

    def read(self, path: str | os.PathLike[str], view: Size) -> Picture:
        """As :func:`read_picture`, from the copy if there is one; else a copy is made and kept."""
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
        """Close the file in this process, which opens it again when it reads the next image."""
        database = self._databases.pop(os.getpid(), None)
        if database is not None:
            with contextlib.suppress(sqlite3.Error):
                database.close()

    def remove(self) -> None:
        """Delete the copies, and the folder if it is empty then. From here on, images are read from
        their files."""
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
        # Other versions may resize to other pixels.
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
        # A process that is killed leaves the file whole. After a power cut it may not be, which
        # the checksums tell; waiting for the disk at every image would cost more.
        database.execute("PRAGMA synchronous = OFF")
        database.execute("PRAGMA journal_mode = PERSIST")  # no file made per image
        database.execute(f"CREATE TABLE IF NOT EXISTS copies {_COLUMNS}")
        # A view or trigger of others could compute for ever.
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
