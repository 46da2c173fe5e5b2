"""Predictions of any number of images, kept on disk until all of them are there."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ueo_fast.finetune.files.atomic import failed_write

BLOCK = 1 << 16
"""Rows that are looked at at once when scores are sorted."""

Keep = Callable[[NDArray[np.int64]], NDArray[np.bool_]]


class ScoreSpool:
    """Rows of fixed size in a nameless file: written once, read in order, gone when closed.

    A threshold that depends on all scores is known only after the last image, and memory must not
    grow with their number. The files lie in the folder of the output, because a system's temporary
    folder is often memory. They have no name (on Linux), so that not even a killed process leaves
    them behind. They take 24 + 8 k bytes per image.

    A row has the fields ``position`` int64, ``score`` float64, ``classes`` (k,) int32 and
    ``probabilities`` (k,) float32.

    Args:
        folder: an existing folder on a disk with room.
        top_k: k.
    """

    def __init__(self, folder: Path, top_k: int) -> None:
        self._folder = folder
        self._type = np.dtype(
            [
                ("position", np.int64),
                ("score", np.float64),
                ("classes", np.int32, (top_k,)),
                ("probabilities", np.float32, (top_k,)),
            ]
        )
        self._stack = ExitStack()
        self._file = self._temporary()
        self._count = 0

    def __len__(self) -> int:
        """Rows so far."""
        return self._count

    def __enter__(self) -> ScoreSpool:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.close()

    def append(
        self, positions: Tensor, scores: Tensor, classes: Tensor, probabilities: Tensor
    ) -> None:
        """Add B rows.

        Args:
            positions: (B,) int64.
            scores: (B,) float64.
            classes: (B, k) integer.
            probabilities: (B, k) floating point.
        """
        rows = np.empty(len(positions), self._type)
        rows["position"] = positions.numpy()
        rows["score"] = scores.numpy()
        rows["classes"] = classes.numpy()
        rows["probabilities"] = probabilities.numpy()
        self._write(self._file, rows)
        self._count += len(rows)

    def blocks(self, rows: int) -> Iterator[NDArray[Any]]:
        """All rows in the order of writing, at most ``rows`` at a time."""
        self._file.seek(0)
        while data := self._file.read(rows * self._type.itemsize):
            yield np.frombuffer(data, self._type)

    def ordered_scores(self, keep: Keep | None = None) -> NDArray[np.float64]:
        """Scores in ascending order: a file mapped into memory, sorted in place.

        Args:
            keep: given positions, says which of these images count; ``None``: all.

        Returns:
            float64, valid until the spool is closed.
        """
        file, count = self._temporary(), 0
        for rows in self.blocks(BLOCK):
            scores = rows["score"] if keep is None else rows["score"][keep(rows["position"])]
            self._write(file, np.ascontiguousarray(scores))
            count += len(scores)
        if count == 0:  # an empty file cannot be mapped
            return np.empty(0, np.float64)
        file.flush()
        scores = np.memmap(file, np.float64, mode="r+", shape=(count,))
        scores.sort()
        return scores

    def _temporary(self) -> IO[bytes]:
        try:
            return self._stack.enter_context(tempfile.TemporaryFile(dir=self._folder))
        except OSError as error:
            raise failed_write(self._folder, error) from error

    def _write(self, file: IO[bytes], rows: NDArray[Any]) -> None:
        try:
            file.write(rows.tobytes())
        except OSError as error:  # a full disk's error names no file
            raise failed_write(self._folder, error) from error
