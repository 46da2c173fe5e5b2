"""The unlabelled images, and what the zero-shot model says about them."""

from __future__ import annotations

from collections.abc import Sized
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor
from torch.utils.data import Dataset

from ueo_fast import mcm_score
from ueo_fast.finetune.clip.model import ClipClassifier
from ueo_fast.finetune.data.names import plural
from ueo_fast.finetune.engine.training_config import ImagePass
from ueo_fast.finetune.evaluation.predict import predict_cosines
from ueo_fast.ranges import check_number


@dataclass(frozen=True)
class Target:
    """N images of the target. One index means the same image in every field.

    Attributes:
        images: un-augmented, a dataset or a tensor (N, 3, H, W).
        augmented: the same images as training sees them, augmented anew at each access; ``None``:
            as ``images``.
        cosines: (N, C) what the zero-shot model says, computed once before anything is trained;
            :func:`zero_shot_target` fills it in.
        labels: (N,) int64 position in the list of known classes, -1 for unknown. No method but the
            oracle looks at them.
        features: (N, E) L2-normalised, what the image tower makes of ``images``, where it stays as
            it is; ``None``: where it is trained, or they were not kept.

    Raises:
        ValueError: fields of different lengths.
    """

    images: Dataset[Any] | Tensor
    augmented: Dataset[Any] | Tensor | None = None
    cosines: Tensor | None = None
    labels: Tensor | None = None
    features: Tensor | None = None

    def __post_init__(self) -> None:
        for name in ("augmented", "cosines", "labels", "features"):
            value = getattr(self, name)
            if value is not None and len(value) != len(self):
                raise ValueError(
                    f"{name} has {len(value)} entries, but there are {len(self)} images: they must "
                    "be of the same images in the same order"
                )

    def __len__(self) -> int:
        return len(cast(Sized, self.images))

    def __repr__(self) -> str:
        names = ("augmented", "cosines", "labels", "features")
        has = [name for name in names if getattr(self, name) is not None]
        return f"Target({', '.join((plural(len(self), 'image'), *has))})"

    @property
    def training_images(self) -> Dataset[Any] | Tensor:
        """What training sees."""
        return self.images if self.augmented is None else self.augmented

    @property
    def evaluation_images(self) -> Dataset[Any] | Tensor:
        """What evaluation sees: the images, or their features."""
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
    *,
    augmented: Dataset[Any] | Tensor | None = None,
    labels: Tensor | None = None,
    batch_size: int = 256,
    num_workers: int = 0,
) -> Target:
    """A target with its zero-shot cosines.

    Args:
        classifier: the zero-shot model: call this before anything is trained.
        images: N un-augmented images.
        augmented: as in :class:`Target`.
        labels: as in :class:`Target`.
        batch_size: images per forward pass.
        num_workers: worker processes of the loader.
    """
    cosines = predict_cosines(
        classifier, images, ImagePass(batch_size=batch_size, num_workers=num_workers)
    )
    return Target(images, augmented, cosines, labels)
