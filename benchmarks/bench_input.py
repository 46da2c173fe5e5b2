"""Time from a JPEG to the model's input, on one core: decode, resize or augment, and normalise.

Ours is timed in the first pass, which decodes and keeps a copy, and in later epochs, which read it.
The files are scikit-learn's two photographs, extended by mirrored copies to 12, 2 and 0.2
megapixels, so they have as much detail per pixel as the originals. Contenders take turns, as in
bench_ueo_loss.py. `python -m benchmarks input` runs this file and writes a CSV.
"""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from PIL import Image

from benchmarks import turns

SIZES = {"12": (4000, 3000), "2": (1632, 1224), "0.2": (512, 384)}
"""By megapixels."""
if os.environ.get("UEO_FAST_BENCH_CASES") == "tiny":
    SIZES = {"0.8": (1024, 768)}
VIEWS = {"first pass": "test", "later epochs": "training"}
"""The part of a run that is timed, and the view of an image that it takes."""
CONTENDERS = ("ueo_fast", "authors", "tensors")
CONFIG = {"size": 224, "mean": OPENAI_DATASET_MEAN, "std": OPENAI_DATASET_STD}
Load = Callable[[str], torch.Tensor]
_FOLDER = tempfile.TemporaryDirectory()  # until the process ends


@functools.cache
def photographs(megapixels: str) -> tuple[str, ...]:
    """Paths of two JPEGs."""
    from sklearn.datasets import load_sample_images

    width, height = SIZES[megapixels]
    paths = []
    for number, pixels in enumerate(load_sample_images().images):
        rows, columns = pixels.shape[:2]
        margins = ((0, max(0, height - rows)), (0, max(0, width - columns)), (0, 0))
        image = Image.fromarray(np.pad(pixels, margins, "symmetric")[:height, :width])
        paths.append(f"{_FOLDER.name}/{number} {width}.jpg")
        image.save(paths[-1], quality=90)
    return tuple(paths)


def ours(view: str) -> Load:
    """Load through a copy on disk; in the first pass the file counts as changed each time."""
    from ueo_fast.finetune.data import transforms
    from ueo_fast.finetune.data.copies import Copies
    from ueo_fast.finetune.data.image_list import ImageList
    from ueo_fast.finetune.data.views import ImageDataset

    make = transforms.test_transform if view == "test" else transforms.training_transform
    transform = make(CONFIG)
    copies = Copies(f"{_FOLDER.name}/{view}")
    mean, std = torch.tensor(CONFIG["mean"]), torch.tensor(CONFIG["std"])

    def load(path: str) -> torch.Tensor:
        if view == "test":
            os.utime(path)
        pixels = ImageDataset(ImageList((path,), (path,)), transform, copies=copies)[0]
        return transforms.normalize(pixels[None], mean, std)[0]

    return load


def composed(tv: Any, view: str, to_float: Callable[[Any], torch.Tensor]) -> Any:
    """Compose the authors' transforms of a view from one of torchvision's modules of transforms."""
    size, bicubic = CONFIG["size"], tv.InterpolationMode.BICUBIC
    seen = {
        "test": [tv.Resize(size, interpolation=bicubic), tv.CenterCrop(size)],
        "training": [
            tv.RandomResizedCrop(size, scale=(0.5, 1), interpolation=bicubic),
            tv.RandomHorizontalFlip(),
        ],
    }[view]
    return tv.Compose([*seen, to_float, tv.Normalize(CONFIG["mean"], CONFIG["std"])])


def authors(view: str) -> Load:
    """Load as their `demo.py` does."""
    from torchvision import transforms as tv

    transform = composed(tv, view, tv.ToTensor())
    return lambda path: transform(Image.open(path).convert("RGB"))


def tensors(view: str) -> Load:
    """Load with torchvision's decoder, which 0.29 deprecates in favour of TorchCodec, and with
    transforms of uint8 tensors."""
    from torchvision import io
    from torchvision.transforms import v2

    transform = composed(v2, view, v2.ToDtype(torch.float32, scale=True))
    return lambda path: transform(io.decode_jpeg(io.read_file(path), io.ImageReadMode.RGB))


MAKERS = {"ueo_fast": ours, "authors": authors, "tensors": tensors}


def contender(name: str, case: tuple[str, str]) -> turns.Run:
    """Load both photographs, with the same random numbers in every call."""
    from ueo_fast.finetune.data.loader import seeded_torch

    megapixels, view = case[0], VIEWS[case[1]]
    paths, load = photographs(megapixels), MAKERS[name](view)

    def run(load: Load = load) -> list[torch.Tensor]:
        with seeded_torch(0):
            return [load(path) for path in paths]

    for found, wanted in zip(run(), run(authors(view)), strict=True):
        assert found.shape == wanted.shape
        # Values have a deviation of about 1; crops are rounded to pixels of the copy.
        assert float((found - wanted).abs().mean()) < (0.02 if view == "test" else 0.08)
    return run


@pytest.fixture(scope="module")
def prepared():
    return turns.Prepared(contender)


@pytest.mark.filterwarnings("ignore:The image decoding and encoding:DeprecationWarning")
@pytest.mark.parametrize("name", CONTENDERS)
@pytest.mark.parametrize("repeat", range(turns.REPEATS))
@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("megapixels", SIZES)
def test_load(benchmark, prepared, megapixels, view, repeat, name):
    run, seconds = prepared.get((megapixels, view), name)
    benchmark.group = f"{megapixels} {view}"
    images = len(photographs(megapixels))
    size = round(sum(Path(path).stat().st_size for path in photographs(megapixels)) / 1000 / images)
    benchmark.extra_info.update(
        megapixels=megapixels, view=view, images=images, kb=size, contender=name, repeat=repeat
    )
    benchmark.pedantic(run, rounds=turns.calls(seconds))
