"""Files that are whole or not there: written beside their place, forced to disk, then renamed."""

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
    """A binary file to write to, which takes the place of ``path`` when the block ends.

    The bytes go to ``.<name>.partial`` in the same folder. At the end of the block they are forced
    to disk, the file is renamed to ``path``, and the folder is forced to disk as well, so that a
    crash at any moment leaves the old file or the new one. If the block raises, or a step of this
    fails, the partial file is removed and ``path`` stays as it was. A killed process leaves its
    partial file behind; the next one that writes ``path`` overwrites it. Of two that write at the
    same time the second is refused (where the system can lock files).

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
                if os.name == "nt":  # it renames no open file
                    file.close()
                os.replace(partial, path)  # before it is closed: then it would be anybody's
            except BaseException:
                with contextlib.suppress(OSError):
                    partial.unlink()
                raise
    except OSError as error:
        # A full disk's error names no file, and the partial file is nothing that a user knows.
        if error.filename in (None, str(partial)):
            raise failed_write(path, error) from error
        raise
    sync_folder(path.parent)


def _open_alone(partial: Path) -> BinaryIO:
    """The partial file, empty, for as long as it is open this writer's own."""
    while True:
        if not _is_own(partial):
            remove_leftover(partial)
        file = open(partial, "wb", opener=_keeping)  # noqa: SIM115
        try:
            lock(file.fileno())
            # Else its last writer gave it its name, or removed it, since it was opened here.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), os.stat(partial)):
                    if os.fstat(file.fileno()).st_size:  # what a killed process left
                        file.truncate(0)
                    return file
        except BlockingIOError as error:
            file.close()
            raise BlockingIOError(
                error.errno, "another process is writing it", str(partial)
            ) from error
        except BaseException:
            file.close()
            raise
        file.close()


def _is_own(path: Path) -> bool:
    """Whether ``path`` is a plain file, or none: a pipe would wait, a link lead elsewhere."""
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except FileNotFoundError:
        return True


def remove_leftover(partial: Path) -> None:
    """Remove what is in the place of a partial file, and nothing that it may be a link to.

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
    """Keep others that ask out of an open file or folder, until it is closed.

    Nobody is kept out where the system has no such locks, as some network file systems.

    Raises:
        BlockingIOError: somebody else has it.
    """
    try:
        import fcntl
    except ImportError:  # not a POSIX system
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:
        pass


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
