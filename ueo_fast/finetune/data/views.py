"""The images that a user gives, as evaluation and as training see them."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any, NamedTuple, cast

from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset

from ueo_fast.finetune.data import Decoding
from ueo_fast.finetune.data.copies import Copies, Picture, as_picture, read_picture
from ueo_fast.finetune.data.decode import UnreadableImageError, as_rgb, open_rgb
from ueo_fast.finetune.data.image_list import ImageList, read_images
from ueo_fast.finetune.data.labels import match_labels
from ueo_fast.finetune.data.names import counted, printable
from ueo_fast.finetune.data.transforms import (
    Transform,
    preprocessing,
    test_transform,
    training_transform,
)

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


class ImageDataset(Dataset[Tensor]):
    """Decodes and transforms one image per item, ``dataset[i] -> (3, H, W)``.

    Item ``i`` is image ``i`` of the list; labels are not handed out.

    Args:
        images: what to read.
        transform: from RGB to a tensor (3, H, W); see :mod:`ueo_fast.finetune.data.transforms`.
        decode: ``auto`` makes the views of a ``Transform`` from a copy with twice the model's
            pixels per side; ``full`` from all pixels, which any other callable gets anyway.
        copies: keeps those copies; ``None``: each is made when needed.

    Raises:
        UnreadableImageError: by ``dataset[i]``, where the file cannot be decoded.
    """

    def __init__(
        self,
        images: ImageList,
        transform: Callable[[Image.Image], Tensor],
        decode: Decoding = "auto",
        copies: Copies | None = None,
    ) -> None:
        self.images = images
        self.transform = transform
        self.decode = decode
        self.copies = copies

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        path = self.images.paths[index]
        if self.decode == "full" or not isinstance(self.transform, Transform):
            return self.transform(open_rgb(path))
        read = read_picture if self.copies is None else self.copies.read
        return self.transform.of(read(path, self.transform.size))


class PictureDataset(Dataset[Tensor]):
    """Transforms images that PIL has opened, ``dataset[i] -> (3, H, W)``.

    They are decoded at once: an open file cannot be shared with the processes of a loader.

    Args:
        pictures: of any mode.
        transform: as for :class:`ImageDataset`.
        decode: as for :class:`ImageDataset`.

    Raises:
        UnreadableImageError: by ``dataset[i]``, where the image cannot be decoded.
    """

    def __init__(
        self,
        pictures: Sequence[Image.Image],
        transform: Transform,
        decode: Decoding = "auto",
    ) -> None:
        self.transform = transform
        self.pictures = [self._decoded(str(i), one, decode) for i, one in enumerate(pictures)]

    def with_transform(self, transform: Transform) -> PictureDataset:
        """The same pictures under another transform to the same size."""
        other = PictureDataset((), transform)
        other.pictures = self.pictures
        return other

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> Tensor:
        picture = self.pictures[index]
        if isinstance(picture, UnreadableImageError):
            raise picture
        if isinstance(picture, Picture):
            return self.transform.of(picture)
        return self.transform(picture)

    def _decoded(
        self, name: str, image: Image.Image, decode: Decoding
    ) -> Picture | Image.Image | UnreadableImageError:
        name = getattr(image, "filename", "") or name
        try:
            if decode == "full":
                return as_rgb(image, name)
            return as_picture(image, name, self.transform.size)
        except UnreadableImageError as error:
            return error


class Views(NamedTuple):
    """The same N images, as evaluation and as training see them.

    Attributes:
        plain: un-augmented.
        augmented: with a new random augmentation at each access; ``None`` without augmentation.
        labels: (N,) int64, or ``None``.
        names: N names: of the files if there are files, otherwise positions.
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
        labels: (N,) int64, for images without labels of their own.
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
    """Labels of a folder or list. Only metrics and the oracle need them, so labels that cannot be
    used are ignored, for example because of a photo outside the class folders."""
    try:
        return match_labels(images, known, on_note=warnings.warn if needs_labels else None)
    except ValueError:
        if needs_labels:
            raise
        return None


def _one_of_each(images: Any) -> ImageList | tuple[Image.Image, ...] | Dataset[Any] | Tensor:
    """Reduce what a user gives to one of four: files, pictures in memory, a dataset, a tensor."""
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
