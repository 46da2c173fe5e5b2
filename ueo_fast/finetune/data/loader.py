"""Batches of images of which some may be unreadable."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from ueo_fast.finetune.data.decode import UnreadableImageError


class TolerantBatch(NamedTuple):
    """Images that could be read, and those that could not.

    Attributes:
        images: (B, 3, H, W), or ``None`` where none could be read.
        positions: (B,) int64, of ``images``.
        failures: (position, what is wrong) of each image that could not be read.
    """

    images: Tensor | None
    positions: Tensor
    failures: tuple[tuple[int, UnreadableImageError], ...]


Item = tuple[Tensor | UnreadableImageError, int]


class Tolerant(Dataset[Item]):
    """An error becomes the item: raised in a worker it would arrive as a RuntimeError and a
    traceback, and take the rest of its batch along."""

    def __init__(self, images: Dataset[tuple[Tensor, int]]) -> None:
        self.images = images

    def __getitem__(self, index: int) -> Item:
        try:
            return self.images[index]
        except UnreadableImageError as error:
            return error, index


def data_loader(
    dataset: Dataset[Item],
    batches: Iterator[list[Any]],
    num_workers: int,
    pin_memory: bool,
) -> DataLoader[TolerantBatch]:
    """Loads one batch for each list of keys that ``batches`` yields.

    Args:
        dataset: items by key; the int in an item is the image's position.
        batches: drawn from as the loader goes on: the keys of all epochs would be gigabytes.
        num_workers: worker processes, as far as :func:`started_workers` allows.
        pin_memory: page-locked memory.
    """
    return DataLoader(
        cast("Dataset[TolerantBatch]", dataset),
        batch_sampler=batches,
        num_workers=started_workers(num_workers),
        collate_fn=_collate,
        pin_memory=pin_memory,
        # Else the loader would draw the workers' seeds from the global generator.
        generator=torch.Generator().manual_seed(0),
    )


def started_workers(wanted: int) -> int:
    """How many worker processes are started: at most four per processor. More only take memory, and
    a config may come from a larger machine; the number changes no result."""
    return min(wanted, 4 * _processors())


def _processors() -> int:
    """Those that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _collate(items: list[Item]) -> TolerantBatch:
    read: list[Tensor] = []
    rows: list[int] = []
    failures: list[tuple[int, UnreadableImageError]] = []
    for image, row in items:
        if isinstance(image, UnreadableImageError):
            failures.append((row, image))
        else:
            read.append(image)
            rows.append(row)
    positions = torch.tensor(rows, dtype=torch.int64)
    return TolerantBatch(default_collate(read) if read else None, positions, tuple(failures))
