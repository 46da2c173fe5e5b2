"""Atomic file writes: next to their place, forced to disk, then renamed."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A binary file to write to, which replaces ``path`` when the block ends.

    The bytes go to ``.<name>.partial`` in the same folder, are forced to disk, and the file is
    renamed; then the folder is forced to disk too. So a crash at any moment leaves the old file or
    the new one. If the block or a step of this raises, the partial file is removed and ``path``
    stays as it was. A killed process leaves its partial file; the next writer of ``path``
    overwrites it. Of two that write at the same time the second is refused (where the system can
    lock files).

    Raises:
        BlockingIOError: ``path`` is being written already.
        OSError: the folder is missing or read-only, the disk is full; of the subclass that fits,
            with the name of ``path`` and the reason.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    try:
        with _open_alone(partial) as file:
            try:
                yield file
                file.flush()
                os.fsync(file.fileno())
                if os.name == "nt":  # which does not rename open files
                    file.close()
                os.replace(partial, path)  # before it is closed, and its lock with it
            except BaseException:
                with contextlib.suppress(OSError):
                    partial.unlink()
                raise
    except OSError as error:
        # A full disk's error names no file, and users do not know the partial file.
        if error.filename in (None, str(partial)):
            raise failed_write(path, error) from error
        raise
    sync_folder(path.parent)


def _open_alone(partial: Path) -> BinaryIO:
    """The partial file, empty, and locked as long as it is open."""
    while True:
        with contextlib.suppress(FileNotFoundError):
            if not stat.S_ISREG(partial.lstat().st_mode):  # a pipe would wait, a link lead away
                remove_leftover(partial)
        with contextlib.ExitStack() as stack:
            file = stack.enter_context(open(partial, "wb", opener=_keeping))
            try:
                lock(file.fileno())
            except BlockingIOError as error:
                raise BlockingIOError(
                    error.errno, "another process is writing it", str(partial)
                ) from error
            # Unless its last writer renamed or removed it since it was opened here.
            with contextlib.suppress(FileNotFoundError):
                own = os.fstat(file.fileno())
                if os.path.samestat(own, os.stat(partial)):
                    if own.st_size:  # what a killed process left
                        file.truncate(0)
                    stack.pop_all()
                    return file


def remove_leftover(partial: Path) -> None:
    """Remove anything at the place of a partial file; a link, not what it leads to.

    Raises:
        OSError: it is a folder with something in it, or may not be removed.
    """
    if partial.is_symlink() or not partial.is_dir():
        partial.unlink(missing_ok=True)
        return
    try:
        partial.rmdir()
    except OSError as error:
        raise OSError(
            error.errno, f"the folder {partial.name} is in the way: remove it", str(partial)
        ) from error


def _keeping(path: str, flags: int) -> int:
    return open_own(path, flags & ~os.O_TRUNC)  # it may be another writer's


def open_own(path: str, flags: int) -> int:
    """An opener for files that a run writes: another file that a link leads to is left alone."""
    own = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        return os.open(path, flags | own, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise OSError(error.errno, "it is a link to another file: remove it", path) from error
        raise


def lock(descriptor: int) -> None:
    """Lock an open file or folder until it is closed, where the system has such locks.

    Raises:
        BlockingIOError: somebody else has it.
    """
    try:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except (ImportError, OSError):  # not a POSIX system, or a network file system without locks
        pass


def failed_write(path: Path, error: OSError) -> OSError:
    """The same error about ``path``; of the same subclass where it has a number."""
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
