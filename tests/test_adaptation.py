"""`adapt()`: the whole method in one call, from every kind of images, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from photo_folder import CORRUPT, KNOWN, ODD, photo_folder
from tiny_problem import NAMES, make_images
from torch.utils.data import Dataset

from ueo_fast import mcm_score
from ueo_fast.finetune import adapt
from ueo_fast.finetune.clip.base_model import describe_base
from ueo_fast.finetune.clip.delta import load_delta, read_delta
from ueo_fast.finetune.data.image_list import read_images
from ueo_fast.finetune.demo.tiny_clip import tiny_clip, tiny_tokenizer
from ueo_fast.finetune.engine.hooks import Hooks
from ueo_fast.finetune.engine.trainer import TrainerConfig
from ueo_fast.finetune.methods.ueo import UEO

COUNT = 12
BUDGET = TrainerConfig(epochs=2, batch_size=4, prompt_lr=1e-3, affine_lr=1e-2)


class Counted(Dataset):
    """Images by position, and how often one was asked for."""

    def __init__(self, images: torch.Tensor) -> None:
        self.images = images
        self.asked = 0

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, position: int) -> torch.Tensor:
        self.asked += 1
        return self.images[position]


def run(images, names=NAMES, **options):
    model = tiny_clip("bn", seed=0)
    return adapt(model, tiny_tokenizer(), images, names, **{"config": BUDGET, **options})


def same(first, second):
    left, right = (dict(result.classifier.named_parameters()) for result in (first, second))
    return all(torch.equal(left[name], right[name]) for name in left)


@pytest.fixture
def photos(tmp_path):
    return photo_folder(tmp_path / "my photos, größe 猫", per_class=2)


@pytest.mark.parametrize("kind", [str, lambda path: path, read_images])
def test_a_folder_is_read_and_what_cannot_be_is_listed(photos, kind):
    result = run(kind(photos), KNOWN)
    assert [name for name, _ in result.unreadable] == [CORRUPT]
    readable = 8 * 2 + len(ODD)
    assert len(result.target) == readable
    assert len(result.target.zero_shot_cosines()) == len(result.target.labels) == readable
    assert len(result.history) == 2 * -(-readable // BUDGET.batch_size)
    prediction = result.predict()
    assert len(prediction.classes) == len(prediction.mcm) == readable
    assert set(prediction.classes) <= set(KNOWN)
    assert torch.equal(prediction.mcm, mcm_score(prediction.cosines))


def test_labels_of_a_folder_are_found_by_class_name_and_change_nothing(photos, tmp_path):
    result = run(photos, KNOWN)
    left_out = {CORRUPT}
    names = [name for name in read_images(photos).names if name not in left_out]
    wanted = [
        KNOWN.index(name.split("/")[0]) if name.split("/")[0] in KNOWN else -1 for name in names
    ]
    assert result.target.labels.tolist() == wanted
    listed = tmp_path / "list.txt"
    listed.write_text("\n".join(str(photos / name) for name in names), encoding="utf-8")
    unlabelled = run(listed, KNOWN)
    assert unlabelled.target.labels is None
    assert same(result, unlabelled)


def test_strict_stops_at_an_unreadable_image(photos):
    with pytest.raises(ValueError, match=r"1 image cannot be read, the first is two/broken"):
        run(photos, KNOWN, strict=True)


def test_prediction_wants_every_image_readable(photos):
    result = run(photos / "zero", KNOWN)
    (photos / "zero" / "late.png").write_bytes(b"")
    with pytest.raises((ValueError, OSError), match=r"late\.png"):
        result.predict(photos / "zero")


def test_a_tensor_and_a_dataset_give_the_same(photos):
    images = make_images(COUNT)
    first, second = run(images), run(Counted(images))
    assert first.unreadable == second.unreadable == ()
    assert same(first, second)
    start = torch.cat([value.flatten() for value in tiny_clip("bn", seed=0).visual.parameters()])
    moved = torch.cat([v.flatten() for v in first.classifier.model.visual.parameters()])
    assert not torch.equal(start, moved)
    classes, probabilities, mcm, cosines = first.predict(images[:5])
    assert cosines.shape == (5, len(NAMES))
    assert torch.allclose(cosines, first.predict().cosines[:5], atol=1e-6)
    assert list(classes) == [NAMES[index] for index in cosines.argmax(dim=1)]
    assert ((1 / len(NAMES) < probabilities) & (probabilities <= 1)).all()
    assert ((1 / len(NAMES) < mcm) & (mcm < 1)).all()


def test_training_sees_the_augmented_images_and_the_weights_come_from_the_others():
    images = make_images(COUNT)
    plain, augmented = Counted(images), Counted(images.flip(-1))
    result = run(plain, augmented=augmented)
    assert plain.asked == COUNT  # zero-shot, once
    assert augmented.asked == 2 * COUNT
    assert torch.equal(result.target.cosines, run(images).target.cosines)
    assert not same(result, run(images))


def test_a_method_has_its_choices():
    images = make_images(COUNT)
    result = run(images, method=UEO(eps=1e-2))
    assert result.method == UEO(eps=1e-2)
    assert not same(result, run(images))
    assert same(run(images), run(images, method="ueo"))
    assert same(run(images), run(images, method=UEO()))


def test_the_oracle_reads_labels_and_no_other_method_does():
    images = make_images(COUNT)
    labels = torch.arange(COUNT) % 4 - 1
    oracle = run(images, method="oracle", labels=labels)
    assert not same(oracle, run(images, method="oracle", labels=torch.zeros_like(labels)))
    assert same(run(images), run(images, labels=labels))
    with pytest.raises(ValueError, match="the oracle is told"):
        run(images, method="oracle")


def test_hooks_are_told_of_every_step():
    steps = []
    result = run(make_images(COUNT), hooks=Hooks(on_step=steps.append))
    assert [record.step for record in steps] == list(range(1, 7))
    assert [record.loss for record in steps] == result.history.loss


def test_what_was_learnt_is_saved_and_loaded(tmp_path):
    images = make_images(COUNT)
    result = run(images, template="a sketch of a {}.")
    path = result.save(tmp_path / "größe.safetensors")
    loaded = load_delta(tiny_clip("bn", seed=0), path, tokenizer=tiny_tokenizer())
    with torch.no_grad():
        assert torch.equal(loaded(images)[0], result.classifier(images)[0])
    assert loaded.prompt.class_names == tuple(NAMES)
    assert read_delta(path).method == "ueo"
    with pytest.raises(ValueError, match="give tokenizer="):
        load_delta(tiny_clip("bn", seed=0), path)
    with pytest.raises(ValueError, match="fingerprint"):
        load_delta(tiny_clip("bn", seed=1), path, tokenizer=tiny_tokenizer())


def test_a_base_is_recorded_where_it_is_told(tmp_path):
    result = run(make_images(COUNT))
    base = describe_base(result.classifier.model, "tiny", "digits")
    assert read_delta(result.save(tmp_path / "delta.safetensors", base)).base == base


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"images": "nowhere"}, "nowhere does not exist"),
        ({"names": []}, "class_names"),
        ({"names": "zero"}, "class_names"),
        ({"names": ["one", "One"]}, "One"),
        ({"method": "uoe"}, "method='uoe' is unknown"),
        ({"template": "photo"}, "{} once"),
        ({"scope": "some"}, "scope='some'"),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, "labels has 3 entries"),
        ({"augmented": Counted(make_images(3))}, "augmented has 3 entries"),
        ({"images": make_images(COUNT)[:0]}, "images"),
        ({"images": make_images(COUNT)[0]}, "images"),
        ({"images": torch.zeros(2, 1, 32, 32)}, "images"),
        ({"images": 7}, "images"),
    ],
)
def test_an_argument_that_is_wrong_is_named(options, message):
    wanted = {"images": make_images(COUNT), **options}
    with pytest.raises((TypeError, ValueError, OSError)) as caught:
        run(wanted.pop("images"), wanted.pop("names", NAMES), **wanted)
    assert message in str(caught.value)


def test_labels_and_augmentation_of_files_are_their_own(photos):
    for name, value in (("labels", torch.zeros(3)), ("augmented", Counted(make_images(3)))):
        with pytest.raises(ValueError, match=f"{name} goes with a dataset or tensor"):
            run(photos, KNOWN, **{name: value})
