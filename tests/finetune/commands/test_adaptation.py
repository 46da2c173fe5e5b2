"""`adapt()`: the whole method in one call, from every kind of images, and what it refuses."""

from __future__ import annotations

import copy
import csv
import math
import shutil
import warnings
from collections import deque

import numpy as np
import pytest
import torch
from photo_folder import CORRUPT, KNOWN, ODD, photo_folder
from PIL import Image
from tiny_problem import NAMES, make_images
from torch.utils.data import Dataset

from ueo_fast import mcm_score
from ueo_fast.finetune import adapt
from ueo_fast.finetune.clip.base_model import describe_base
from ueo_fast.finetune.clip.delta import load_delta, read_delta
from ueo_fast.finetune.data.image_list import read_images
from ueo_fast.finetune.data.labels import match_labels
from ueo_fast.finetune.data.views import views_of
from ueo_fast.finetune.demo.tiny_clip import tiny_clip, tiny_tokenizer
from ueo_fast.finetune.engine.hooks import Hooks
from ueo_fast.finetune.engine.trainer import TrainerConfig
from ueo_fast.finetune.methods.ueo import UEO
from ueo_fast.finetune.scoring.score_images import score_images

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


def photo_of(photos):
    return min((photos / "zero").glob("IMG*.png"))


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
    assert torch.equal(prediction.mcm, mcm_score(prediction.cosines.double()))
    assert prediction.names == result.names
    assert CORRUPT not in result.names


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


def test_prediction_lists_what_cannot_be_read(photos):
    result = run(photos / "zero", KNOWN)
    before = result.predict(photos / "zero")
    assert before.unreadable == ()
    whole = photo_of(photos).read_bytes()
    (photos / "zero" / "empty.png").write_bytes(b"")
    (photos / "zero" / "half.png").write_bytes(whole[: len(whole) // 2])
    prediction = result.predict(photos / "zero")
    assert [name for name, _ in prediction.unreadable] == ["empty.png", "half.png"]
    assert prediction.unreadable[0][1] == "the file is empty"
    assert prediction.names == before.names
    assert torch.allclose(prediction.cosines, before.cosines, atol=1e-6)
    with pytest.raises(ValueError, match=r"2 images cannot be read, the first is empty\.png"):
        result.predict(photos / "zero", strict=True)
    with pytest.raises(ValueError, match=r"none of 1 image can be read.*empty"):
        result.predict(photos / "zero" / "empty.png")


def test_files_and_pictures_may_come_in_any_form(photos):
    folder = photos / "zero"
    result = run(folder, KNOWN)
    wanted = result.predict(folder)
    files = sorted(folder.glob("*.png"))
    for images in (
        files,
        tuple(map(str, files)),
        iter(files),
        deque(files),
        dict(enumerate(files)).values(),
        np.array(list(map(str, files))),  # a column of a table is like it
        [Image.open(file) for file in files],
        [Image.open(file).convert("RGB") for file in files],
    ):
        found = result.predict(images)
        assert torch.equal(found.cosines, wanted.cosines)
        assert found.classes == wanted.classes
    assert result.predict(files).names == tuple(map(str, files))
    assert result.predict([Image.open(files[0])]).names == ("0",)
    one = result.predict(Image.open(files[1]))
    assert torch.allclose(one.cosines, result.predict(files[1]).cosines)
    # The same photographs, augmented alike, whatever form they come in.
    assert same(result, run(files, KNOWN))
    assert same(result, run([Image.open(file) for file in files], KNOWN))


def test_a_picture_in_memory_may_be_broken(photos, tmp_path):
    whole = photo_of(photos).read_bytes()
    half = tmp_path / "half.png"
    half.write_bytes(whole[: len(whole) // 2])
    pictures = [Image.open(photo_of(photos)), Image.open(half)]
    result = run(pictures * 2, KNOWN)
    assert [name for name, _ in result.unreadable] == ["1", "3"]
    assert result.names == ("0", "2")
    odd = [Image.new("RGB", size) for size in ((0, 0), (0, 9), (4000, 2))]
    found = result.predict([*pictures, *odd]).unreadable
    assert [reason.partition(" pixels, ")[2] for _, reason in found[1:]] == [
        "without area",
        "without area",
        "more than 1000 to 1",
    ]
    assert result.predict(pictures).names == ("0",)


def test_an_image_beside_the_class_folders_takes_the_labels_away_and_nothing_else(photos):
    shutil.copy(photo_of(photos), photos / "beside.png")
    result = run(photos, KNOWN)
    assert result.target.labels is None
    assert "beside.png" in result.predict(photos).names
    with pytest.raises(ValueError, match="no label, while others have"):
        run(photos, KNOWN, method="oracle")
    with pytest.raises(ValueError, match="no label, while others have"):
        result.predict(photos, threshold="tpr95")


def test_verdicts_are_those_of_the_table_of_scores(photos, tmp_path):
    result = run(photos, KNOWN)
    images = read_images(photos)
    dataset = views_of(images, result.classifier.model, None, "auto").plain
    labels = match_labels(images, KNOWN)
    for kind in ("otsu", "tpr95", 0.3334):
        out = tmp_path / f"{kind}.csv"
        summary = score_images(
            result.classifier, images, dataset, out=out, threshold=kind, labels=labels
        )
        prediction = result.predict(photos, threshold=kind)
        assert prediction.threshold == summary.threshold
        with open(out, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        assert prediction.names == tuple(row["image"] for row in rows)
        assert prediction.known.tolist() == [row["known"] == "true" for row in rows]
        assert prediction.mcm.tolist() == [float(row["mcm"]) for row in rows]
        assert prediction.classes == tuple(row["class_1"] for row in rows)
    default = result.predict(photos)
    assert default.threshold == result.predict(photos, threshold="otsu").threshold
    # The threshold of labelled images, taken to one of them by itself.
    validated = result.predict(photos, threshold="tpr95")
    lowest = next(i for i, m in enumerate(validated.mcm) if m == validated.threshold)
    alone = result.predict(photos / validated.names[lowest], threshold=validated.threshold)
    assert alone.known.tolist() == [True]
    with pytest.raises(ValueError, match="tpr95"):
        result.predict(make_images(3), threshold="tpr95")


def test_one_image_has_no_verdict_unless_a_threshold_is_given():
    result = run(make_images(COUNT))
    one = result.predict(make_images(1))
    assert (one.known, one.threshold, one.names) == (None, None, ("0",))
    assert result.predict(make_images(1), threshold=0.1).known.tolist() == [True]
    with pytest.raises(ValueError, match="so it needs at least 2, got 1"):
        result.predict(make_images(1), threshold="otsu")
    assert repr(one) == "Prediction(1 image)"


def test_an_answer_that_is_no_number_is_left_out():
    images = make_images(4)
    images[2] = math.nan
    prediction = run(make_images(COUNT)).predict(images)
    assert prediction.names == ("0", "1", "3")
    assert prediction.unreadable[0][0] == "2"
    assert "not a finite number" in prediction.unreadable[0][1]


def test_results_are_shown_in_a_line(photos):
    result = run(photos, KNOWN)
    for value in (result, result.target, result.predict(), read_images(photos), result.history):
        assert len(repr(value)) < 250
        assert "\n" not in repr(value)
    readable = len(result.target)
    assert repr(result).startswith("Adaptation(UEO(trade_off=1.0")
    assert f"{readable} images, 1 unreadable, {len(result.history)} steps" in repr(result)
    assert repr(result.target) == f"Target({readable} images, augmented, cosines, labels)"
    assert repr(result.predict(threshold=0.1)) == (
        f"Prediction({readable} images, {readable} known (MCM of 0.1 or more))"
    )
    assert repr(read_images(photos)).endswith(", labelled)")


def test_progress_is_shown_on_demand(capsys):
    images = make_images(COUNT)
    result = run(images)
    result.predict(images)
    assert capsys.readouterr().err == ""  # no terminal
    result = run(images, progress=True, config=TrainerConfig(epochs=40, batch_size=2))
    shown = capsys.readouterr().err
    assert "zero-shot:" in shown
    assert "ueo:" in shown
    assert "loss=0.0000, " in shown
    assert "-0.0" not in shown
    result.predict(images, progress=True)
    assert "predict:" in capsys.readouterr().err


def test_a_tensor_and_a_dataset_give_the_same(photos):
    images = make_images(COUNT)
    first, second = run(images), run(Counted(images))
    assert first.unreadable == second.unreadable == ()
    assert same(first, second)
    start = torch.cat([value.flatten() for value in tiny_clip("bn", seed=0).visual.parameters()])
    moved = torch.cat([v.flatten() for v in first.classifier.model.visual.parameters()])
    assert not torch.equal(start, moved)
    prediction = first.predict(images[:5])
    classes, probabilities = prediction.classes, prediction.probabilities
    mcm, cosines = prediction.mcm, prediction.cosines
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
    path = result.save(tmp_path / "new folder" / "größe.safetensors")
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
        ({"images": {"a.png": 0}}, "images is of type dict"),
        ({"config": {"epochs": 1}}, "config must be a TrainerConfig, got dict"),
        ({"hooks": print}, "hooks must be a Hooks, got builtin_function_or_method"),
        ({"method": 7}, "method must be a name or a Method, got int"),
        ({"images": []}, "images is empty"),
        ({"images": ["nowhere.png"]}, "nowhere.png) of 1 paths are not a file"),
        ({"images": ["."]}, "a folder is given by itself"),
        ({"images": ["a.png", 7]}, "images[1] is of type int, but images[0] of type str"),
        (
            {"images": torch.zeros(COUNT, 3, 32, 32, dtype=torch.uint8)},
            "images has dtype torch.uint8",
        ),
        (
            {"images": Counted([Image.new("RGB", (9, 9))])},
            "images[0] is of type Image, but an item",
        ),
        ({"images": Counted([{"image": 0}])}, "images[0] is of type dict, but an item"),
        ({"labels": [0] * COUNT}, "labels must be a tensor (N,) of integers, got list"),
        ({"labels": torch.zeros(COUNT)}, "labels must be a tensor (N,) of integers"),
        ({"labels": torch.full((COUNT,), 70)}, "labels has 70, but must be positions"),
        ({"images": [np.zeros((9, 9, 3))]}, "PIL.Image.fromarray makes one of an array"),
        ({"method": "oracle"}, "the oracle is told"),
        ({"config": TrainerConfig(batch_size=1)}, "batch_size is 1, but UEO compares"),
    ],
)
def test_an_argument_that_is_wrong_is_named(options, message):
    wanted = {"images": make_images(COUNT), **options}
    with pytest.raises((TypeError, ValueError, OSError)) as caught:
        run(wanted.pop("images"), wanted.pop("names", NAMES), **wanted)
    assert message in str(caught.value)


def test_labels_and_augmentation_of_files_are_their_own(photos):
    with pytest.raises(ValueError, match="labels goes with images that have none"):
        run(photos, KNOWN, labels=torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="augmented goes with a dataset or tensor"):
        run(photos, KNOWN, augmented=Counted(make_images(3)))
    files = sorted((photos / "zero").glob("*.png"))
    with pytest.raises(ValueError, match="labels has 1 entries, but there are"):
        run(files, KNOWN, labels=torch.zeros(1, dtype=torch.int64))
    labels = torch.zeros(len(files), dtype=torch.int64)
    assert torch.equal(run(files, KNOWN, labels=labels).target.labels, labels)


def zero_shot_cosines(result):
    return result.target.zero_shot_cosines()


STRONG = TrainerConfig(epochs=1, batch_size=4, affine_lr=100.0, prompt_lr=1.0)


def test_a_second_adaptation_of_a_model_says_that_it_starts_from_the_first(tmp_path):
    images, tokenizer = make_images(COUNT), tiny_tokenizer()
    model = tiny_clip("bn", seed=0)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        first = adapt(model, tokenizer, images, NAMES, config=STRONG)
    assert not [text for text in told if "was adapted before" in str(text.message)]
    path = first.save(tmp_path / "delta.safetensors")
    with pytest.warns(UserWarning, match=r"was adapted before.*restore\(\).*deepcopy"):
        second = adapt(model, tokenizer, images, NAMES, config=STRONG)
    assert not torch.equal(zero_shot_cosines(first), zero_shot_cosines(second))
    with pytest.warns(UserWarning, match="was adapted before"):
        adapt(copy.deepcopy(model), tokenizer, images, NAMES, method="zeroshot")
    other = tiny_clip("bn", seed=0)
    load_delta(other, path, tokenizer=tokenizer)
    with pytest.warns(UserWarning, match="was adapted before"):
        adapt(other, tokenizer, images, NAMES, method="adabn")
    first.restore()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        anew = adapt(model, tokenizer, images, NAMES, config=STRONG)
    assert not [text for text in told if "was adapted before" in str(text.message)]
    assert torch.equal(zero_shot_cosines(first), zero_shot_cosines(anew))
    assert read_delta(anew.save(tmp_path / "again.safetensors")).tensors.keys()
    again, was = read_delta(tmp_path / "again.safetensors"), read_delta(path)
    assert all(torch.equal(again.tensors[name], value) for name, value in was.tensors.items())


@pytest.mark.parametrize("method", ["adabn", "tent"])
def test_statistics_are_restored_as_well(method):
    images = make_images(COUNT)
    result = run(images, method=method)
    before = zero_shot_cosines(result)
    assert not torch.equal(result.predict(images).cosines, before)
    result.restore()
    assert torch.equal(result.predict(images).cosines, before)
    assert not result.classifier.was_adapted


def test_a_prompt_alone_leaves_the_model_as_it_was():
    images, model = make_images(COUNT), tiny_clip("bn", seed=0)
    config = TrainerConfig(epochs=1, batch_size=4, affine_lr=0, prompt_lr=1.0)
    first = adapt(model, tiny_tokenizer(), images, NAMES, config=config)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        second = adapt(model, tiny_tokenizer(), images, NAMES, config=config)
    assert not [text for text in told if "was adapted before" in str(text.message)]
    assert torch.equal(zero_shot_cosines(first), zero_shot_cosines(second))


def test_a_single_class_and_predictions_of_one_class_are_told():
    images = make_images(COUNT)
    with pytest.warns(UserWarning, match=r"a single class, 'one'.*MCM score 1"):
        result = run(images, ["one"])
    with pytest.warns(UserWarning, match="a single class, 'one'"):
        prediction = result.predict(images)
    assert prediction.mcm.tolist() == [1.0] * COUNT
    assert prediction.known is None
    same_images = make_images(1).expand(6, 3, 32, 32)
    with pytest.warns(UserWarning, match="all 6 images are put into one class, '"):
        run(images).predict(same_images)


def test_what_looks_wrong_in_training_is_a_python_warning_without_a_hook_for_it():
    class Sorry(UEO):
        def adapt(self, classifier, target, *, config=None, hooks=None):
            hooks.on_warning("a collapse")
            return super().adapt(classifier, target, config=config, hooks=hooks)

    for hooks in (None, Hooks(on_step=lambda record: None)):
        with pytest.warns(UserWarning, match="a collapse"):
            run(make_images(COUNT), method=Sorry(), hooks=hooks)
    told = []
    run(make_images(COUNT), method=Sorry(), hooks=Hooks(on_warning=told.append))
    assert told == ["a collapse"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": 2}, "threshold=2.0 lies outside 0..1"),
        ({"threshold": "mean"}, "threshold='mean' is unknown"),
        ({"threshold": True}, "threshold must be a number between 0 and 1, otsu, gmm or tpr95"),
        ({"threshold": [0.3]}, "got list [0.3]"),
        ({"mcm_scale": 1e40}, "mcm_scale must be from 1e-30 to 1e+30, got 1e+40"),
        ({"mcm_scale": 1e-40}, "mcm_scale must be from 1e-30 to 1e+30, got 1e-40"),
        ({"batch_size": 10**29}, "batch_size must be at most"),
        ({"num_workers": -1}, "num_workers must be at least 0, got -1"),
        ({"precision": "fp8"}, "precision='fp8' is unknown"),
    ],
)
def test_an_option_of_a_prediction_that_cannot_work_is_refused(options, message):
    result = run(make_images(COUNT), method="zeroshot")
    with pytest.raises((TypeError, ValueError)) as caught:
        result.predict(**options)
    assert message in str(caught.value)
