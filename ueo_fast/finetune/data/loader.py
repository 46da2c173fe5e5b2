"""Batches of images of which some may be unreadable."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from ueo_fast.finetune.data.decode import UnreadableImageError

STOPPING = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
)
"""Ctrl-C; what ``kill``, batch systems and shutdowns send; a terminal that is closed."""


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
        num_workers: worker processes.
        pin_memory: page-locked memory.
    """
    return DataLoader(
        cast("Dataset[TolerantBatch]", dataset),
        batch_sampler=batches,
        num_workers=num_workers,
        collate_fn=_collate,
        pin_memory=pin_memory,
        worker_init_fn=_outlive_signals,
        # Else the loader would draw the workers' seeds from the global generator.
        generator=torch.Generator().manual_seed(0),
    )


def _outlive_signals(worker: int) -> None:
    """Signals that end a run mostly reach its workers too, which it needs to finish its step."""
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _ignore_once)  # a second one is torch's, to a worker that hangs


def _ignore_once(number: int, frame: object) -> None:
    signal.signal(number, signal.SIG_DFL)


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
