"""The unlabelled images, and what the zero-shot model says about them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor
from torch.utils.data import Dataset, Subset

from ueo_fast import mcm_score
from ueo_fast.finetune.clip.model import ClipClassifier
from ueo_fast.finetune.data.names import plural
from ueo_fast.finetune.engine.training_config import ImagePass
from ueo_fast.finetune.evaluation.predict import (
    Predicted,
    collect,
    predict_batches,
    unreadable_images,
)
from ueo_fast.ranges import check_number

_FIELDS = ("augmented", "cosines", "labels", "features")


@dataclass(frozen=True)
class Target:
    """N images of the target. One index means the same image in every field.

    Attributes:
        images: un-augmented, a dataset or a tensor (N, 3, H, W).
        augmented: the same images as training sees them, augmented anew at each access; ``None``:
            as ``images``.
        cosines: (N, C) what the zero-shot model says, computed once before anything is trained;
            :func:`zero_shot_target` fills it in.
        labels: (N,) int64 position in the list of known classes, -1 for unknown. Only the oracle
            looks at them.
        features: (N, E) L2-normalised, of ``images``; ``None`` if the image tower is trained,
            or if they were not kept.
        positions: (N,) int64, among the images that were given, if some of those could not be read;
            ``None`` if all could.
        unreadable: (name, reason) of each image that was left out.

    Raises:
        ValueError: fields of different lengths.
    """

    images: Dataset[Any] | Tensor
    augmented: Dataset[Any] | Tensor | None = None
    cosines: Tensor | None = None
    labels: Tensor | None = None
    features: Tensor | None = None
    positions: Tensor | None = None
    unreadable: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        for name in (*_FIELDS, "positions"):
            value = getattr(self, name)
            if value is not None and len(value) != len(self):
                raise ValueError(
                    f"{name} has {len(value)} entries, but there are {len(self)} images: they must "
                    "be of the same images in the same order"
                )

    def __len__(self) -> int:
        return len(cast(Sized, self.images))

    def __repr__(self) -> str:
        has = [name for name in _FIELDS if getattr(self, name) is not None]
        return f"Target({', '.join((plural(len(self), 'image'), *has))})"

    @property
    def training_images(self) -> Dataset[Any] | Tensor:
        """What training sees."""
        return self.images if self.augmented is None else self.augmented

    @property
    def evaluation_images(self) -> Dataset[Any] | Tensor:
        """What evaluation sees: the images, or their features if kept."""
        return self.images if self.features is None else self.features

    def zero_shot_cosines(self) -> Tensor:
        """``cosines``, which a method needs.

        Raises:
            ValueError: they were not computed.
        """
        if self.cosines is None:
            raise ValueError(
                "cosines is None, but this method starts from what the zero-shot model says about "
                "the images: make the target with zero_shot_target(classifier, images)"
            )
        return self.cosines

    def confidence(self, mcm_scale: float = 1.0) -> Tensor:
        """(N,) maximum softmax of ``mcm_scale * cosines``: the frozen weights ``w`` of UEO.

        Args:
            mcm_scale: multiplies the *cosines*. The authors use 1 (the MCM score), which makes the
                weights nearly uniform; 100 would give the model's own softmax confidence.

        Raises:
            ValueError: ``mcm_scale`` is out of range, or the cosines were not computed.

        Source: authors' ``demo.py`` (``target_maxpro``); arXiv 2308.12919, section 3.3.
        """
        check_number("mcm_scale", mcm_scale, sign="positive")
        return mcm_score(self.zero_shot_cosines(), mcm_scale)


def zero_shot_target(
    classifier: ClipClassifier,
    images: Dataset[Any] | Tensor,
    how: ImagePass | None = None,
    *,
    augmented: Dataset[Any] | Tensor | None = None,
    labels: Tensor | None = None,
    names: Sequence[str] | None = None,
    strict: bool = False,
    keep_features: bool = False,
    watch: Callable[[Iterator[Predicted]], Iterable[Predicted]] = iter,
) -> Target:
    """Make a target: let the zero-shot model see all images once, and leave out unreadable ones.

    Args:
        classifier: the zero-shot model: call this before anything is trained.
        images: N un-augmented images.
        how: batch size, workers, precision and memory format; ``None``: the defaults.
        augmented: as in :class:`Target`.
        labels: as in :class:`Target`.
        names: of the images, for messages and ``unreadable``; ``None``: their positions.
        strict: fail at an image that cannot be read.
        keep_features: keep the images' features in the target, if all images can be read.
        watch: passes the batches on, and may show progress.

    Raises:
        TypeError, ValueError: an argument is unusable, no image can be read, or with ``strict`` one
            cannot.
    """
    found = collect(watch(predict_batches(classifier, images, how, keep_features=keep_features)))
    rows = found.positions
    unreadable = unreadable_images(found.failures, names, readable=len(rows), strict=strict)
    if not unreadable:
        return Target(images, augmented, found.cosines, labels, found.features)
    # No features: their last bits depend on the batches, which a resumed run has without the gaps.
    return Target(
        _subset(images, rows),
        None if augmented is None else _subset(augmented, rows),
        found.cosines,
        None if labels is None else labels[rows],
        positions=rows,
        unreadable=unreadable,
    )


def _subset(images: Dataset[Any] | Tensor, rows: Tensor) -> Dataset[Any] | Tensor:
    return images[rows] if isinstance(images, Tensor) else Subset(images, rows.tolist())
