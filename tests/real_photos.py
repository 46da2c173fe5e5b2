"""JPEGs of any size made from the photographs that scikit-learn brings."""

from __future__ import annotations

from pathlib import Path

from PIL import Image
from sklearn.datasets import load_sample_images


def real_photo(number: int, size: tuple[int, int], box: tuple[int, int, int, int] | None = None):
    """Photograph 0 (a temple) or 1 (a flower), or a box of its 640 x 427 pixels, at ``size``."""
    image = Image.fromarray(load_sample_images().images[number])
    return image.resize(size, Image.Resampling.LANCZOS, box)


def save_jpeg(image: Image.Image, path: Path, **options: object) -> Path:
    image.save(path, "JPEG", **{"quality": 90, **options})
    return path
