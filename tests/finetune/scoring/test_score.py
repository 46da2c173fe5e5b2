"""Scoring images into a table: what is in it."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from score_photos import (
    BROKEN,
    NAMES,
    ODD,
    dataset_of,
    make_classifier,
    read_csv,
)

from ueo_fast.finetune.clip.model import ClipClassifier
from ueo_fast.finetune.data.image_list import ImageList, read_images
from ueo_fast.finetune.data.labels import match_labels
from ueo_fast.finetune.demo.tiny_clip import tiny_tokenizer
from ueo_fast.finetune.evaluation.metrics import detection_metrics
from ueo_fast.finetune.scoring.score_images import score_images, validation_threshold
from ueo_fast.finetune.scoring.thresholds import choose_threshold


def truth(classifier: ClipClassifier, images: ImageList) -> dict[str, tuple[torch.Tensor, float]]:
    """Probabilities and MCM score at scale 2, one image at a time, from the two towers."""
    tokens = tiny_tokenizer()([f"a photo of a {name.replace('_', ' ')}." for name in NAMES])
    result = {}
    dataset = dataset_of(classifier, images)
    with torch.no_grad():
        text = classifier.model.encode_text(tokens, normalize=True)
        for i, name in enumerate(images.names):
            if name not in BROKEN:
                image = classifier.image_features(dataset[i][None])
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
        assert float(row["probability_scale"]) == float(classifier.logit_scale)
        assert float(row["mcm_scale"]) == 2.0
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
        "probability_scale": "double",
        "mcm_scale": "double",
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
    chosen, doubts = validation_threshold(classifier, images, pictures, labels, **arguments)
    assert (chosen.kind, chosen.value, doubts) == ("tpr95", summary.threshold, ())
    again = score_images(
        classifier, images, pictures, out=tmp_path / "b.csv", threshold=chosen, **arguments
    )
    assert (again.known, again.kind) == (summary.known, "tpr95")
    with pytest.raises(ValueError, match=r"needs the scores of labelled .* no labels that match"):
        score_images(classifier, images, pictures, out=tmp_path / "c.csv", threshold="tpr95")
    with pytest.raises(ValueError, match="but no label is a known class"):
        validation_threshold(classifier, images, pictures, torch.full((60,), -1))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.csv", "b.csv"]


def test_the_image_that_sets_the_threshold_is_known_in_a_batch_of_any_size(tmp_path):
    """Its score is some 1e-9 lower in another batch: its cosines are summed in another order."""
    classifier = make_classifier()
    files = tuple(f"{i}.png" for i in range(12))
    images = ImageList(files, files)
    moved = 0
    for seed in range(12):
        pictures = torch.randn(12, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
        labels = torch.zeros(12, dtype=torch.int64)
        chosen, _ = validation_threshold(classifier, images, pictures, labels, batch_size=12)
        for size in (1, 5, 12):
            for threshold in (chosen, f"{chosen.value:.9g}"):  # as the summary prints it
                summary = score_images(
                    classifier,
                    images,
                    pictures,
                    out=tmp_path / "s.csv",
                    threshold=threshold,
                    batch_size=size,
                    overwrite=True,
                )
                assert (summary.known, summary.unknown) == (12, 0)
                moved += summary.lowest < summary.threshold
    assert moved  # else the test would say nothing


def test_a_summary_warns_of_what_makes_the_verdicts_doubtful(classifier, tmp_path):
    files = tuple(f"{i}.png" for i in range(60))
    images = ImageList(files, files)
    pictures = torch.randn(60, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    pictures[30:45] = pictures[:15]
    labels = torch.arange(60) % 5 - 1
    out = tmp_path / "a.csv"
    summary = score_images(classifier, images, pictures, out=out, labels=labels, batch_size=60)
    scores = torch.tensor([float(row["mcm"]) for row in read_csv(out)], dtype=torch.float64)
    auroc = detection_metrics(scores, labels >= 0)[0]
    worse = labels if auroc < 0.5 else torch.where(labels >= 0, -1, 0)
    for chosen in (worse, torch.where(worse >= 0, -1, 0)):
        again = score_images(
            classifier, images, pictures, out=out, labels=chosen, batch_size=60, overwrite=True
        )
        wanted = detection_metrics(scores, chosen >= 0)[0]
        told = [text for text in again.warnings if text.startswith("AUROC")]
        assert bool(told) == (wanted < 0.5)
        assert all(f"AUROC is {100 * wanted:.1f}, below 50" in text for text in told)
    assert f"MCM at scale 1, probabilities at the model's own scale {summary.scales[0]:.6g}" in (
        summary.text()
    )
    alike = pictures[:1].expand(60, 3, 32, 32)
    one = score_images(classifier, images, alike, out=tmp_path / "b.csv", threshold=0.1)
    assert "warning: all 60 images are put into one class, '" in one.text()
