"""Metrics and predictions of labelled images, as the commands print and keep them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from ueo_fast import mcm_score
from ueo_fast.finetune.commands.problem import Labelled
from ueo_fast.finetune.data.names import printable
from ueo_fast.finetune.evaluation.metrics import Metrics, compute_metrics
from ueo_fast.finetune.evaluation.results_table import ResultsTable

COLUMNS: Mapping[str, str] = {
    "per_class_accuracy": "per-class accuracy",
    "accuracy": "accuracy",
    "auroc": "AUROC",
    "aupr": "AUPR",
    "fpr95": "FPR95",
    "hm": "HM",
}
CONVENTION = (
    "percent; AUROC, AUPR and FPR95 are of the MCM score with known images as the positive class; "
    "HM is the harmonic mean of per-class accuracy and AUROC; - means not defined: no unknown "
    "images"
)


def measure(cosines: Tensor, labels: Tensor | None, mcm_scale: float) -> Metrics | None:
    """Metrics, or ``None`` where there is nothing to measure by: no label is a known class."""
    if labels is None or not bool((labels >= 0).any()):
        return None
    return compute_metrics(cosines, labels, mcm_scale=mcm_scale)


def metrics_table(records: Iterable[Mapping[str, Any]]) -> str:
    """One row per title, for a terminal, with the conventions below it."""
    rows = [{**record, "method": record["title"]} for record in records]
    return f"{ResultsTable.from_records(rows, COLUMNS).text()}\n({CONVENTION})"


def brief(record: Mapping[str, Any]) -> str:
    """The metrics of a record on one line."""
    values = ((COLUMNS[name], record[name]) for name in ("per_class_accuracy", "auroc", "hm"))
    return ", ".join(f"{name} {'-' if v is None else f'{100 * v:.1f}'}" for name, v in values)


PREDICTION_COLUMNS = (
    *("image", "path", "label"),
    *("zeroshot_class", "zeroshot_mcm", "adapted_class", "adapted_mcm"),
)


def prediction_rows(
    images: Labelled,
    class_names: Sequence[str],
    zero_shot: Tensor,
    adapted: Tensor,
    mcm_scale: float,
) -> Iterator[tuple[str, ...]]:
    """One row per image: its label, and class and MCM score before and after.

    Args:
        images: N of them.
        class_names: C of them.
        zero_shot: (N, C) cosines before.
        adapted: (N, C) cosines after.
        mcm_scale: multiplies the cosines in the MCM score.
    """
    columns: list[Sequence[str]] = [
        images.images.names,
        [printable(path) for path in images.images.paths],
        _labels(images, class_names),
    ]
    for cosines in (zero_shot, adapted):
        scores = mcm_score(cosines.double(), mcm_scale).tolist()
        columns.append([class_names[index] for index in cosines.argmax(dim=1).tolist()])
        columns.append([repr(score) for score in scores])
    return zip(*columns, strict=True)


def _labels(images: Labelled, class_names: Sequence[str]) -> list[str]:
    """The known class, or what the data calls an unknown one; empty where nothing is known."""
    if images.labels is None:
        return [""] * len(images.images)
    raw = images.images.labels or ("",) * len(images.images)
    return [
        class_names[position] if position >= 0 else str(label)
        for position, label in zip(images.labels.tolist(), raw, strict=True)
    ]
