"""Scores of images, batch by batch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ueo_fast import mcm_score
from ueo_fast.finetune.clip.model import ClipClassifier
from ueo_fast.finetune.evaluation.predict import Failure, predict_batches


class ScoredBatch(NamedTuple):
    """What the table needs to know about the B images of a batch that have a score.

    Attributes:
        positions: (B,) int64.
        scores: (B,) float64, MCM.
        classes: (B, k) int64, the most probable first.
        probabilities: (B, k) float32, softmax of the logits.
        failures: the images of the batch that have none.
        cosines: (B, C) float32.
    """

    positions: Tensor
    scores: Tensor
    classes: Tensor
    probabilities: Tensor
    failures: tuple[Failure, ...]
    cosines: Tensor


def score_batches(
    classifier: ClipClassifier,
    images: Dataset[Any] | Tensor,
    *,
    top_k: int,
    mcm_scale: float = 1.0,
    batch_size: int = 256,
    num_workers: int = 0,
    precision: str = "fp32",
    channels_last: bool = False,
) -> Iterator[ScoredBatch]:
    """Probabilities and MCM scores, in the order of ``images``; nothing is kept.

    An image whose cosines are not finite is a failure like one that cannot be read: one such image
    among millions must not stop the others, and none may pass for a number.

    Args:
        classifier: the model.
        images: as for ``predict_batches``, and so are the others.
        top_k: k, at most the number of classes.
        mcm_scale: multiplies the cosines in the MCM score.
        batch_size: images per forward pass.
        num_workers: worker processes of the loader.
        precision: of the image tower.
        channels_last: memory format of the images.
    """
    logit_scale = float(classifier.logit_scale)
    for positions, cosines, failures, _ in predict_batches(
        classifier,
        images,
        batch_size=batch_size,
        num_workers=num_workers,
        precision=precision,
        channels_last=channels_last,
    ):
        finite = torch.isfinite(cosines).all(dim=1)
        broken = tuple(
            Failure(row, f"the model's answer is not a finite number (precision={precision})")
            for row in positions[~finite].tolist()
        )
        # In double, as in the metrics: at scale 1 the scores differ in their last digits.
        cosines = cosines[finite]
        exact = cosines.double()
        probabilities, classes = (logit_scale * exact).softmax(dim=1).topk(top_k, dim=1)
        yield ScoredBatch(
            positions[finite],
            mcm_score(exact, mcm_scale),
            classes,
            probabilities.float(),
            (*failures, *broken),
            cosines,
        )
