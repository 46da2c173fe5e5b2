"""Batches of images of which some may be unreadable."""

from __future__ import annotations

import os
import re
import signal
import time
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar, cast

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
Batch = TypeVar("Batch")


class LoadingError(OSError):
    """The system ended a process that loads images, or has no memory left for one."""


class LoadingMeter:
    """How many images pass per second, and whether loading or computing takes the time. Recent
    batches count most.

    Counts the images of all loaders in this process.
    """

    def __init__(self) -> None:
        self._images = self._waited = self._seconds = 0.0
        self._last = _handed_out, _waited, time.perf_counter()

    def text(self, rate: bool = True) -> str:
        """For a progress bar, once per batch; empty as long as no image was loaded.

        Args:
            rate: with the images per second.
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


_FADING = 0.9
_handed_out = 0
_waited = 0.0


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
) -> Iterator[TolerantBatch]:
    """Loads one batch for each list of keys that ``batches`` yields.

    Args:
        dataset: items by key; the int in an item is the image's position.
        batches: drawn from as the loader goes on: the keys of all epochs would be gigabytes.
        num_workers: worker processes, as far as :func:`started_workers` allows.
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
            # Else the loader would draw the workers' seeds from the global generator.
            generator=torch.Generator("cpu").manual_seed(0),
        )
    )
    return _metered(loader)


def _metered(loader: Iterator[TolerantBatch]) -> Iterator[TolerantBatch]:
    global _handed_out, _waited
    started = time.perf_counter()
    for batch in loader:
        _waited += time.perf_counter() - started
        _handed_out += len(batch.positions) + len(batch.failures)
        yield batch
        started = time.perf_counter()


def started_workers(wanted: int) -> int:
    """How many worker processes are started: at most four per processor. More only take memory, and
    a config may come from a larger machine; the number changes no result."""
    return min(wanted, 4 * processors())


def processors() -> int:
    """How many processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def loaded(loader: Iterable[Batch]) -> Iterator[Batch]:
    """The batches of a ``DataLoader``, made on the CPU whatever torch's default device is.

    Raises:
        LoadingError: as :func:`loading_errors` says.
    """
    with loading_errors(), torch.device("cpu"):
        batches = iter(loader)
    each = _each(batches)
    # An error's traceback may keep the iterator in a reference cycle. Where the garbage collector
    # has to find it, PyTorch waits 5 seconds for each worker, in vain.
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


@contextmanager
def loading_errors() -> Iterator[None]:
    """Gives errors that say nothing to a user a message with the way to go on.

    A worker's death is raised wherever the main process happens to be, so commands have it around
    all that happens while images are loaded.

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
            f"a process that loads images was ended, most likely for lack of memory: {said} {_LESS}"
        ) from error


_LESS = (
    "Use fewer processes (--workers 1, or 0; in Python num_workers) or a smaller batch, or scale "
    "large images down"
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
    positions = torch.tensor(rows, dtype=torch.int64, device="cpu")
    return TolerantBatch(default_collate(read) if read else None, positions, tuple(failures))
