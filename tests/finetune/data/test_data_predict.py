"""Evaluation pass: streaming, precision, and images that cannot be read."""

from __future__ import annotations

import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import TensorDataset

from ueo_fast.finetune.clip.model import ClipClassifier
from ueo_fast.finetune.clip.prompt import PromptLearner
from ueo_fast.finetune.data.decode import UnreadableImageError
from ueo_fast.finetune.data.image_list import read_images
from ueo_fast.finetune.data.transforms import test_transform
from ueo_fast.finetune.data.views import ImageDataset
from ueo_fast.finetune.demo.tiny_clip import tiny_clip, tiny_tokenizer
from ueo_fast.finetune.engine.training_config import ImagePass
from ueo_fast.finetune.evaluation.predict import (
    PRECISIONS,
    collect,
    predict_batches,
    predict_cosines,
)


def make_classifier(tower: str = "bn") -> ClipClassifier:
    model = tiny_clip(tower, seed=0).eval()
    return ClipClassifier(model, PromptLearner(model, tiny_tokenizer(), ["one", "two", "three"]))


def make_images(count: int) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def folder(tmp_path: Path) -> ImageDataset:
    """Seven files, the second and the last of which are broken."""
    rng = np.random.default_rng(0)
    for index in range(7):
        pixels = rng.integers(0, 256, (40, 36, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{index}.png")
    (tmp_path / "1.png").write_bytes(b"")
    (tmp_path / "6.png").write_bytes((tmp_path / "6.png").read_bytes()[:900])
    return ImageDataset(read_images(tmp_path), test_transform({"size": 32}))


@pytest.mark.parametrize("tower", ["bn", "vit"])
def test_cosines_are_the_classifiers(tower: str) -> None:
    classifier, images = make_classifier(tower), make_images(6)
    with torch.no_grad():
        wanted = classifier(images).cosines
    found = predict_cosines(classifier, images)
    assert (found.shape, found.dtype) == ((6, 3), torch.float32)
    assert torch.equal(found, wanted)
    assert not found.requires_grad
    dataset = predict_cosines(classifier, TensorDataset(images), ImagePass(num_workers=1))
    assert torch.equal(dataset, wanted)


def test_predictions_do_not_depend_on_the_batch_size() -> None:
    classifier, images = make_classifier(), make_images(10)
    torch.testing.assert_close(
        predict_cosines(classifier, images, ImagePass(batch_size=3)),
        predict_cosines(classifier, images),
        rtol=0,
        atol=1e-6,
    )


@pytest.mark.parametrize("num_workers", [0, 2])
def test_unreadable_files_are_skipped_and_told(folder: ImageDataset, num_workers: int) -> None:
    classifier = make_classifier()
    how = ImagePass(batch_size=2, num_workers=num_workers)
    batches = list(predict_batches(classifier, folder, how))
    assert [batch.positions.tolist() for batch in batches] == [[0], [2, 3], [4, 5], []]
    assert [batch.cosines.shape for batch in batches] == [(1, 3), (2, 3), (2, 3), (0, 3)]
    assert batches[0].failures == ((1, "the file is empty"),)
    assert batches[3].failures[0].position == 6
    assert "truncated" in batches[3].failures[0].reason
    good = torch.stack([folder[i] for i in (0, 2, 3, 4, 5)])
    readable = collect(batches)
    torch.testing.assert_close(
        readable.cosines, predict_cosines(classifier, good), rtol=0, atol=1e-6
    )
    assert readable.positions.tolist() == [0, 2, 3, 4, 5]
    assert [failure.position for failure in readable.failures] == [1, 6]
    again = collect(predict_batches(classifier, folder, ImagePass(batch_size=2)))
    assert torch.equal(again.cosines, readable.cosines)
    kept = folder.images.subset(again.positions)
    assert kept.names == ("0.png", "2.png", "3.png", "4.png", "5.png")


@pytest.mark.parametrize("num_workers", [0, 2])
def test_where_all_have_to_be_readable_the_first_failure_is_named(
    folder: ImageDataset, num_workers: int
) -> None:
    with pytest.raises(UnreadableImageError, match=r"1\.png: the file is empty"):
        predict_cosines(make_classifier(), folder, ImagePass(batch_size=2, num_workers=num_workers))


def test_nothing_is_kept_of_earlier_batches() -> None:
    classifier = make_classifier()
    earlier: list[weakref.ref[Tensor]] = []
    for number, predicted in enumerate(
        predict_batches(classifier, make_images(10), ImagePass(batch_size=2))
    ):
        assert [reference() is None for reference in earlier] == [True] * number
        earlier.append(weakref.ref(predicted.cosines))
        del predicted
    assert len(earlier) == 5


def test_gradients_are_off_inside_only() -> None:
    classifier = make_classifier()
    for predicted in predict_batches(classifier, make_images(4), ImagePass(batch_size=2)):
        assert torch.is_grad_enabled()
        assert not predicted.cosines.requires_grad


@pytest.mark.parametrize("tower", ["bn", "vit"])
@pytest.mark.parametrize(("precision", "tolerance"), [("bf16", 4e-2), ("fp16", 5e-3)])
def test_lower_precision_is_near_and_compared_in_float32(
    tower: str, precision: str, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    classifier, images = make_classifier(tower), make_images(2)
    compare = ClipClassifier.compare
    seen: list[Tensor] = []

    def spy(self: ClipClassifier, image: Tensor, text: Tensor) -> object:
        seen.extend((image, text))
        return compare(self, image, text)

    monkeypatch.setattr(ClipClassifier, "compare", spy)
    exact = predict_cosines(classifier, images)
    found = predict_cosines(classifier, images, ImagePass(precision=precision))
    assert all(features.dtype == torch.float32 for features in seen)
    torch.testing.assert_close(seen[2].norm(dim=1), torch.ones(2))
    assert not torch.equal(found, exact)  # it did compute in less
    torch.testing.assert_close(found, exact, rtol=0, atol=tolerance)


def test_channels_last_changes_the_layout_only(monkeypatch: pytest.MonkeyPatch) -> None:
    classifier, images = make_classifier(), make_images(8)
    features = ClipClassifier.image_features
    layouts: list[bool] = []

    def spy(self: ClipClassifier, batch: Tensor) -> Tensor:
        layouts.append(batch.is_contiguous(memory_format=torch.channels_last))
        return features(self, batch)

    monkeypatch.setattr(ClipClassifier, "image_features", spy)
    exact = predict_cosines(classifier, images)
    found = predict_cosines(classifier, images, ImagePass(channels_last=True))
    assert layouts == [False, True]
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-5)


def test_arguments_are_checked_at_once() -> None:
    classifier = make_classifier()
    assert list(PRECISIONS) == ["fp32", "bf16", "fp16"]
    with pytest.raises(ValueError, match="precision='half' is unknown: choose one of fp32, bf16"):
        predict_batches(classifier, make_images(2), ImagePass(precision="half"))
    with pytest.raises(ValueError, match="images is empty"):
        predict_batches(classifier, make_images(0))
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        predict_cosines(classifier, make_images(2), ImagePass(batch_size=0))
