"""A list of images as a dataset of tensors."""

from __future__ import annotations

from collections.abc import Callable

from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from ueo_fast.finetune.data.decode import open_rgb
from ueo_fast.finetune.data.image_list import ImageList


class ImageDataset(Dataset[Tensor]):
    """Decodes and transforms one image per item, ``dataset[i] -> (3, H, W)``.

    Item ``i`` is image ``i`` of the list; labels are not handed out.

    Args:
        images: what to read.
        transform: from RGB to a tensor (3, H, W); see :mod:`ueo_fast.finetune.data.transforms`.

    Raises:
        UnreadableImageError: by ``dataset[i]``, where the file cannot be decoded.
    """

    def __init__(self, images: ImageList, transform: Callable[[Image.Image], Tensor]) -> None:
        self.images = images
        self.transform = transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.transform(open_rgb(self.images.paths[index]))
