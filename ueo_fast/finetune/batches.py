"""Batches that carry the index of each image, in an order that a seed decides."""

from __future__ import annotations

import math
from collections.abc import Sized
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset


class IndexedImages(Dataset[tuple[Tensor, int]]):
    """Images of ``images`` with their position, and nothing else: labels never reach training.

    Args:
        images: a map-style dataset, or a tensor (N, 3, H, W). An item is an image (3, H, W), or a
            tuple whose first element is one (``ImageFolder``'s ``(image, label)``).
    """

    def __init__(self, images: Dataset[Any] | Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(cast(Sized, self.images))

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        item = self.images[index]
        return (item[0] if isinstance(item, tuple | list) else item), index


def indexed_loader(
    images: Dataset[Any] | Tensor,
    batch_size: int,
    *,
    shuffle_seed: int | None = None,
    num_workers: int = 0,
) -> DataLoader[tuple[Tensor, Tensor]]:
    """A loader of ``(images (B, 3, H, W), index (B,) int64)``; the last batch may be smaller.

    Args:
        images: as for :class:`IndexedImages`.
        batch_size: B, at least 1.
        shuffle_seed: seeds the order of all epochs; ``None`` keeps the dataset's order.
        num_workers: worker processes.

    Raises:
        ValueError: the dataset is empty.
    """
    dataset = IndexedImages(images)
    if len(dataset) == 0:
        raise ValueError("images is empty: there is nothing to load")
    generator = None
    if shuffle_seed is not None:
        generator = torch.Generator().manual_seed(shuffle_seed)
    # The default collation turns the B positions into one int64 tensor.
    return DataLoader(
        cast("Dataset[tuple[Tensor, Tensor]]", dataset),
        batch_size=batch_size,
        shuffle=generator is not None,
        generator=generator,
        num_workers=num_workers,
    )


def even_loader(
    images: Dataset[Any] | Tensor, batch_size: int, *, seed: int, num_workers: int = 0
) -> DataLoader[tuple[Tensor, Tensor]]:
    """One shuffled pass in batches whose sizes differ by at most one, none of a single image.

    For statistics of batches, which a small last batch would spoil.

    Args:
        images: as for :class:`IndexedImages`, at least two.
        batch_size: the most images per batch; at 2 an odd one out joins a pair.
        seed: of the order.
        num_workers: worker processes.

    Raises:
        ValueError: fewer than two images, or ``batch_size`` below 2.
    """
    dataset = IndexedImages(images)
    count = len(dataset)
    if count < 2:
        raise ValueError(
            f"images has {count} image(s), but the statistics of a batch need at least 2; give "
            "more images"
        )
    if batch_size < 2:
        raise ValueError(
            f"batch_size must be at least 2, as one image has no spread, got {batch_size}"
        )
    batches = min(math.ceil(count / batch_size), count // 2)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return DataLoader(
        cast("Dataset[tuple[Tensor, Tensor]]", dataset),
        batch_sampler=[rows.tolist() for rows in order.tensor_split(batches)],
        num_workers=num_workers,
    )
