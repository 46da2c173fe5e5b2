"""The images that a user gives, as evaluation and as training see them."""

from __future__ import annotations

import contextlib
import os
import tempfile
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence, Sized
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset

from ueo_fast.finetune.data.choices import Decoding, check_cache
from ueo_fast.finetune.data.dataset import ImageDataset, PictureDataset
from ueo_fast.finetune.data.image_list import ImageList, read_images
from ueo_fast.finetune.data.labels import match_labels
from ueo_fast.finetune.data.names import counted, printable
from ueo_fast.finetune.data.transforms import preprocessing, test_transform, training_transform

if TYPE_CHECKING:
    from ueo_fast.finetune.data.copies import Copies

Images = (
    str
    | os.PathLike[str]
    | Image.Image
    | ImageList
    | Iterable[str | os.PathLike[str] | Image.Image]
    | Dataset[Any]
    | Tensor
)
"""A folder, list file, CSV or image file; paths of image files; images that PIL has opened; or
images that are tensors already."""


class Views(NamedTuple):
    """The same N images, as evaluation and as training see them.

    Attributes:
        plain: un-augmented.
        augmented: with a new random augmentation at each access; ``None`` without augmentation.
        labels: (N,) int64, or ``None``.
        names: N of them: the files' where there are files, else positions.
    """

    plain: Dataset[Any] | Tensor
    augmented: Dataset[Any] | None
    labels: Tensor | None
    names: tuple[str, ...]


def views_of(
    images: ImageList,
    model: nn.Module,
    labels: Tensor | None,
    decode: Decoding,
    copies: Copies | None = None,
) -> Views:
    """Image files with the model's own preprocessing and the authors' augmentation."""
    preprocess = preprocessing(model)
    return Views(
        ImageDataset(images, test_transform(preprocess), decode, copies),
        ImageDataset(images, training_transform(preprocess), decode, copies),
        labels,
        images.names,
    )


def make_views(
    images: Images,
    model: nn.Module,
    class_names: Sequence[str],
    augmented: Dataset[Any] | None = None,
    labels: Tensor | None = None,
    *,
    needs_labels: bool = False,
    decode: Decoding = "auto",
    copies: Copies | None = None,
) -> Views:
    """Prepare any kind of images for a model.

    Args:
        images: see :data:`Images`.
        model: its preprocessing is used.
        class_names: positions in them are the labels.
        augmented: with a dataset: the same images, randomly augmented anew at each access.
        labels: (N,) int64, of images that bring none.
        needs_labels: fail if the images' own labels cannot be used.
        decode: how images are decoded.
        copies: keeps small copies of image files.

    Raises:
        TypeError, ValueError, OSError: an argument is unusable.
    """
    images = _one_of_each(images)
    if labels is not None:
        _check_given_labels(labels, len(class_names))
    if augmented is not None and isinstance(images, ImageList | tuple):
        raise ValueError(
            "augmented goes with a dataset or tensor of images; image files are augmented anyway"
        )
    if isinstance(images, tuple):
        preprocess = preprocessing(model)
        plain = PictureDataset(images, test_transform(preprocess), decode)
        seen = plain.with_transform(training_transform(preprocess))
        return Views(plain, seen, labels, tuple(map(str, range(len(images)))))
    if not isinstance(images, ImageList):
        return Views(images, augmented, labels, tuple(map(str, range(len(cast(Sized, images))))))
    if labels is None:
        labels = _labels(images, class_names, needs_labels=needs_labels)
    elif images.labels is not None:
        raise ValueError(
            "labels goes with images that have none; those of a folder, list file or CSV with "
            "labels bring their own"
        )
    elif len(labels) != len(images):
        raise ValueError(f"labels has {len(labels)} entries, but there are {len(images)} images")
    return views_of(images, model, labels, decode, copies)


def open_copies(
    cache: str | os.PathLike[str], folder: Path, decode: Decoding, most_bytes: int | None = None
) -> Copies | None:
    """Where copies of image files are kept; ``None``: nowhere.

    Args:
        cache: ``auto``, ``off``, or a folder.
        folder: what ``auto`` stands for.
        decode: ``full`` has no use for copies.
        most_bytes: as for :class:`~ueo_fast.finetune.data.copies.Copies`.

    Raises:
        TypeError, ValueError: as :func:`~ueo_fast.finetune.data.choices.check_cache` says.
        OSError: the folder cannot be made.
    """
    check_cache(cache, decode)
    if decode == "full" or cache == "off":
        return None
    try:
        from ueo_fast.finetune.data.copies import Copies
    except ImportError as error:
        warnings.warn(
            f"images are decoded in every epoch, as this Python has no sqlite3 ({error}); "
            "cache='off' (--cache off) says that it may be so",
            stacklevel=2,
        )
        return None
    return Copies(folder if cache == "auto" else cache, most_bytes)


@contextlib.contextmanager
def temporary_copies(cache: str | os.PathLike[str], decode: Decoding) -> Iterator[Copies | None]:
    """As :func:`open_copies`; ``auto`` stands for a folder that is there while the block runs.
    Where none can be made (a container without a place to write) nothing is kept. Warns at the end
    where some copies could not be kept."""
    if cache != "auto" or decode == "full":
        copies = open_copies(cache, Path(), decode)
        try:
            yield copies
        finally:
            if copies is not None:
                _warn_if_stopped(copies)
                copies.close()
        return
    with contextlib.ExitStack() as stack:
        try:
            own = tempfile.TemporaryDirectory(prefix="ueo_fast-", ignore_cleanup_errors=True)
            copies = open_copies(cache, Path(stack.enter_context(own)), decode)
        except OSError as error:
            warnings.warn(
                f"images are decoded in every pass, as their copies have no place: {error}. Set "
                "TMPDIR to a folder that can be written (in Python cache=DIR does as well)",
                stacklevel=2,
            )
            copies = None
        if copies is not None:
            stack.callback(copies.remove)
            stack.callback(_warn_if_stopped, copies)
        yield copies


def _warn_if_stopped(copies: Copies) -> None:
    if copies.stopped is not None:
        warnings.warn(copies.text(), stacklevel=2)


def _check_given_labels(labels: object, classes: int) -> None:
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.ndim != 1:
        raise TypeError(
            f"labels must be a tensor (N,) of integers, got {type(labels).__name__}: "
            "torch.tensor([0, 1, -1]), for example"
        )
    odd = labels[(labels < -1) | (labels >= classes)]
    if len(odd):
        raise ValueError(
            f"labels has {int(odd[0])}, but must be positions in class_names, from 0 to "
            f"{classes - 1}, or -1 for an image of none of them"
        )


def _labels(images: ImageList, known: Sequence[str], *, needs_labels: bool) -> Tensor | None:
    """Of a folder or list. Nothing but metrics and the oracle needs them, so that images can do
    without where they cannot be used: a photograph outside the class folders."""
    try:
        return match_labels(images, known, on_note=warnings.warn if needs_labels else None)
    except ValueError:
        if needs_labels:
            raise
        return None


def _one_of_each(images: Any) -> ImageList | tuple[Image.Image, ...] | Dataset[Any] | Tensor:
    """Whatever a user gives, as one of four: files, pictures in memory, a dataset, a tensor."""
    if isinstance(images, str | os.PathLike):
        found = read_images(images)
        for text in found.remarks():
            warnings.warn(f"{printable(images)}: {text}", UserWarning, stacklevel=4)
        return found
    if isinstance(images, Image.Image):
        return (images,)
    if isinstance(images, Iterator) or _is_collection(images):
        images = list(images)
    if isinstance(images, list | tuple) and not isinstance(images, Tensor):
        if not images:
            raise ValueError("images is empty: give at least one image")
        for kinds, make in (((str, os.PathLike), _files), ((Image.Image,), tuple)):
            if isinstance(images[0], kinds):
                for place, item in enumerate(images):
                    if not isinstance(item, kinds):
                        raise TypeError(
                            f"images[{place}] is of type {type(item).__name__}, but images[0] of "
                            f"type {type(images[0]).__name__}: give paths or PIL images, not both"
                        )
                return make(images)
        if not isinstance(images[0], Tensor | list | tuple):
            raise TypeError(
                f"images[0] is of type {type(images[0]).__name__}, but must be a path, a PIL image "
                "(PIL.Image.fromarray makes one of an array), or a preprocessed tensor (3, H, W)"
            )
    if isinstance(images, ImageList):
        return images
    if isinstance(images, Tensor) and (images.ndim != 4 or images.shape[1] != 3):
        raise ValueError(
            f"images has shape {tuple(images.shape)}, but a tensor of images is (N, 3, H, W), "
            "preprocessed for the model"
        )
    if isinstance(images, Tensor) and not images.is_floating_point():
        raise TypeError(
            f"images has dtype {images.dtype}, but a tensor of images is floating point, "
            "preprocessed for the model"
        )
    indexed = hasattr(images, "__len__") and hasattr(images, "__getitem__")
    if not indexed or isinstance(images, Mapping):
        raise TypeError(
            f"images is of type {type(images).__name__}, but must be a folder, list file or CSV, "
            "an ImageList, paths of image files, PIL images, a tensor (N, 3, H, W), or a dataset "
            "with a length"
        )
    return cast("Dataset[Any] | Tensor", images)


def _is_collection(images: object) -> bool:
    """Whether they are paths or PIL images in an array, a deque, a column of a table, ..."""
    if not isinstance(images, Collection) or isinstance(images, Tensor | Mapping):
        return False
    return isinstance(next(iter(images), None), str | os.PathLike | Image.Image)


def _files(paths: Sequence[str | os.PathLike[str]]) -> ImageList:
    files = tuple(os.fspath(path) for path in paths)
    missing = [printable(path) for path in files if not os.path.isfile(path)]
    if missing:
        raise FileNotFoundError(
            f"images: {counted(missing)} of {len(files)} paths are not a file; relative paths "
            f"start at the current folder, {printable(os.getcwd())}, and a folder is given by "
            "itself, not in a list"
        )
    return ImageList(files, tuple(map(printable, files)))
