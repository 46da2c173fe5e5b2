"""Scoring images: what is left out, what is refused, and that nothing is lost."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from score_photos import (
    BROKEN,
    dataset_of,
    make_classifier,
    read_csv,
)

from ueo_fast.finetune.data.image_list import ImageList, read_images
from ueo_fast.finetune.evaluation.predict import Predicted
from ueo_fast.finetune.scoring import score_images as score_module
from ueo_fast.finetune.scoring.score_images import ThresholdError, score_images


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
    with pytest.raises(ValueError, match=r"not one of 2 images .* green/broken\.png: "):
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
    assert list(rows[0]) == [
        *("image", "path", "class_1", "probability_1", "mcm", "known", "label"),
        *("probability_scale", "mcm_scale"),
    ]
    assert [(row["class_1"], row["probability_1"], row["mcm"]) for row in rows] == [
        ("red", "1.0", "1.0")
    ] * 2
    assert "warning: threshold=0.5 makes every image known: with 1 class and" in summary.text()


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

    monkeypatch.setattr(score_module, "predict_batches", mostly_broken)
    images = ImageList(names, names)
    summary = score_images(
        classifier, images, torch.empty(30, 3, 1, 1), out=tmp_path / "s.csv", threshold=0.1
    )
    assert (len(summary.unreadable), summary.unreadable_count) == (5, 28)
    text = summary.text()
    assert "28 images left out, all listed in" in text
    assert "  0\\x1b[31m.png: truncated" in text  # nothing that a terminal obeys
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

    monkeypatch.setattr("ueo_fast.finetune.scoring.thresholds.require_mixture", missing)
    monkeypatch.setattr(score_module, "predict_batches", lambda *_, **__: pytest.fail("too late"))
    images, pictures = ImageList(("a", "b"), ("a", "b")), torch.rand(2, 3, 32, 32)
    with pytest.raises(ImportError, match="scikit-learn"):
        score_images(classifier, images, pictures, out=tmp_path / "s.csv", threshold="gmm")
