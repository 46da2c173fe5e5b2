"""The images that have no score: how many, which, and why."""

from __future__ import annotations

import csv
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import IO

from ueo_fast.finetune.data.image_list import ImageList
from ueo_fast.finetune.data.names import printable, shown
from ueo_fast.finetune.evaluation.predict import Failure
from ueo_fast.finetune.files.atomic import atomic_file, failed_write
from ueo_fast.finetune.scoring.score_writer import csv_file

SHOWN = 5
"""Images that a summary names; the file has all."""


class UnreadableList:
    """Counts failures and keeps them on disk: all images of a set may be unreadable.

    Args:
        images: what the failures' positions refer to.
        folder: an existing folder, for a nameless temporary file.
        strict: raise at the first one.

    Attributes:
        count: failures so far.
        shown: the first few, as (name, reason).
    """

    def __init__(self, images: ImageList, folder: Path, *, strict: bool) -> None:
        self.count = 0
        self.shown: list[tuple[str, str]] = []
        self._images = images
        self._strict = strict
        self._file: IO[bytes] = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        self._folder = folder
        self._write([("image", "path", "reason")])

    def __enter__(self) -> UnreadableList:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.close()

    def add(self, failures: Iterable[Failure]) -> None:
        """Note some more.

        Raises:
            ValueError: there is one, and the list is strict.
        """
        rows = []
        for position, reason in failures:
            name = self._images.names[position]
            if self._strict:
                raise ValueError(
                    f"{shown(name)}: {reason}; without --strict it is listed and left out"
                )
            if self.count < SHOWN:
                self.shown.append((name, reason))
            self.count += 1
            rows.append((name, printable(self._images.paths[position]), reason))
        self._write(rows)

    def save(self, path: Path) -> Path | None:
        """Write all of them as CSV with the columns image, path and reason; nothing if none."""
        if not self.count:
            return None
        self._file.seek(0)
        with atomic_file(path) as file:
            shutil.copyfileobj(self._file, file)
        return path

    def _write(self, rows: Iterable[tuple[str, str, str]]) -> None:
        try:
            with csv_file(self._file) as table:
                csv.writer(table).writerows(rows)
        except OSError as error:  # a full disk's error names no file
            raise failed_write(self._folder, error) from error
