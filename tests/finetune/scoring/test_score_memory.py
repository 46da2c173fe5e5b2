"""Scoring takes as much memory per image as docs/guide.md says, and no more."""

from __future__ import annotations

import re
import tracemalloc
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from score_photos import make_classifier

from ueo_fast.finetune.evaluation.predict import Failure, Predicted
from ueo_fast.finetune.scoring import score_images as score_module
from ueo_fast.finetune.scoring import score_table
from ueo_fast.finetune.scoring.score_images import score_images

CLASSES = [f"class {i}" for i in range(20)]
GUIDE = Path(__file__).resolve().parents[3] / "docs" / "guide.md"


class Names(Sequence):
    """Names that are made when they are needed: those of a real list are not measured here."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, position):
        return f"some folder/image {position:09d}.png"


class ManyImages:
    """The part of an ImageList that scoring uses."""

    labels = None

    def __init__(self, count: int) -> None:
        self.names = self.paths = Names(count)

    def __len__(self) -> int:
        return len(self.names)


def fake_predictions(count: int, unreadable: int, batch: int = 4096) -> Iterator[Predicted]:
    """Two groups of scores; ``unreadable`` of every hundred images are."""
    generator = torch.Generator().manual_seed(0)
    for start in range(0, count, batch):
        rows = torch.arange(start, min(start + batch, count))
        broken = rows % 100 < unreadable
        cosines = 0.2 + 0.01 * torch.randn(len(rows), len(CLASSES), generator=generator)
        cosines[:, 0] += 0.1 * (rows % 3 == 0)
        failures = tuple(
            Failure(row, f"image file is truncated ({row % 1000} bytes not processed)")
            for row in rows[broken].tolist()
        )
        yield Predicted(rows[~broken], cosines[~broken], failures)


def peak_memory(
    monkeypatch,
    out: Path,
    count: int,
    threshold: str | float,
    top_k: int = 5,
    unreadable: int = 1,
) -> int:
    """Bytes at the peak, above those before, of numpy and Python; not of torch's tensors."""
    monkeypatch.setattr(
        score_module, "predict_batches", lambda *_, **__: fake_predictions(count, unreadable)
    )
    classifier = make_classifier(CLASSES)
    labels = torch.arange(count) % 5 - 1
    # Imported only where they are needed; the first import would count.
    for name in ("sklearn.mixture", "sklearn.metrics", "pyarrow.parquet"):
        pytest.importorskip(name)
    tracemalloc.start()
    try:
        summary = score_images(
            classifier,
            ManyImages(count),
            Names(count),
            out=out,
            top_k=top_k,
            threshold=threshold,
            labels=labels,
            overwrite=True,
        )
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert summary.images + summary.unreadable_count == count
    assert summary.unreadable_count == count * unreadable // 100
    return peak


def stated(pattern: str) -> int:
    """A number of the guide's paragraph on memory."""
    paragraph = next(
        block for block in GUIDE.read_text(encoding="utf-8").split("\n\n") if "--top-k 345" in block
    )
    return int(re.search(pattern, " ".join(paragraph.split()))[1])


@pytest.mark.parametrize(
    ("name", "threshold", "top_k"),
    [
        ("s.csv", "otsu", 5),
        ("s.csv", "gmm", 5),
        ("s.parquet", "tpr95", 5),
        ("s.parquet", 0.3, 1),
        ("s.csv", "otsu", 20),
    ],
)
def test_bytes_per_image_are_those_that_the_guide_states(
    monkeypatch, tmp_path, name, threshold, top_k
):
    monkeypatch.setattr(score_table, "ROWS", 1 << 10)
    few = peak_memory(monkeypatch, tmp_path / name, 10_000, threshold, top_k)
    many = peak_memory(monkeypatch, tmp_path / name, 60_000, threshold, top_k)
    each = (many - few) / 50_000
    kept = stated(r"An image takes (\d+) bytes") + stated(r"(\d+) more for each class") * top_k
    # Of a hundred images one is unreadable and counted with those that are not.
    most = kept + stated(r"another (\d+) bytes") + stated(r"takes some (\d+) bytes") / 100
    assert kept <= each <= most
    assert few < 10_000 * most + 5e6  # the table is written in blocks


def test_an_unreadable_image_takes_what_the_guide_states(monkeypatch, tmp_path):
    few, many = (
        peak_memory(monkeypatch, tmp_path / "s.csv", count, 0.3, unreadable=99)
        for count in (10_000, 60_000)
    )
    assert (many - few) / 50_000 < stated(r"takes some (\d+) bytes")


def test_scores_that_cannot_fit_into_memory_are_refused_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(score_module, "predict_batches", lambda *_, **__: pytest.fail("too late"))
    count = 10**13
    with pytest.raises(MemoryError, match=r"with top_k=5 take 560,000\.0 GB .* smaller top_k"):
        score_images(
            make_classifier(CLASSES), ManyImages(count), Names(count), out=tmp_path / "s.csv"
        )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("threshold", ["otsu", "gmm", "tpr95"])
def test_two_million_images(monkeypatch, tmp_path, threshold):
    peak = peak_memory(monkeypatch, tmp_path / "s.parquet", 2_000_000, threshold)
    assert peak < 300e6  # a list of their names and paths would take 500e6
