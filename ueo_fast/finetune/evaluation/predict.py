"""Evaluation pass: the cosines of all images with all classes."""

from __future__ import annotations

import contextlib
import functools
import platform
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from ueo_fast.finetune.clip.model import ClipClassifier
from ueo_fast.finetune.data.loader import LoadingMeter, TolerantBatch, tolerant_loader
from ueo_fast.finetune.data.names import plural, shown
from ueo_fast.finetune.engine.training_config import ImagePass

PRECISIONS: dict[str, torch.dtype | None] = {
    "fp32": None,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
"""What the image tower computes in, under autocast; the weights stay float32."""


def cosine_error(precision: str, device: torch.device) -> float:
    """How far the cosines of one image may lie apart in batches of different sizes.

    Libraries add up in another order for another batch size. In float32 on a CPU that moved
    features of ViT-B-32 by up to 6e-7 and cosines by 1e-7; allowed are 16 roundings. Where numbers
    of 16 bits are rounded (on other devices in float32 too, whose convolutions may run in TF32) it
    is a sixteenth of one of their roundings, as a cosine averages over hundreds of numbers.
    """
    dtype = PRECISIONS[precision]
    if dtype is None and device.type == "cpu":
        return 16 * torch.finfo(torch.float32).eps
    return torch.finfo(dtype or torch.float16).eps / 16


def warn_of_slow(device: torch.device, dtype: torch.dtype | None) -> None:
    """Warn once in a process where bfloat16 is emulated."""
    if device.type == "cpu" and dtype == torch.bfloat16 and not _has_bfloat16():
        _warn_of_emulation()


def _has_bfloat16() -> bool:
    """Whether the processor multiplies it; also where that is not known (not x86)."""
    checks = [
        getattr(torch.cpu, name, None)
        for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    ]
    is_x86 = platform.machine().lower() in ("x86_64", "amd64")
    return not is_x86 or any(check is None or check() for check in checks)


@functools.cache
def _warn_of_emulation() -> None:
    warnings.warn(
        "precision='bf16': this processor has no instructions for bfloat16 and emulates it, many "
        "times slower than fp32; use precision='fp32' (--precision fp32)",
        stacklevel=4,
    )


class Failure(NamedTuple):
    """An image that could not be read: its position among the images, and why."""

    position: int
    reason: str


class Predicted(NamedTuple):
    """What the classifier says about one batch, or about all images (:func:`collect`).

    Attributes:
        positions: (B,) int64, ascending, of the images that could be read.
        cosines: (B, C) float32 on the CPU, of those images; B may be 0.
        failures: the other images.
        features: (B, E) float32 on the CPU, L2-normalised, of the images; ``None`` unless
            requested.
    """

    positions: Tensor
    cosines: Tensor
    failures: tuple[Failure, ...]
    features: Tensor | None = None


class HasImages(Protocol):
    """A batch of which some images may have failed."""

    @property
    def positions(self) -> Tensor:
        """(B,) int64, of the others."""

    @property
    def failures(self) -> tuple[Failure, ...]:
        """Those that failed."""


Batch = TypeVar("Batch", bound=HasImages)


def predict_batches(
    classifier: ClipClassifier,
    images: Dataset[Any] | Tensor,
    how: ImagePass | None = None,
    *,
    keep_features: bool = False,
    strict: bool = False,
) -> Iterator[Predicted]:
    """Cosines of every readable image with every class, batch by batch, in the order of ``images``.

    Memory does not grow with the number of images. The text features are computed once, before the
    first batch, in float32. Features are compared in float32 whatever the precision. The
    classifier's mode is left as it is (evaluation mode, unless somebody changed it).

    Args:
        classifier: the model, on the device where the work is to be done.
        images: a dataset or tensor of N un-augmented images; an item that cannot be read raises
            ``UnreadableImageError``. Or their features (N, E) from an earlier pass, as long as the
            image tower is the same.
        how: batch size, workers, precision and memory format; ``None``: the defaults. The batch
            size changes speed and memory, and cosines by rounding (:func:`cosine_error`).
        keep_features: return the images' features as well.
        strict: fail at the first image that cannot be read.

    Raises:
        ValueError: no image.
        UnreadableImageError: while iterating, with ``strict``.
    """
    how = how or ImagePass()
    device = classifier.logit_scale.device
    warn_of_slow(device, PRECISIONS[how.precision])
    loader = tolerant_loader(
        images, how.batch_size, num_workers=how.num_workers, pin_memory=device.type == "cuda"
    )
    return _predict(classifier, loader, how, keep_features, strict)


def on_device(images: Tensor, device: torch.device, channels_last: bool) -> Tensor:
    """Images (B, 3, H, W) where and as the image tower wants them; or features (B, E)."""
    like = torch.channels_last if channels_last and images.ndim == 4 else torch.preserve_format
    return images.to(device, non_blocking=True, memory_format=like)


def watched(
    title: str, images: int, show: bool | None = True
) -> Callable[[Iterator[Batch]], Iterator[Batch]]:
    """Pass batches of predictions on under a progress bar.

    Args:
        title: of the bar.
        images: how many there are in all.
        show: whether to show it; ``None``: where the standard error stream is a terminal.
    """

    def watch(batches: Iterator[Batch]) -> Iterator[Batch]:
        done = 0
        with image_bar(title, images, show) as advance:
            for batch in batches:
                done += len(batch.positions) + len(batch.failures)
                advance(done, images)
                yield batch

    return watch


@contextlib.contextmanager
def image_bar(
    title: str, images: int, show: bool | None = True
) -> Iterator[Callable[[int, int], None]]:
    """A progress bar of images that says what takes the time; arguments as for :func:`watched`.

    Yields:
        A function that moves the bar, called once per batch with images done and images in all.
    """
    from tqdm import tqdm

    hidden = None if show is None else not show
    meter = LoadingMeter()
    with tqdm(total=images, desc=title, unit="image", leave=False, disable=hidden) as bar:

        def advance(done: int, total: int) -> None:
            bar.set_postfix_str(meter.text(rate=False), refresh=False)
            bar.update(done - bar.n)

        yield advance


def collect(predicted: Iterable[Predicted]) -> Predicted:
    """All batches of :func:`predict_batches` as one."""
    batches = list(predicted)
    features = [batch.features for batch in batches if batch.features is not None]
    return Predicted(
        torch.cat([batch.positions for batch in batches]),
        torch.cat([batch.cosines for batch in batches]),
        tuple(failure for batch in batches for failure in batch.failures),
        torch.cat(features) if features else None,
    )


def predict_cosines(
    classifier: ClipClassifier, images: Dataset[Any] | Tensor, how: ImagePass | None = None
) -> Tensor:
    """(N, C) float32 cosines on the CPU: every image with every class, in the order given.

    Args:
        classifier: this and ``how`` as for :func:`predict_batches`.
        images: N images, all of which can be read.
        how: batch size, workers, precision and memory format.

    Raises:
        UnreadableImageError: an image cannot be read.
    """
    return collect(predict_batches(classifier, images, how, strict=True)).cosines


def unreadable_images(
    failures: Iterable[Failure], names: Sequence[str] | None, *, readable: int, strict: bool
) -> tuple[tuple[str, str], ...]:
    """(name, reason) of each image that could not be read.

    Args:
        failures: those images.
        names: of all images; ``None``: their positions.
        readable: how many of the images could be read.
        strict: refuse any failure.

    Raises:
        ValueError: no image could be read, or with ``strict`` one could not.
    """
    unreadable = tuple(
        (str(position) if names is None else names[position], reason)
        for position, reason in failures
    )
    if unreadable and (strict or not readable):
        name, reason = unreadable[0]
        count = plural(len(unreadable), "image")
        first = f"can be read, the first is {shown(name)}: {reason}"
        if not readable:
            raise ValueError(f"none of {count} {first}")
        raise ValueError(
            f"{count} cannot be read, the first is {shown(name)}: {reason}; fix or remove them, or "
            "leave out strict to skip them"
        )
    return unreadable


# Around the generator: its body runs without gradients, what its caller does in between does not.
@torch.no_grad()
def _predict(
    classifier: ClipClassifier,
    loader: Iterable[TolerantBatch],
    how: ImagePass,
    keep_features: bool,
    strict: bool,
) -> Iterator[Predicted]:
    device, precision = classifier.logit_scale.device, PRECISIONS[how.precision]
    text = classifier.text_features()
    for images, positions, errors in loader:
        if strict and errors:
            raise errors[0][1]
        failures = tuple(Failure(position, error.reason) for position, error in errors)
        if images is None:
            none, kept = (text.new_zeros(0, size, device="cpu") for size in text.shape)
            yield Predicted(positions, none, failures, kept if keep_features else None)
            continue
        batch = on_device(images, device, how.channels_last)
        if precision is None:
            features = classifier.image_features(batch)
        else:
            with torch.autocast(device.type, precision):
                features = classifier.image_features(batch)
            features = F.normalize(features.float(), dim=-1)
        cosines = classifier.compare(features, text).cosines.float().cpu()
        yield Predicted(positions, cosines, failures, features.cpu() if keep_features else None)
