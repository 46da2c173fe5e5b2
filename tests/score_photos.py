"""Photographs, classifier and table for the tests of the scores."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
from PIL import Image

from ueo_fast.finetune.clip.model import ClipClassifier
from ueo_fast.finetune.clip.prompt import PromptLearner
from ueo_fast.finetune.data import transforms
from ueo_fast.finetune.data.image_list import ImageList
from ueo_fast.finetune.data.views import ImageDataset
from ueo_fast.finetune.demo.tiny_clip import tiny_clip, tiny_tokenizer

NAMES = ["red", "green", "dark_blue", "x, y"]
ODD = ['red/ü 猫, "quoted".png', "red/line\nbreak.png", "green/=1+1.png", "dark blue/a.png"]
UNKNOWN = ["mauve/1.png", "mauve/2.png"]
BROKEN = ["green/broken.png", "mauve/empty.jpg"]


def make_classifier(names: list[str] = NAMES) -> ClipClassifier:
    model = tiny_clip("vit", seed=0)
    return ClipClassifier(model, PromptLearner(model, tiny_tokenizer(), names), patch=False)


def make_photos(folder: Path) -> Path:
    """Images with odd names, two that are broken; returns ``folder``."""
    generator = np.random.default_rng(0)
    for name in [*ODD, *UNKNOWN, *(f"green/{i}.png" for i in range(6))]:
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (40, 32, 3), dtype=np.uint8)).save(path)
    (folder / BROKEN[0]).write_bytes(b"\x89PNG\r\n\x1a\n no more")
    (folder / BROKEN[1]).write_bytes(b"")
    return folder


def dataset_of(classifier: ClipClassifier, images: ImageList) -> ImageDataset:
    return ImageDataset(
        images, transforms.test_transform(transforms.preprocessing(classifier.model))
    )


def read_csv(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))
