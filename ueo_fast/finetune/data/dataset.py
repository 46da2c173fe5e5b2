"""Image files, or images in memory, as a dataset of pixels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from ueo_fast.finetune.data.choices import Decoding
from ueo_fast.finetune.data.decode import UnreadableImageError, as_rgb, open_rgb
from ueo_fast.finetune.data.image_list import ImageList
from ueo_fast.finetune.data.pictures import Picture, as_picture, read_picture
from ueo_fast.finetune.data.transforms import Transform

if TYPE_CHECKING:
    from ueo_fast.finetune.data.copies import Copies


class ImageDataset(Dataset[Tensor]):
    """Decodes and transforms one image per item, ``dataset[i] -> (3, H, W)``.

    Item ``i`` is image ``i`` of the list; labels are not handed out.

    Args:
        images: what to read.
        transform: from RGB to a tensor (3, H, W); see :mod:`ueo_fast.finetune.data.transforms`.
        decode: ``auto`` makes the views of a ``Transform`` from a copy with twice the model's
            pixels per side; ``full`` from all pixels, as any other callable gets them anyway.
        copies: keeps those copies; ``None``: each is made when it is needed.

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
