"""Metrics and predictions of images, as the commands measure, print and keep them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from ueo_fast import mcm_score
from ueo_fast.finetune.commands.problem import Labelled
from ueo_fast.finetune.data.names import printable
from ueo_fast.finetune.evaluation.metrics import compute_metrics
from ueo_fast.finetune.evaluation.predict import cosine_error
from ueo_fast.finetune.evaluation.results_table import KnownCounts, ResultsTable, doubts, verdict
from ueo_fast.finetune.files.run_files import HEADLINE, METRICS, MetricsRecord
from ueo_fast.finetune.methods import METHODS
from ueo_fast.finetune.scoring.thresholds import choose_threshold, lowest_known

THRESHOLD = "otsu"
"""The rule of ``known`` in predictions.csv: it needs no labels and is the default of score."""


def measure(
    cosines: Tensor,
    labels: Tensor | None,
    mcm_scale: float,
    *,
    method: str,
    seed: int,
    epoch: int = 0,
    stage: Literal["before", "during", "after"] = "after",
    split: Literal["test", "train", "online"] = "test",
) -> MetricsRecord | None:
    """Measure a classifier by its cosines (N, C) and labels (N,), int64.

    ``None`` where no label is a known class. The other arguments go into the record.
    """
    if labels is None or not bool((labels >= 0).any()):
        return None
    return MetricsRecord(
        method=method,
        title=METHODS[method].title,
        epoch=epoch,
        stage=stage,
        seed=seed,
        split=split,
        **compute_metrics(cosines, labels, mcm_scale=mcm_scale).as_dict(),
    )


def metrics_table(records: Iterable[MetricsRecord]) -> str:
    """One row per title, for a terminal, with the conventions below it."""
    table = ResultsTable.from_records(
        ({"method": record.title, **record.values} for record in records),
        {name: metric.title for name, metric in METRICS.items()},
    )
    return f"{table.text()}\n{table.convention()}"


def known_counts(cosines: Tensor, mcm_scale: float) -> KnownCounts:
    """How many images count as known by :data:`THRESHOLD`; none do where it finds no threshold.

    ``cosines`` (N, C) are of the adapted model.
    """
    scores = mcm_score(cosines.double(), mcm_scale).numpy()
    try:
        value = choose_threshold(THRESHOLD, scores)
    except ValueError:  # one image, one class, or equal scores: nothing to split
        return KnownCounts(0, 0, None, THRESHOLD)
    known = int((scores >= _lowest_known(value, mcm_scale)).sum())
    return KnownCounts(known, len(scores) - known, value, THRESHOLD)


def verdict_line(
    method: str,
    records: Sequence[MetricsRecord],
    before: Tensor,
    after: Tensor,
    counts: KnownCounts,
) -> str:
    """The sentence that a report begins with.

    Args:
        method: its name.
        records: metrics, those of the zero-shot model first; empty without labels.
        before: (N, C) cosines of the zero-shot model.
        after: (N, C) cosines of the adapted model, as are ``counts``.
        counts: known and unknown images.
    """
    changed = int((before.argmax(dim=1) != after.argmax(dim=1)).sum())
    return verdict(
        records[1].title if records[1:] else METHODS[method].title,
        records[0].values if records else None,
        records[1].values if records[1:] else None,
        moved=None if method == "zeroshot" else (changed, len(after)),
        counts=counts,
    )


def warning_lines(class_names: Sequence[str], cosines: Tensor, record: MetricsRecord | None) -> str:
    """What makes the predictions doubtful, each on a line that ends with a line break.

    ``cosines`` (N, C) and ``record`` are of the adapted model; there is no record without labels.
    """
    found = doubts(
        classes=class_names,
        predicted=cosines.argmax(dim=1).unique().tolist(),
        images=len(cosines),
        auroc=None if record is None else record.auroc,
    )
    return "".join(f"warning: {text}\n" for text in found)


def brief(record: MetricsRecord) -> str:
    """The metrics of a record on one line."""
    values = ((METRICS[name].title, record.values[name]) for name in HEADLINE)
    return ", ".join(f"{name} {'-' if v is None else f'{100 * v:.1f}'}" for name, v in values)


def prediction_rows(
    images: Labelled,
    class_names: Sequence[str],
    zero_shot: Tensor,
    adapted: Tensor,
    mcm_scale: float,
    threshold: float | None,
) -> Iterator[tuple[str, ...]]:
    """One row per image, with the columns of ``PREDICTION_COLUMNS``.

    Args:
        images: N of them.
        class_names: C of them.
        zero_shot: (N, C) cosines before.
        adapted: (N, C) cosines after.
        mcm_scale: multiplies the cosines in the MCM score: the inverse temperature of its softmax.
        threshold: an image is known where its adapted score reaches it; ``None`` leaves ``known``
            empty.
    """
    columns: list[Iterable[str]] = [
        images.images.names,
        [printable(path) for path in images.images.paths],
        _labels(images, class_names),
    ]
    scores: list[float] = []
    for cosines in (zero_shot, adapted):
        scores = mcm_score(cosines.double(), mcm_scale).tolist()
        columns.append([class_names[index] for index in cosines.argmax(dim=1).tolist()])
        columns.append([repr(score) for score in scores])
    columns.append(itertools.repeat(repr(float(mcm_scale)), len(images.images)))
    if threshold is None:
        columns.append(itertools.repeat("", len(scores)))
    else:
        lowest = _lowest_known(threshold, mcm_scale)
        columns.append(["true" if score >= lowest else "false" for score in scores])
    return zip(*columns, strict=True)


def _lowest_known(threshold: float, mcm_scale: float) -> float:
    return lowest_known(threshold, mcm_scale, cosine_error("fp32", torch.device("cpu")))


def _labels(images: Labelled, class_names: Sequence[str]) -> list[str]:
    """The known class, or what the data calls an unknown one; empty where nothing is known."""
    if images.labels is None:
        return [""] * len(images.images)
    raw = images.images.labels or ("",) * len(images.images)
    return [
        class_names[position] if position >= 0 else str(label)
        for position, label in zip(images.labels.tolist(), raw, strict=True)
    ]
