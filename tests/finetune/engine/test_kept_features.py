"""Where the image tower stays as it is, each un-augmented image goes through it once."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from commands_place import finetune, lines, make_place
from real_photos import real_photo, save_jpeg
from tiny_model_folder import save_tiny_clip
from tiny_problem import make_images
from torch.utils.data import TensorDataset

from ueo_fast.cli import main
from ueo_fast.finetune import adapt
from ueo_fast.finetune.clip.model import ClipClassifier, make_classifier
from ueo_fast.finetune.demo.tiny_clip import tiny_clip, tiny_tokenizer
from ueo_fast.finetune.engine.hooks import Hooks
from ueo_fast.finetune.engine.training_config import TrainerConfig
from ueo_fast.finetune.methods.adabn import AdaBN
from ueo_fast.finetune.methods.base import ZeroShot
from ueo_fast.finetune.methods.ueo import UEO
from ueo_fast.finetune.target import zero_shot_target

NAMES = ["one", "two", "three"]
PROMPT = TrainerConfig(epochs=3, batch_size=4, affine_lr=0.0, prompt_lr=0.01)
BOTH = TrainerConfig(epochs=3, batch_size=4, affine_lr=0.01, prompt_lr=0.01)
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # of the tiny model's predictions


@pytest.fixture
def seen(monkeypatch):
    """How many images went through the tower, per call."""
    found: list[int] = []
    whole = ClipClassifier.image_features

    def spy(self, images):
        if images.ndim == 4:
            found.append(len(images))
        return whole(self, images)

    monkeypatch.setattr(ClipClassifier, "image_features", spy)
    return found


def fresh() -> ClipClassifier:
    return make_classifier(tiny_clip("vit", seed=0), tiny_tokenizer(), NAMES)


def adapted(images, **options):
    return adapt(tiny_clip("vit", seed=0), tiny_tokenizer(), images, NAMES, **options)


def test_a_prompt_is_trained_on_features(seen):
    images = make_images(10)
    result = adapted(images, config=PROMPT)
    assert sum(seen) == 10
    found = result.predict()
    assert sum(seen) == 10
    # The same from the images.
    assert torch.allclose(result.predict(images).cosines, found.cosines, atol=1e-6)
    target = zero_shot_target(fresh(), images)
    assert target.features is None
    again = fresh()
    history = UEO().adapt(again, target, config=PROMPT)
    assert history.loss == pytest.approx(result.history.loss, abs=1e-5)
    assert torch.allclose(again.prompt.context, result.classifier.prompt.context, atol=1e-5)


def test_a_dataset_is_read_once(seen):
    images = make_images(10)
    tensors, dataset = adapted(images, config=PROMPT), adapted(TensorDataset(images), config=PROMPT)
    assert sum(seen) == 20
    assert tensors.history.loss == dataset.history.loss


def test_augmented_images_go_through_the_tower(seen):
    images = make_images(10)
    result = adapted(images, augmented=TensorDataset(images.flip(3)), config=PROMPT)
    assert sum(seen) == 10 + 3 * 10
    result.predict()
    assert sum(seen) == 40


def test_a_tower_that_is_trained_keeps_nothing(seen):
    result = adapted(make_images(10), config=BOTH)
    assert result.target.features is None
    assert sum(seen) == 10 + 3 * 10
    result.predict()
    assert sum(seen) == 50
    # Nor where features are left from another method.
    target = adapted(make_images(10), config=PROMPT).target
    assert target.features is not None
    before = sum(seen)
    UEO().adapt(fresh(), target, config=BOTH)
    assert sum(seen) == before + 30


def test_which_methods_change_the_tower():
    assert not UEO().trains_tower(PROMPT)
    assert UEO().trains_tower(BOTH)
    assert not ZeroShot().trains_tower(BOTH)
    assert AdaBN().trains_tower(PROMPT)


def test_features_of_another_length_are_refused():
    target = adapted(make_images(10), config=PROMPT).target
    with pytest.raises(ValueError, match="features has 9 entries, but there are 10 images"):
        type(target)(target.images, features=target.features[:9])


def test_commands_evaluate_from_features(tmp_path, seen, monkeypatch, capsys):
    place = make_place(tmp_path)
    words = ["--train", "prompt", "--epochs", "4", "--eval-every", "1", "--checkpoint-every", "1"]
    seen.clear()
    assert finetune(place, "prompt", *words) == 0
    # The zero-shot pass, the first evaluation (one image cannot be read) and four augmented epochs.
    count = sum(seen) // 6
    assert count > 10
    assert sum(seen) == 6 * count

    # A resumed run looks at one image, for the model's sake, and makes its features at its first
    # evaluation.
    def interrupt(record):
        if record.epoch == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        module = "ueo_fast.finetune.commands.recorder.bar_hooks"
        patch.setattr(module, lambda bar: Hooks(on_epoch=interrupt))
        assert finetune(place, "stopped", *words) == 130
    seen.clear()
    assert main(["finetune", "--resume", "--out", str(place / "stopped")]) == 0
    steps = [record["step"] for record in lines(place / "stopped" / "train.jsonl")]
    assert steps == sorted(steps)
    trained = sum(seen) - 1 - count
    assert 2 * count <= trained <= 3 * count
    assert (place / "stopped" / "delta.safetensors").exists()
    metrics = [lines(place / name / "metrics.jsonl") for name in ("prompt", "stopped")]
    assert [record["stage"] for record in metrics[0]] == [record["stage"] for record in metrics[1]]
    for one, other in zip(*metrics, strict=True):
        assert one["epoch"] == other["epoch"]
        assert one["auroc"] == other["auroc"]


def test_features_of_another_precision_are_not_used():
    images = make_images(10)
    result = adapted(images, config=dataclasses.replace(PROMPT, precision="bf16"))
    for precision in ("fp32", "bf16"):
        found = result.predict(precision=precision).cosines
        assert torch.equal(found, result.predict(images, precision=precision).cosines)


def test_features_of_another_tower_are_not_used():
    """A later result that shares the model changes this one, as the warning says."""
    images, model = make_images(10), tiny_clip("vit", seed=0)
    first = adapt(model, tiny_tokenizer(), images, NAMES, config=PROMPT)
    before = first.predict().cosines
    later = adapt(model, tiny_tokenizer(), images, NAMES, config=BOTH)
    assert torch.equal(first.predict().cosines, first.predict(images).cosines)
    assert not torch.equal(first.predict().cosines, before)
    later.restore()
    assert torch.equal(first.predict().cosines, before)


def test_a_resumed_run_ends_with_the_same_bits_where_images_were_left_out(tmp_path, monkeypatch):
    """Features depend, in their last bits, on how many images a batch has."""
    save_tiny_clip(tmp_path / "model")
    (tmp_path / "names.txt").write_text("three\nseven\n")
    (tmp_path / "photos").mkdir()
    for number in range(9):
        save_jpeg(real_photo(number % 2, (60 + number, 50)), tmp_path / "photos" / f"{number}.jpg")
    (tmp_path / "photos" / "2 broken.jpg").write_bytes(b"no more")
    words = ["--train", "prompt", "--epochs", "2", "--checkpoint-every", "1"]
    words += ["--eval-batch-size", "4"]
    assert finetune(tmp_path, "whole", *words) == 0

    def interrupt(record):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        module = "ueo_fast.finetune.commands.recorder.bar_hooks"
        patch.setattr(module, lambda bar: Hooks(on_epoch=interrupt))
        assert finetune(tmp_path, "stopped", *words) == 130
    assert main(["finetune", "--resume", "--out", str(tmp_path / "stopped")]) == 0
    whole, stopped = (tmp_path / name / "predictions.csv" for name in ("whole", "stopped"))
    assert whole.read_bytes() == stopped.read_bytes()
