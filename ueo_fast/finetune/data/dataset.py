"""Image files, or images in memory, as a dataset of tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from ueo_fast.finetune.data.decode import (
    Decoding,
    UnreadableImageError,
    as_rgb,
    open_rgb,
    opened,
)
from ueo_fast.finetune.data.image_list import ImageList
from ueo_fast.finetune.data.transforms import Transform


class ImageDataset(Dataset[Tensor]):
    """Decodes and transforms one image per item, ``dataset[i] -> (3, H, W)``.

    Item ``i`` is image ``i`` of the list; labels are not handed out.

    Args:
        images: what to read.
        transform: from RGB to a tensor (3, H, W); see :mod:`ueo_fast.finetune.data.transforms`.
        decode: ``auto`` decodes JPEG at a reduced size where a ``Transform`` needs no more;
            ``full`` decodes all pixels of every image, as any other callable gets them anyway.

    Raises:
        UnreadableImageError: by ``dataset[i]``, where the file cannot be decoded.
    """

    def __init__(
        self,
        images: ImageList,
        transform: Callable[[Image.Image], Tensor],
        decode: Decoding = "auto",
    ) -> None:
        self.images = images
        self.transform = transform
        self.decode = decode

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        path = self.images.paths[index]
        if self.decode == "full" or not isinstance(self.transform, Transform):
            return self.transform(open_rgb(path))
        with opened(path) as encoded:
            view = self.transform.view(encoded.size)
            return view.of(encoded.decode(view.max_reduction))


class PictureDataset(Dataset[Tensor]):
    """Transforms images that PIL has opened, ``dataset[i] -> (3, H, W)``.

    They are decoded at once, in full: an open file cannot be shared with the processes of a loader.

    Args:
        pictures: of any mode.
        transform: as for :class:`ImageDataset`.

    Raises:
        UnreadableImageError: by ``dataset[i]``, where the image cannot be decoded.
    """

    def __init__(
        self, pictures: Sequence[Image.Image], transform: Callable[[Image.Image], Tensor]
    ) -> None:
        self.pictures = [_decoded(str(i), picture) for i, picture in enumerate(pictures)]
        self.transform = transform

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> Tensor:
        picture = self.pictures[index]
        if isinstance(picture, UnreadableImageError):
            raise picture
        return self.transform(picture)


def _decoded(name: str, picture: Image.Image) -> Image.Image | UnreadableImageError:
    try:
        return as_rgb(picture, getattr(picture, "filename", "") or name)
    except UnreadableImageError as error:
        return error
