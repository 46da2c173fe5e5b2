"""Memory of scoring does not grow with the number of images."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from ueo_fast.finetune.clip.model import ClipClassifier
from ueo_fast.finetune.clip.prompt import PromptLearner
from ueo_fast.finetune.demo.tiny_clip import tiny_clip, tiny_tokenizer
from ueo_fast.finetune.evaluation.predict import Failure, Predicted
from ueo_fast.finetune.scoring import score_batches
from ueo_fast.finetune.scoring.score import score_images

MIB = 1 << 20


class Names(Sequence):
    """Names that are made when asked for: those of the user's list are no part of the question."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, position):
        return f"some folder/image {position:09d}.png"


class ManyImages:
    """What scoring uses of an ImageList."""

    labels = None

    def __init__(self, count: int) -> None:
        self.names = self.paths = Names(count)

    def __len__(self) -> int:
        return len(self.names)


def fake_predictions(count: int, batch: int = 4096) -> Iterator[Predicted]:
    """Two groups of scores; every hundredth image is unreadable."""
    generator = torch.Generator().manual_seed(0)
    for start in range(0, count, batch):
        rows = torch.arange(start, min(start + batch, count))
        broken = rows % 100 == 0
        cosines = 0.2 + 0.01 * torch.randn(len(rows), 4, generator=generator)
        cosines[:, 0] += 0.1 * (rows % 3 == 0)
        failures = tuple(Failure(row, "truncated file") for row in rows[broken].tolist())
        yield Predicted(rows[~broken], cosines[~broken], failures)


def peak_memory(monkeypatch, out: Path, count: int, threshold: str) -> int:
    """Bytes at the peak, above those before; numpy's and Python's, not torch's tensors."""
    model = tiny_clip("vit", seed=0)
    prompt = PromptLearner(model, tiny_tokenizer(), ["one", "two", "three", "four"])
    classifier = ClipClassifier(model, prompt, patch=False)
    monkeypatch.setattr(score_batches, "predict_batches", lambda *_, **__: fake_predictions(count))
    labels = torch.zeros(count, dtype=torch.int64)
    if threshold == "gmm":
        pytest.importorskip("sklearn.mixture")  # its code would count, the first time
    tracemalloc.start()
    try:
        summary = score_images(
            classifier,
            ManyImages(count),
            Names(count),
            out=out,
            top_k=2,
            threshold=threshold,
            labels=labels,
            overwrite=True,
        )
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert summary.images + summary.unreadable_count == count
    assert summary.unreadable_count == (count + 99) // 100
    if threshold != "tpr95":
        assert summary.known / summary.images == pytest.approx(1 / 3, abs=0.01)
    return peak


@pytest.mark.parametrize(
    ("name", "threshold"), [("s.csv", "otsu"), ("s.parquet", "tpr95"), ("s.csv", "gmm")]
)
def test_peak_of_many_images_is_that_of_few(monkeypatch, tmp_path, name, threshold):
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    for block in ("score.ROWS", "score_spool.BLOCK", "thresholds.BLOCK"):
        monkeypatch.setattr(f"ueo_fast.finetune.scoring.{block}", 1 << 12)
    few = peak_memory(monkeypatch, tmp_path / name, 30_000, threshold)
    many = peak_memory(monkeypatch, tmp_path / name, 150_000, threshold)
    # The scores alone of the additional images would take 0.9 MiB, their rows 5 MiB.
    assert many - few < 0.2 * MIB
    assert few < 10 * MIB


@pytest.mark.slow
@pytest.mark.parametrize("threshold", ["otsu", "gmm", "tpr95"])
def test_two_million_images(monkeypatch, tmp_path, threshold):
    pytest.importorskip("pyarrow")
    peak = peak_memory(monkeypatch, tmp_path / "s.parquet", 2_000_000, threshold)
    assert peak < 32 * MIB  # the rows would take 80 MiB, their names and paths 300 MiB
