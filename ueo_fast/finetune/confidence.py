"""Confidence of each image according to the zero-shot model: the weights of the UEO loss."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from ueo_fast import mcm_score
from ueo_fast.finetune.model import ClipClassifier
from ueo_fast.finetune.predict import predict_cosines


def zero_shot_confidence(
    classifier: ClipClassifier,
    images: Dataset[Any] | Tensor,
    *,
    mcm_scale: float = 1.0,
    batch_size: int = 256,
    num_workers: int = 0,
) -> Tensor:
    """Maximum softmax of ``mcm_scale * cosines``: the frozen weights ``w`` of the images.

    Call it once, before anything is trained, on un-augmented images; training then looks up
    ``confidence[index]``.

    Args:
        classifier: the zero-shot model.
        images: N images in the order that training's indices refer to.
        mcm_scale: multiplies the *cosines*. The authors use 1 (the MCM score), which makes the
            weights nearly uniform; 100 would give the model's own softmax confidence.
        batch_size: images per forward pass.
        num_workers: worker processes of the loader.

    Returns:
        (N,) float32 on the CPU, in (1 / C, 1].

    Raises:
        ValueError: ``mcm_scale`` is not positive.

    Source: authors' ``demo.py`` (``target_maxpro``); arXiv 2308.12919, section 3.3.
    """
    if not mcm_scale > 0:
        raise ValueError(f"mcm_scale must be positive, got {mcm_scale}")
    cosines = predict_cosines(classifier, images, batch_size=batch_size, num_workers=num_workers)
    return mcm_score(cosines, mcm_scale)
