"""Which charts a run's report has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ueo_fast.finetune.report.charts import (
    Floats,
    entropy_chart,
    highest_bin,
    histogram_chart,
    histogram_edges,
    learning_rate_chart,
    loss_chart,
    metrics_chart,
    roc_chart,
)
from ueo_fast.finetune.report.predictions import KNOWN, UNKNOWN, UNLABELLED, Predictions
from ueo_fast.finetune.report.read_run import RunData
from ueo_fast.finetune.report.tables import SPLITS

_SHOWN = {"per_class_accuracy": "per-class accuracy", "auroc": "AUROC", "hm": "HM"}


@dataclass(frozen=True)
class Chart:
    """A chart of a page.

    Attributes:
        title: its heading.
        svg: an ``<svg>`` element.
    """

    title: str
    svg: str


def score_charts(run: RunData) -> list[Chart]:
    """Histograms of the MCM score before and after, and the ROC curves of both."""
    predictions = run.predictions
    if predictions is None or not len(predictions):
        return []
    scores = {"zero-shot": predictions.zeroshot_mcm}
    if run.config.get("method") != "zeroshot":
        scores["adapted"] = predictions.adapted_mcm
    groups = {stage: _groups(values, predictions) for stage, values in scores.items()}
    edges = histogram_edges(list(scores.values()))
    highest = highest_bin([part for stage in groups.values() for part in stage.values()], edges)
    charts = [
        Chart(
            f"MCM score, {stage}",
            histogram_chart(
                f"histogram-{stage}",
                f"MCM score, {stage}",
                groups[stage],
                edges,
                highest=highest,
            ),
        )
        for stage in scores
    ]
    if predictions.labelled:
        has_label = predictions.group != UNLABELLED
        is_known = predictions.group[has_label] == KNOWN
        curves = {stage: (values[has_label], is_known) for stage, values in scores.items()}
        charts.append(Chart("ROC curve, known as positive", roc_chart("roc", curves)))
    return charts


def _groups(scores: Floats, predictions: Predictions) -> Mapping[str, Floats]:
    if np.all(predictions.group == UNLABELLED):
        return {"all": scores}
    return {
        "known": scores[predictions.group == KNOWN],
        "unknown": scores[predictions.group == UNKNOWN],
        "unlabelled": scores[predictions.group == UNLABELLED],
    }


def training_charts(run: RunData) -> list[Chart]:
    """Loss, entropies, learning rates; metrics over epochs where they were measured."""
    charts = []
    if run.steps:
        classes = len(run.problem.known) if run.problem else None
        charts.append(Chart("Loss", loss_chart("loss", run.steps)))
        charts.append(Chart("Entropy", entropy_chart("entropy", run.steps, classes)))
        rates = learning_rate_chart("learning-rate", run.steps)
        if rates is not None:
            charts.append(Chart("Learning rate", rates))
    for split, title in SPLITS.items():
        lines = [m for m in run.metrics if m.split == split]
        if not any(m.stage == "during" for m in lines):
            continue
        last = {m.epoch: m for m in sorted(lines, key=lambda m: m.stage != "during")}
        epochs = sorted(last)
        values = {
            label: [last[epoch].values[key] for epoch in epochs]
            for key, label in _SHOWN.items()
            if any(last[epoch].values[key] is not None for epoch in epochs)
        }
        charts.append(
            Chart(f"Metrics: {title.lower()}", metrics_chart(f"metrics-{split}", epochs, values))
        )
    return charts
