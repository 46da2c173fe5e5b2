"""Files that are whole or not there: written beside their place, forced to disk, then renamed."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A binary file to write to, which takes the place of ``path`` when the block ends.

    The bytes go to ``.<name>.partial`` in the same folder. At the end of the block they are forced
    to disk, the file is renamed to ``path``, and the folder is forced to disk as well, so that a
    crash at any moment leaves the old file or the new one. If the block raises, or a step of this
    fails, the partial file is removed and ``path`` stays as it was. A killed process leaves its
    partial file behind; the next one that writes ``path`` overwrites it. One writer per file.

    Raises:
        OSError: the folder is missing or read-only, the disk is full; of the subclass that fits,
            with the name of ``path`` and the reason.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        # A full disk's error names no file, and the partial file is nothing that a user knows.
        if isinstance(error, OSError) and error.filename in (None, str(partial)):
            raise failed_write(path, error) from error
        raise
    sync_folder(path.parent)


def failed_write(path: Path, error: OSError) -> OSError:
    """The same error, told about ``path``; of the same subclass where it has a number."""
    kept = "what was there before is kept" if path.exists() else "nothing was written"
    if error.errno is None:
        return OSError(f"{path} could not be written ({error}); {kept}")
    return OSError(error.errno, f"could not be written ({error.strerror}); {kept}", str(path))


def sync_folder(folder: Path) -> None:
    """Force the names in a folder to disk, where the system can do that for a folder."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:  # not readable, or a system that opens no folders
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise failed_write(folder, error) from error
    finally:
        os.close(descriptor)
