"""A default device (``torch.set_default_device``) changes nothing: indices are made on the CPU.

``meta`` stands for a GPU: what is made on it by mistake cannot be used with the images.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from photo_folder import KNOWN, photo_folder
from tiny_problem import make_classifier, make_images

from ueo_fast.finetune.data.image_list import read_images
from ueo_fast.finetune.data.labels import match_labels
from ueo_fast.finetune.data.loader import even_loader, tolerant_loader, training_batches
from ueo_fast.finetune.data.views import views_of
from ueo_fast.finetune.engine.trainer import TrainerConfig
from ueo_fast.finetune.methods import METHODS, make_method
from ueo_fast.finetune.target import Target, zero_shot_target


@pytest.fixture
def elsewhere() -> Iterator[None]:
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_learns_the_same(name: str) -> None:
    config = TrainerConfig(epochs=2, batch_size=4, prompt_lr=0.05, affine_lr=0.02)
    learnt = []
    images = make_images(9)
    labels = torch.arange(9) % 3
    for device in ("cpu", "meta"):
        classifier = make_classifier()
        torch.set_default_device(device)
        try:
            seen = zero_shot_target(classifier, images)
            target = Target(images, None, seen.cosines, labels)
            make_method(name).adapt(classifier, target, config=config)
        finally:
            torch.set_default_device(None)
        learnt.append(classifier.state_dict())
    assert all(torch.equal(learnt[0][key], learnt[1][key]) for key in learnt[0])


@pytest.mark.parametrize("workers", [0, 2])
def test_files_are_read_and_augmented_alike(tmp_path: Path, workers: int) -> None:
    images = read_images(photo_folder(tmp_path, per_class=1))
    readable = images.subset([i for i, name in enumerate(images.names) if "broken" not in name])
    model = make_classifier().model
    read = []
    for device in ("cpu", "meta"):
        torch.set_default_device(device)
        try:
            views = views_of(readable, model, None, "auto")
            batches = training_batches(views.augmented, 5, seed=1, epochs=1, num_workers=workers)
            plain = tolerant_loader(views.plain, 5, num_workers=workers)
            even = even_loader(views.plain, 5, seed=1, num_workers=workers)
            read.append(
                [
                    *(tensor for batch in batches for tensor in (batch.images, batch.positions)),
                    *(tensor for batch in plain for tensor in (batch.images, batch.positions)),
                    *(tensor for batch in even for tensor in batch),
                ]
            )
        finally:
            torch.set_default_device(None)
    assert len(read[0]) == len(read[1])
    assert all(torch.equal(one, other) for one, other in zip(*read, strict=True))


def test_labels_are_on_the_cpu(tmp_path: Path, elsewhere: None) -> None:
    found = match_labels(read_images(photo_folder(tmp_path, per_class=1)), KNOWN)
    assert found is not None
    assert found.device.type == "cpu"
