"""A pass over images into a spool, and what can be refused before it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sized
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from ueo_fast.finetune.data.image_list import ImageList
from ueo_fast.finetune.data.names import plural, shown
from ueo_fast.finetune.scoring.score_batches import ScoredBatch
from ueo_fast.finetune.scoring.score_spool import BLOCK, ScoreSpool
from ueo_fast.finetune.scoring.score_unreadable import UnreadableList
from ueo_fast.finetune.scoring.thresholds import Threshold, needs_labels_message, require_mixture

OnProgress = Callable[[int, int], None]
"""Called after each batch with images done and images in all."""


def check_images(images: ImageList, dataset: Dataset[Any] | Tensor) -> None:
    """Whether both are of the same length.

    Raises:
        ValueError: they are not, or there is nothing in them.
    """
    count = len(cast(Sized, dataset))
    if count != len(images):
        raise ValueError(
            f"dataset has {plural(count, 'image')}, but images lists {len(images)}: they must be "
            "the same images in the same order"
        )
    if count == 0:
        raise ValueError("images is empty: there is nothing to score")


def check_choice(choice: Threshold, labels: Tensor | None, count: int, classes: int) -> None:
    """Whether ``choice`` can be made, as far as that can be known without the scores.

    Args:
        choice: of the threshold.
        labels: (N,) position in the classes, -1 for unknown; ``None``: no labels.
        count: N.
        classes: number of classes.

    Raises:
        ValueError: labels that do not fit or are missing, or a split of scores that are all 1.
        ImportError: ``gmm`` without scikit-learn.
    """
    if choice == Threshold("gmm"):
        require_mixture()
    if labels is not None and (
        labels.shape != (count,) or int(labels.amin()) < -1 or int(labels.amax()) >= classes
    ):
        raise ValueError(
            f"labels has shape {tuple(labels.shape)} and values from {int(labels.amin())} to "
            f"{int(labels.amax())}; expected ({count},) and -1..{classes - 1}, -1 for unknown"
        )
    if choice.needs_labels and labels is None:
        raise ValueError(needs_labels_message("the images have no labels that match a class"))
    if choice.needs_labels and labels is not None and not bool((labels >= 0).any()):
        raise ValueError(needs_labels_message("no label is a known class"))
    if classes == 1 and choice.kind in ("otsu", "gmm"):
        raise ValueError(
            f"threshold={choice.kind!r} splits the scores in two, but with a single class the MCM "
            "score of every image is 1; list more classes (such as what else may be in the "
            "images), or give a number"
        )


def fill_spool(
    spool: ScoreSpool,
    unreadable: UnreadableList,
    batches: Iterable[ScoredBatch],
    total: int,
    progress: OnProgress | None,
) -> None:
    """Take all batches into the spool and the list.

    Raises:
        ValueError: no image has a score.
    """
    done = 0
    for batch in batches:
        unreadable.add(batch.failures)
        spool.append(batch.positions, batch.scores, batch.classes, batch.probabilities)
        done += len(batch.positions) + len(batch.failures)
        if progress is not None:
            progress(done, total)
    if not len(spool):
        name, reason = unreadable.shown[0]
        raise ValueError(
            f"not one of {plural(total, 'image')} can be scored; {shown(name)}: {reason}; check "
            "the folder, and open one of them in a viewer"
        )


def ordered_scores(
    choice: Threshold, spool: ScoreSpool, labels: Tensor | None
) -> NDArray[np.float64]:
    """The scores that ``choice`` looks at, ascending: none, all, or those of known images."""
    if choice.value is not None:
        return np.empty(0)
    if not choice.needs_labels or labels is None:
        return spool.ordered_scores()
    known = (labels >= 0).cpu().numpy()
    return spool.ordered_scores(lambda positions: known[positions])


def spooled_auroc(spool: ScoreSpool, labels: Tensor | None) -> float | None:
    """AUROC of the scores, known as positive; ``None`` without labels of both kinds.

    The share of pairs of a known and an unknown image in which the known one has the higher score;
    equal scores count half.
    """
    if labels is None:
        return None
    is_known = (labels >= 0).cpu().numpy()
    known = spool.ordered_scores(lambda positions: is_known[positions])
    unknown = spool.ordered_scores(lambda positions: ~is_known[positions])
    if not len(known) or not len(unknown):
        return None
    twice_above = 0
    for start in range(0, len(unknown), BLOCK):
        block = unknown[start : start + BLOCK]
        below = np.searchsorted(known, block, "left") + np.searchsorted(known, block, "right")
        twice_above += int((2 * len(known) - below).sum())
    return twice_above / (2 * len(known) * len(unknown))
