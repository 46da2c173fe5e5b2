"""Batches of images, in an order that a seed decides, from worker processes or memory."""

from __future__ import annotations

import math
import os
import random
import re
import signal
import time
import weakref
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from ueo_fast.finetune.data.decode import UnreadableImageError
from ueo_fast.finetune.data.names import plural
from ueo_fast.ranges import check_count

STOPPING = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
)
"""Ctrl-C; what ``kill``, batch systems and shutdowns send; a closed terminal."""

Item = tuple[Tensor | UnreadableImageError, int]
Batch = TypeVar("Batch")

_LESS = (
    "Use fewer processes (--workers 1, or 0; in Python num_workers) or a smaller batch, or scale "
    "large images down"
)
_FADING = 0.9  # weight of the past, per batch, in what LoadingMeter shows
_MOST = 2**63 - 1  # of seeds and steps

# Of all loaders in this process.
_handed_out = 0  # images
_waited = 0.0  # seconds


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


def tolerant_loader(
    images: Dataset[Any] | Tensor,
    batch_size: int,
    *,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> Iterable[TolerantBatch]:
    """All images once, in their order; those that cannot be read are skipped and reported.

    Args:
        images: as for :class:`IndexedImages`; an item that cannot be read raises
            ``UnreadableImageError``. A tensor is sliced, without workers.
        batch_size: images tried per batch.
        num_workers: worker processes.
        pin_memory: page-locked memory, for faster copies to a GPU.

    Raises:
        ValueError: the dataset is empty, or ``batch_size`` below 1.
    """
    dataset = IndexedImages(images)
    rows = torch.arange(len(dataset), device="cpu")
    _check(rows, len(dataset))
    check_count("batch_size", batch_size)
    if isinstance(images, Tensor):
        batches = zip(images.split(batch_size), rows.split(batch_size), strict=True)
        return (TolerantBatch(batch, part, ()) for batch, part in batches)
    starts = range(0, len(dataset), batch_size)
    batches_of_rows = (rows[start : start + batch_size].tolist() for start in starts)
    return data_loader(Tolerant(dataset), batches_of_rows, num_workers, pin_memory)


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

    What a step receives depends only on ``seed`` and the step, to the bit: neither on the number of
    workers nor on where the run was resumed. The order of an epoch is drawn from (seed, epoch).
    While an image is made, torch's, Python's and NumPy's global generators start from (seed, epoch,
    position); afterwards they are restored. (This does not cover a dataset that draws from its own
    generator.)

    Args:
        images: as for :class:`IndexedImages`. A tensor is indexed directly, without workers.
        batch_size: B; the last batch of an epoch may be smaller.
        seed: not negative.
        epochs: passes over the images.
        start_step: steps to skip at the beginning: those already done.
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
    check_count("batch_size", batch_size)
    check_count("epochs", epochs)
    check_count("seed", seed, 0, _MOST)
    check_count("start_step", start_step, 0, _MOST)
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


def steps_per_epoch(count: int, batch_size: int) -> int:
    """Batches of an epoch of ``count`` images; the last may be smaller."""
    return math.ceil(count / batch_size)


def even_loader(
    images: Dataset[Any] | Tensor, batch_size: int, *, seed: int, num_workers: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """One shuffled pass in batches whose sizes differ by at most one, none of a single image.

    For batch statistics, which a small last batch would spoil.

    Args:
        images: as for :class:`IndexedImages`, at least two.
        batch_size: maximum images per batch, at least 2; with 2, an odd one out joins a pair.
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
    check_count("batch_size", batch_size, least=2)
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


def mixed_seed(*numbers: int) -> int:
    """One seed of 64 bits from several numbers, none negative; their order matters."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


@contextmanager
def seeded_torch(seed: int) -> Iterator[None]:
    """Seed torch's CPU generator within the block, and restore its state afterwards.

    ``torch.random.fork_rng`` and ``torch.manual_seed`` would touch the generators of GPUs.
    """
    before = torch.default_generator.get_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.default_generator.set_state(before)


@contextmanager
def seeded(*numbers: int) -> Iterator[None]:
    """As :func:`seeded_torch`, for the global generators of torch (CPU), Python and NumPy."""
    seed = mixed_seed(*numbers)
    # NumPy's legacy generator, which augmentations use; its seeds have 32 bits.
    before = random.getstate(), np.random.get_state()  # noqa: NPY002
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)  # noqa: NPY002
    try:
        with seeded_torch(seed):
            yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])  # noqa: NPY002


class LoadingError(OSError):
    """The system killed a process that loads images, or there is no memory left."""


@contextmanager
def loading_errors() -> Iterator[None]:
    """Turn errors that mean nothing to a user into :class:`LoadingError` with a way out.

    A worker's death is raised wherever the main process happens to be, so commands wrap everything
    that happens while images are loaded.

    Raises:
        LoadingError: a worker was killed, or there is no memory left.
    """
    try:
        yield
    except MemoryError as error:
        raise LoadingError(f"no memory is left. {_LESS}") from error
    except RuntimeError as error:
        # PyTorch has no type of its own for these.
        if not re.search(r"DataLoader worker \(pid|allocate memory|shared memory", str(error)):
            raise
        said = str(error).partition("\n")[0]
        raise LoadingError(
            f"a process that loads images was killed, most likely for lack of memory: {said} "
            f"{_LESS}"
        ) from error


class LoadingMeter:
    """Measures images per second, and whether loading or computing takes the time.

    Recent batches count most. Counts the images of all loaders in this process.
    """

    def __init__(self) -> None:
        self._images = self._waited = self._seconds = 0.0
        self._last = _handed_out, _waited, time.perf_counter()

    def text(self, rate: bool = True) -> str:
        """Text for a progress bar, once per batch; empty until an image was loaded.

        Args:
            rate: include the images per second.
        """
        now = _handed_out, _waited, time.perf_counter()
        images, waited, seconds = (new - old for new, old in zip(now, self._last, strict=True))
        self._last = now
        self._images = _FADING * self._images + images
        self._waited = _FADING * self._waited + waited
        self._seconds = _FADING * self._seconds + seconds
        if not self._images or not self._seconds:
            return ""
        share = min(1.0, self._waited / self._seconds)
        slower, share = ("loading", share) if share > 0.5 else ("computing", 1 - share)
        text = f"{share:.0%} of the time {slower}"
        return f"{self._images / self._seconds:.3g} images/s, {text}" if rate else text


def processors() -> int:
    """How many processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def started_workers(wanted: int) -> int:
    """Limit worker processes to four per processor. More would only take memory, and a config may
    come from a larger machine; the number does not change results."""
    return min(wanted, 4 * processors())


class Tolerant(Dataset[Item]):
    """Returns errors as items: one raised in a worker would arrive as a RuntimeError with a
    traceback, and lose the rest of its batch."""

    def __init__(self, images: Dataset[tuple[Tensor, int]]) -> None:
        self.images = images

    def __getitem__(self, index: int) -> Item:
        try:
            return self.images[index]
        except UnreadableImageError as error:
            return error, index


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


def data_loader(
    dataset: Dataset[Item],
    batches: Iterator[list[Any]],
    num_workers: int,
    pin_memory: bool,
) -> Iterator[TolerantBatch]:
    """Load one batch for each list of keys that ``batches`` yields.

    Args:
        dataset: items by key; the int in an item is the image's position.
        batches: consumed as the loader goes on: the keys of all epochs would be gigabytes.
        num_workers: worker processes, limited by :func:`started_workers`.
        pin_memory: page-locked memory.

    Raises:
        LoadingError: while iterating.
    """
    loader = loaded(
        DataLoader(
            cast("Dataset[TolerantBatch]", dataset),
            batch_sampler=batches,
            num_workers=started_workers(num_workers),
            collate_fn=_collate,
            pin_memory=pin_memory,
            worker_init_fn=_outlive_signals,
            # Otherwise the loader would draw the workers' seeds from the global generator.
            generator=torch.Generator("cpu").manual_seed(0),
        )
    )
    return _metered(loader)


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
    positions = torch.tensor(rows, dtype=torch.int64, device="cpu")
    return TolerantBatch(default_collate(read) if read else None, positions, tuple(failures))


def _outlive_signals(worker: int) -> None:
    """Ignore the signals that stop a run: they often reach its workers too, and it needs those to
    finish its step."""
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _ignore_once)  # torch sends a second one to a hanging worker


def _ignore_once(number: int, frame: object) -> None:
    signal.signal(number, signal.SIG_DFL)


def loaded(loader: Iterable[Batch]) -> Iterator[Batch]:
    """The batches of a ``DataLoader``, made on the CPU whatever torch's default device is.

    Raises:
        LoadingError: see :func:`loading_errors`.
    """
    with loading_errors(), torch.device("cpu"):
        batches = iter(loader)
    each = _each(batches)
    # An error's traceback may keep the iterator in a reference cycle. If the garbage collector has
    # to find it, PyTorch waits 5 seconds for each worker, in vain.
    if hasattr(batches, "_shutdown_workers"):
        weakref.finalize(each, batches._shutdown_workers)
    yield from each


def _each(batches: Iterator[Batch]) -> Iterator[Batch]:
    while True:
        with loading_errors(), torch.device("cpu"):  # not around yield: the rest is the caller's
            try:
                batch = next(batches)
            except StopIteration:
                return
        yield batch


def _metered(loader: Iterator[TolerantBatch]) -> Iterator[TolerantBatch]:
    global _handed_out, _waited
    started = time.perf_counter()
    for batch in loader:
        _waited += time.perf_counter() - started
        _handed_out += len(batch.positions) + len(batch.failures)
        yield batch
        started = time.perf_counter()
