"""Scoring images into a table: what is in it, what is left out, and that nothing is lost."""

from __future__ import annotations

import csv
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ueo_fast.finetune.clip.model import ClipClassifier
from ueo_fast.finetune.clip.prompt import PromptLearner
from ueo_fast.finetune.data import transforms
from ueo_fast.finetune.data.dataset import ImageDataset
from ueo_fast.finetune.data.image_list import ImageList, match_labels, read_images
from ueo_fast.finetune.demo.tiny_clip import tiny_clip, tiny_tokenizer
from ueo_fast.finetune.evaluation.predict import Predicted
from ueo_fast.finetune.scoring import score as score_module
from ueo_fast.finetune.scoring import score_batches
from ueo_fast.finetune.scoring.score import ThresholdError, score_images, validation_threshold
from ueo_fast.finetune.scoring.thresholds import choose_threshold

NAMES = ["red", "green", "dark_blue", "x, y"]
ODD = ['red/ü 猫, "quoted".png', "red/line\nbreak.png", "green/=1+1.png", "dark blue/a.png"]
UNKNOWN = ["mauve/1.png", "mauve/2.png"]
BROKEN = ["green/broken.png", "mauve/empty.jpg"]


def make_classifier(names: list[str] = NAMES) -> ClipClassifier:
    model = tiny_clip("vit", seed=0)
    return ClipClassifier(model, PromptLearner(model, tiny_tokenizer(), names), patch=False)


@pytest.fixture(scope="module")
def classifier() -> ClipClassifier:
    return make_classifier()


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
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


def truth(classifier: ClipClassifier, images: ImageList) -> dict[str, tuple[torch.Tensor, float]]:
    """Probabilities and MCM score at scale 2, one image at a time, from the two towers."""
    tokens = tiny_tokenizer()([f"a photo of a {name.replace('_', ' ')}." for name in NAMES])
    result = {}
    dataset = dataset_of(classifier, images)
    with torch.no_grad():
        text = classifier.model.encode_text(tokens, normalize=True)
        for i, name in enumerate(images.names):
            if name not in BROKEN:
                image = classifier.model.encode_image(dataset[i][None], normalize=True)
                cosines = (image @ text.T)[0].double()
                logits = float(classifier.model.logit_scale.exp()) * cosines
                score = float((2 * cosines).softmax(dim=0).max())
                result[name] = (logits.softmax(dim=0), score)
    return result


@pytest.mark.parametrize("num_workers", [0, 2])
def test_csv_has_what_the_model_says_of_every_readable_image(
    classifier, photos, tmp_path, num_workers
):
    images = read_images(photos)
    labels = match_labels(images, NAMES)
    seen = []
    summary = score_images(
        classifier,
        images,
        dataset_of(classifier, images),
        out=tmp_path / "new folder" / "scores.csv",
        top_k=3,
        mcm_scale=2.0,
        labels=labels,
        batch_size=4,
        num_workers=num_workers,
        progress=lambda done, total: seen.append((done, total)),
    )
    rows = read_csv(summary.out)
    expected = truth(classifier, images)
    assert [row["image"] for row in rows] == [name for name in images.names if name in expected]
    assert set(ODD) <= {row["image"] for row in rows}
    shown = ["red", "green", "dark blue", "x, y"]
    for row in rows:
        probabilities, score = expected[row["image"]]
        order = probabilities.argsort(descending=True).tolist()
        assert [row[f"class_{i}"] for i in (1, 2, 3)] == [shown[c] for c in order[:3]]
        assert [float(row[f"probability_{i}"]) for i in (1, 2, 3)] == pytest.approx(
            [float(probabilities[c]) for c in order[:3]], rel=1e-3
        )
        assert float(row["mcm"]) == pytest.approx(score, rel=1e-6)
        assert (row["known"] == "true") == (float(row["mcm"]) >= summary.threshold)
        assert os.path.samefile(row["path"], photos / row["image"])
        folder = row["image"].split("/")[0]
        assert row["label"] == folder
    assert "class_4" not in rows[0]
    assert len(seen) == 4
    assert seen[-1] == (14, 14)
    scores = [float(row["mcm"]) for row in rows]
    assert summary.threshold == choose_threshold("otsu", scores)
    assert (summary.lowest, summary.highest) == (min(scores), max(scores))
    assert (summary.images, summary.known + summary.unknown) == (12, 12)
    assert summary.known == sum(row["known"] == "true" for row in rows) > 0
    assert summary.unreadable_count == 2
    listed = read_csv(tmp_path / "new folder" / "scores.csv.unreadable.csv")
    assert {row["image"] for row in listed} == set(BROKEN)
    assert tuple((row["image"], row["reason"]) for row in listed) == summary.unreadable
    text = summary.text()
    assert "12 images scored: " in text
    assert f"2 images left out, all listed in {summary.unreadable_out}:" in text
    assert all(f"  {name}: " in text for name in BROKEN)
    assert sorted(path.name for path in summary.out.parent.iterdir()) == [
        "scores.csv",
        "scores.csv.unreadable.csv",
    ]


def test_parquet_has_the_same_table(classifier, photos, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    images = read_images(photos)
    dataset, labels = dataset_of(classifier, images), match_labels(images, NAMES)
    for name in ("a.csv", "a.b.parquet"):
        score_images(
            classifier, images, dataset, out=tmp_path / name, labels=labels, threshold="gmm"
        )
    table = parquet.read_table(tmp_path / "a.b.parquet")
    assert {field.name: str(field.type) for field in table.schema} == {
        "image": "string",
        "path": "string",
        **{f"class_{i}": "string" for i in (1, 2, 3, 4)},
        **{f"probability_{i}": "float" for i in (1, 2, 3, 4)},
        "mcm": "double",
        "known": "bool",
        "label": "string",
    }
    rows = read_csv(tmp_path / "a.csv")
    assert table.column_names == list(rows[0])
    assert table.column("class_4").to_pylist() == [row["class_4"] for row in rows]
    assert table.column("image").to_pylist() == [row["image"] for row in rows]
    assert table.column("mcm").to_pylist() == [float(row["mcm"]) for row in rows]
    assert table.column("known").to_pylist() == [row["known"] == "true" for row in rows]
    probabilities = table.column("probability_2").to_numpy()
    assert probabilities.tolist() == [np.float32(row["probability_2"]) for row in rows]
    assert (tmp_path / "a.b.parquet.unreadable.csv").exists()


def test_labels_are_only_those_that_the_data_has(classifier, tmp_path):
    files = tuple(str(tmp_path / f"{i}.png") for i in range(3))
    images = ImageList(files, files, (1, 7, 0))
    pictures = torch.rand(3, 3, 32, 32)
    labels = match_labels(images, NAMES)
    score_images(classifier, images, pictures, out=tmp_path / "a.csv", labels=labels)
    assert [row["label"] for row in read_csv(tmp_path / "a.csv")] == ["green", "7", "red"]
    score_images(classifier, images, pictures, out=tmp_path / "b.csv")
    assert [row["label"] for row in read_csv(tmp_path / "b.csv")] == ["", "", ""]


def test_tpr95_keeps_the_known_images_of_the_data_or_of_a_validation_set(classifier, tmp_path):
    files = tuple(f"{i}.png" for i in range(60))
    images = ImageList(files, files)
    pictures = torch.randn(60, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(60) % 5 - 1
    arguments = {"batch_size": 16, "mcm_scale": 3.0}
    out = tmp_path / "a.csv"
    summary = score_images(
        classifier, images, pictures, out=out, threshold="tpr95", labels=labels, **arguments
    )
    scores = np.array([float(row["mcm"]) for row in read_csv(out)])
    is_known = (labels >= 0).numpy()
    assert summary.threshold == choose_threshold("tpr95", scores, is_known)
    assert summary.threshold != choose_threshold("tpr95", scores, np.ones(60, dtype=bool))
    assert summary.threshold in scores  # which counts as known itself
    assert summary.known == (scores >= summary.threshold).sum()
    chosen, doubts = validation_threshold(
        classifier, images, pictures, labels, folder=tmp_path, **arguments
    )
    assert (chosen.kind, chosen.value, doubts) == ("tpr95", summary.threshold, ())
    again = score_images(
        classifier, images, pictures, out=tmp_path / "b.csv", threshold=chosen, **arguments
    )
    assert (again.known, again.kind) == (summary.known, "tpr95")
    with pytest.raises(ValueError, match=r"needs the scores of labelled .* no labels that match"):
        score_images(classifier, images, pictures, out=tmp_path / "c.csv", threshold="tpr95")
    with pytest.raises(ValueError, match="but no label is a known class"):
        validation_threshold(classifier, images, pictures, torch.full((60,), -1), folder=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.csv", "b.csv"]


def test_strict_stops_at_the_first_unreadable_image(classifier, photos, tmp_path):
    images = read_images(photos)
    with pytest.raises(ValueError, match=r"^green/broken\.png: .*; without --strict it is listed"):
        score_images(
            classifier,
            images,
            dataset_of(classifier, images),
            out=tmp_path / "scores.csv",
            strict=True,
        )
    assert list(tmp_path.iterdir()) == []


def test_nothing_readable_is_an_error(classifier, photos, tmp_path):
    images = read_images(photos)
    broken = images.subset([images.names.index(name) for name in BROKEN])
    with pytest.raises(ValueError, match=r"not one of the 2 images .* green/broken\.png: "):
        score_images(classifier, broken, dataset_of(classifier, broken), out=tmp_path / "s.csv")
    assert list(tmp_path.iterdir()) == []


def test_an_answer_that_is_no_number_is_left_out(classifier, tmp_path):
    pictures = torch.rand(4, 3, 32, 32)
    pictures[2] = torch.nan
    images = ImageList(tuple("abcd"), tuple("abcd"))
    summary = score_images(classifier, images, pictures, out=tmp_path / "s.csv", threshold=0.1)
    assert [row["image"] for row in read_csv(summary.out)] == ["a", "b", "d"]
    reason = "the model's answer is not a finite number (precision=fp32)"
    assert summary.unreadable == (("c", reason),)


def test_one_class_needs_a_number(tmp_path):
    classifier = make_classifier(["red"])
    images, pictures = ImageList(("a", "b"), ("a", "b")), torch.rand(2, 3, 32, 32)
    for kind in ("otsu", "gmm"):
        with pytest.raises(ValueError, match="with a single class the MCM score of every image"):
            score_images(classifier, images, pictures, out=tmp_path / "s.csv", threshold=kind)
    summary = score_images(
        classifier, images, pictures, out=tmp_path / "s.csv", threshold="0.5", top_k=5
    )
    assert (summary.known, summary.unknown) == (2, 0)
    rows = read_csv(summary.out)
    assert list(rows[0]) == ["image", "path", "class_1", "probability_1", "mcm", "known", "label"]
    assert [(row["class_1"], row["probability_1"], row["mcm"]) for row in rows] == [
        ("red", "1.0", "1.0")
    ] * 2
    assert "warning: threshold=0.5 makes every image known: with 1 classes" in summary.text()


def test_scores_are_kept_where_they_allow_no_threshold(classifier, tmp_path):
    pictures = torch.ones(3, 3, 32, 32)
    images = ImageList(tuple("abc"), tuple("abc"))
    with pytest.raises(ThresholdError, match=r"but all 3 are .* The scores are in .*s\.csv, with"):
        score_images(classifier, images, pictures, out=tmp_path / "s.csv")
    rows = read_csv(tmp_path / "s.csv")
    assert [row["known"] for row in rows] == ["", "", ""]
    assert float(rows[0]["mcm"]) > 0.25
    parquet = pytest.importorskip("pyarrow.parquet")
    with pytest.raises(ThresholdError):
        score_images(classifier, images, pictures, out=tmp_path / "s.parquet")
    table = parquet.read_table(tmp_path / "s.parquet")
    assert table.column("known").to_pylist() == [None] * 3
    assert str(table.schema.field("known").type) == "bool"


def test_what_exists_is_replaced_only_when_asked_and_only_by_a_whole_table(
    classifier, photos, tmp_path, monkeypatch
):
    out = tmp_path / "scores.csv"
    out.write_text("mine")
    images = read_images(photos)
    dataset = dataset_of(classifier, images)
    with pytest.raises(FileExistsError, match=r"exists, and nothing is overwritten.*overwrite"):
        score_images(classifier, images, dataset, out=out)
    with pytest.raises(ValueError, match="without --strict"):
        score_images(classifier, images, dataset, out=out, overwrite=True, strict=True)

    def interrupted(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score_images(classifier, images, dataset, out=out, overwrite=True, progress=interrupted)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
        with pytest.raises(OSError, match="No space left"):
            score_images(classifier, images, dataset, out=out, overwrite=True)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"scores.csv": "mine"}
    score_images(classifier, images, dataset, out=out, overwrite=True)
    assert len(read_csv(out)) == 12
    assert (tmp_path / "scores.csv.unreadable.csv").exists()
    # The next table has nothing to list, and no list of an earlier one beside it.
    whole = images.subset([i for i, name in enumerate(images.names) if name not in BROKEN])
    summary = score_images(
        classifier, whole, dataset_of(classifier, whole), out=out, overwrite=True
    )
    assert (summary.unreadable_out, summary.unreadable) == (None, ())
    assert [path.name for path in tmp_path.iterdir()] == ["scores.csv"]


def test_a_summary_names_few_of_many_unreadable_images(classifier, tmp_path, monkeypatch):
    names = tuple(f"{i}\x1b[31m.png" for i in range(30))

    def mostly_broken(*_, **__):
        failures = tuple((i, "truncated") for i in range(28))
        yield Predicted(torch.tensor([28, 29]), torch.tensor([[0.1, 0.2, 0, 0]] * 2), failures)

    monkeypatch.setattr(score_batches, "predict_batches", mostly_broken)
    images = ImageList(names, names)
    summary = score_images(
        classifier, images, torch.empty(30, 3, 1, 1), out=tmp_path / "s.csv", threshold=0.1
    )
    assert (len(summary.unreadable), summary.unreadable_count) == (5, 28)
    text = summary.text()
    assert "28 images left out, all listed in" in text
    assert "  '0\\x1b[31m.png': truncated" in text  # nothing that a terminal obeys
    assert "\x1b" not in text
    assert text.count("truncated") == 5
    assert len(read_csv(summary.unreadable_out)) == 28
    # The score is computed in double, from what the model says in float32.
    cosines = np.array([0.1, 0.2, 0, 0], dtype=np.float32).astype(np.float64)
    score = float(np.exp(cosines).max() / np.exp(cosines).sum())
    assert [float(row["mcm"]) for row in read_csv(summary.out)] == [
        pytest.approx(score, rel=1e-14)
    ] * 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"out": "scores.xlsx"}, "must end in .csv or .parquet, which says the format"),
        ({"out": "scores"}, "must end in .csv or .parquet"),
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
        (
            {"threshold": "mean"},
            "threshold='mean' is unknown; choose a number between 0 and 1, ots",
        ),
        ({"mcm_scale": 0.0}, "scale"),
        ({"precision": "fp8"}, "precision='fp8' is unknown"),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, "labels has shape (3,)"),
        (
            {"labels": torch.tensor([0, 4])},
            "values from 0 to 4; expected (2,) and -1..3, -1 for un",
        ),
        ({"dataset": torch.rand(3, 3, 32, 32)}, "dataset has 3 images, but images lists 2"),
        ({"images": ImageList((), ()), "dataset": torch.rand(0, 3, 32, 32)}, "images is empty"),
    ],
)
def test_errors_come_first_and_leave_nothing(classifier, tmp_path, changes, message):
    arguments = {
        "images": ImageList(("a", "b"), ("a", "b")),
        "dataset": torch.rand(2, 3, 32, 32),
        "out": "scores.csv",
        **changes,
    }
    arguments["out"] = tmp_path / arguments["out"]
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        score_images(classifier, **arguments)
    assert message in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_found_before_the_work(classifier, tmp_path):
    images, pictures = ImageList(("a", "b"), ("a", "b")), torch.rand(2, 3, 32, 32)
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(OSError, match="file"):
        score_images(classifier, images, pictures, out=tmp_path / "file" / "scores.csv")
    (tmp_path / "scores.csv").mkdir()
    with pytest.raises(FileExistsError, match="is a folder; give a file that ends in"):
        score_images(classifier, images, pictures, out=tmp_path / "scores.csv", overwrite=True)


def test_gmm_without_scikit_learn_is_refused_before_the_work(classifier, tmp_path, monkeypatch):
    def missing() -> None:
        raise ImportError("pip install scikit-learn")

    monkeypatch.setattr("ueo_fast.finetune.scoring.score_pass.require_mixture", missing)
    monkeypatch.setattr(score_module, "fill_spool", lambda *_: pytest.fail("too late"))
    images, pictures = ImageList(("a", "b"), ("a", "b")), torch.rand(2, 3, 32, 32)
    with pytest.raises(ImportError, match="scikit-learn"):
        score_images(classifier, images, pictures, out=tmp_path / "s.csv", threshold="gmm")
