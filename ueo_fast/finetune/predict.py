"""Evaluation pass: the cosines of all images with all classes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ueo_fast.finetune.batches import indexed_loader
from ueo_fast.finetune.model import ClipClassifier


@torch.no_grad()
def predict_cosines(
    classifier: ClipClassifier,
    images: Dataset[Any] | Tensor,
    *,
    batch_size: int = 256,
    num_workers: int = 0,
) -> Tensor:
    """Cosines of every image with every class, in the order of ``images``.

    The text features are computed once. The classifier's mode is left as it is (evaluation mode,
    unless somebody changed it).

    Args:
        classifier: the model, on the device where the work is to be done.
        images: a dataset or tensor of N un-augmented images.
        batch_size: images per forward pass; it changes speed and memory only.
        num_workers: worker processes of the loader.

    Returns:
        (N, C) float32 on the CPU.
    """
    device = classifier.logit_scale.device
    text = classifier.text_features()
    rows = [
        classifier(batch.to(device), text).cosines.float().cpu()
        for batch, _ in indexed_loader(images, batch_size, num_workers=num_workers)
    ]
    return torch.cat(rows)
