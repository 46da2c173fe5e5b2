"""Batches that carry the index of each image, in an order that a seed decides."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sized
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ueo_fast.finetune.data.decode import UnreadableImageError
from ueo_fast.finetune.data.loader import (
    Item,
    Tolerant,
    TolerantBatch,
    data_loader,
    loaded,
    started_workers,
)
from ueo_fast.finetune.data.names import plural
from ueo_fast.finetune.data.seeded import mixed_seed, seeded


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
        image = item[0] if isinstance(item, tuple | list) else item
        if not getattr(image, "ndim", 0):
            raise TypeError(
                f"images[{index}] is of type {type(image).__name__}, but an item of a dataset must "
                "be a preprocessed tensor (3, H, W), or a tuple that starts with one: give the "
                "dataset a transform that makes it"
            )
        return image, index


def even_loader(
    images: Dataset[Any] | Tensor, batch_size: int, *, seed: int, num_workers: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
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
            f"images has {plural(count, 'image')}, but the statistics of a batch need at least 2; "
            "give more images"
        )
    if batch_size < 2:
        raise ValueError(
            f"batch_size must be at least 2, as one image has no spread, got {batch_size}"
        )
    batches = min(math.ceil(count / batch_size), count // 2)
    generator = torch.Generator("cpu").manual_seed(seed)
    order = torch.randperm(count, generator=generator, device="cpu")
    return loaded(
        DataLoader(
            cast("Dataset[tuple[Tensor, Tensor]]", dataset),
            batch_sampler=[rows.tolist() for rows in order.tensor_split(batches)],
            num_workers=started_workers(num_workers),
        )
    )


class TrainingBatch(NamedTuple):
    """Images of one step.

    Attributes:
        epoch: from 1.
        images: (B, 3, H, W).
        positions: (B,) int64, the position of each among all images.
    """

    epoch: int
    images: Tensor
    positions: Tensor


def steps_per_epoch(count: int, batch_size: int) -> int:
    """Batches of an epoch of ``count`` images; the last may be smaller."""
    return math.ceil(count / batch_size)


def training_batches(
    images: Dataset[Any] | Tensor,
    batch_size: int,
    *,
    seed: int,
    epochs: int,
    start_step: int = 0,
    num_workers: int = 0,
    subset: Tensor | None = None,
    shuffle: bool = True,
    pin_memory: bool = False,
) -> Iterator[TrainingBatch]:
    """Shuffled batches of all epochs, one after the other, from any step on.

    What a step is given depends on ``seed`` and the step alone, to the bit: not on the number of
    workers, nor on where the run was taken up. The order of an epoch is drawn from (seed, epoch);
    while an image is made, torch's, Python's and NumPy's global generators start from (seed, epoch,
    position), and are put back afterwards. (A dataset that draws from a generator of its own is
    outside of this.)

    Args:
        images: as for :class:`IndexedImages`. A tensor is indexed directly, without workers.
        batch_size: B; the last batch of an epoch may be smaller.
        seed: not negative.
        epochs: passes over the images.
        start_step: steps to leave out at the beginning, those that were done before.
        num_workers: worker processes, the same ones for all epochs.
        subset: (M,) int64, positions of the images to train on; ``None``: all.
        shuffle: ``False`` keeps the order of the images (of ``subset``) in every epoch.
        pin_memory: page-locked memory, for faster copies to a GPU.

    Raises:
        ValueError: nothing to load, or a number out of range.
        LoadingError: while iterating, where a worker was killed or there is no memory left.
        UnreadableImageError: while iterating, where a file can no longer be read.
    """
    dataset = IndexedImages(images)
    positions = torch.arange(len(dataset), device="cpu") if subset is None else subset.cpu()
    _check(positions, len(dataset))
    for name, value, least in (
        ("batch_size", batch_size, 1),
        ("epochs", epochs, 1),
        ("seed", seed, 0),
        ("start_step", start_step, 0),
    ):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    planned = _plan(positions, batch_size, seed, epochs, start_step, shuffle)
    if isinstance(images, Tensor):
        return (TrainingBatch(epoch, images[rows], rows) for epoch, rows in planned)
    loader = data_loader(
        _Augmented(dataset, seed),
        ([(epoch, row) for row in rows.tolist()] for epoch, rows in planned),
        num_workers,
        pin_memory,
    )
    return _all_readable(loader, start_step, steps_per_epoch(len(positions), batch_size))


def tolerant_loader(
    images: Dataset[Any] | Tensor,
    batch_size: int,
    *,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> Iterable[TolerantBatch]:
    """All images once, in their order; those that cannot be read are told, and skipped.

    Args:
        images: as for :class:`IndexedImages`; an item that cannot be read raises
            ``UnreadableImageError``. A tensor is sliced, without workers.
        batch_size: images that are tried per batch.
        num_workers: worker processes.
        pin_memory: page-locked memory, for faster copies to a GPU.

    Raises:
        ValueError: the dataset is empty, or ``batch_size`` below 1.
    """
    dataset = IndexedImages(images)
    rows = torch.arange(len(dataset), device="cpu")
    _check(rows, len(dataset))
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if isinstance(images, Tensor):
        batches = zip(images.split(batch_size), rows.split(batch_size), strict=True)
        return (TolerantBatch(batch, part, ()) for batch, part in batches)
    starts = range(0, len(dataset), batch_size)
    batches_of_rows = (rows[start : start + batch_size].tolist() for start in starts)
    return data_loader(Tolerant(dataset), batches_of_rows, num_workers, pin_memory)


class _Augmented(Dataset[Item]):
    """Items by (epoch, position), each with random numbers of its own."""

    def __init__(self, images: IndexedImages, seed: int) -> None:
        self.images = Tolerant(images)
        self.seed = seed

    def __getitem__(self, key: tuple[int, int]) -> Item:
        epoch, position = key
        with seeded(self.seed, epoch, position + 1):  # + 1: (seed, epoch, 0) orders the epoch
            return self.images[position]


def _plan(
    positions: Tensor, batch_size: int, seed: int, epochs: int, start_step: int, shuffle: bool
) -> Iterator[tuple[int, Tensor]]:
    """(epoch, positions) of each step from ``start_step`` on."""
    steps = steps_per_epoch(len(positions), batch_size)
    for epoch in range(start_step // steps + 1, epochs + 1):
        order = positions
        if shuffle:
            generator = torch.Generator("cpu").manual_seed(mixed_seed(seed, epoch, 0))
            order = positions[torch.randperm(len(positions), generator=generator, device="cpu")]
        done = max(0, start_step - (epoch - 1) * steps)
        for rows in order[done * batch_size :].split(batch_size):
            yield epoch, rows


def _all_readable(
    loader: Iterator[TolerantBatch], start_step: int, steps: int
) -> Iterator[TrainingBatch]:
    for step, (images, positions, failures) in enumerate(loader, start=start_step):
        for _, error in failures:
            raise UnreadableImageError(
                error.path,
                f"{error.reason}. It was readable before the training began; put the file back and "
                "resume the run, or start a new one, which leaves it out",
            )
        if images is not None:
            yield TrainingBatch(step // steps + 1, images, positions)


def _check(positions: Tensor, count: int) -> None:
    if len(positions) == 0:
        what = "subset" if count else "images"
        raise ValueError(f"{what} is empty: there is nothing to load")
    if int(positions.min()) < 0 or int(positions.max()) >= count:
        raise ValueError(
            f"subset has positions from {int(positions.min())} to {int(positions.max())}, but "
            f"images has {plural(count, 'image')}"
        )
