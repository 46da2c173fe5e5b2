"""From spooled predictions to the rows of the table, with verdict and label."""

from __future__ import annotations

import math
from typing import Any

from numpy.typing import NDArray
from torch import Tensor

from ueo_fast.finetune.data.image_list import ImageList
from ueo_fast.finetune.scoring.score_writer import ScoreRows


class RowMaker:
    """Makes rows, and counts what they come to.

    Args:
        images: what the positions refer to.
        class_names: of the known classes.
        labels: (N,) position in ``class_names``, -1 for unknown; ``None``: no labels.
        lowest_known: from this score on an image is known; ``None``: nobody knows.

    Attributes:
        known: rows so far with ``score >= lowest_known``.
        predicted: positions of the classes that some image was put into.
        lowest: score so far.
        highest: score so far.
    """

    def __init__(
        self,
        images: ImageList,
        class_names: tuple[str, ...],
        labels: Tensor | None,
        lowest_known: float | None,
    ) -> None:
        self.known = 0
        self.predicted: set[int] = set()
        self.lowest, self.highest = math.inf, -math.inf
        self._images = images
        self._class_names = class_names
        self._labels = labels
        self._lowest_known = lowest_known

    def rows(self, rows: NDArray[Any]) -> ScoreRows:
        """Rows of a :class:`ScoreSpool`, at least one, as the table wants them."""
        positions, scores = rows["position"].tolist(), rows["score"]
        known = None if self._lowest_known is None else scores >= self._lowest_known
        if known is not None:
            self.known += int(known.sum())
        self.predicted.update(rows["classes"][:, 0].tolist())
        self.lowest = min(self.lowest, float(scores.min()))
        self.highest = max(self.highest, float(scores.max()))
        return ScoreRows(
            images=[self._images.names[row] for row in positions],
            paths=[self._images.paths[row] for row in positions],
            classes=rows["classes"],
            probabilities=rows["probabilities"],
            scores=scores,
            known=known,
            labels=[self._label(row) for row in positions],
        )

    def _label(self, row: int) -> str | None:
        if self._labels is None:
            return None
        position = int(self._labels[row])
        if position >= 0:
            return self._class_names[position]
        label = None if self._images.labels is None else self._images.labels[row]
        return None if label is None else str(label)
