"""`ueo-fast report`: writes ``report.html``, one self-contained page about a run."""

from __future__ import annotations

import base64
import functools
import hashlib
import shlex
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from ueo_fast import __version__
from ueo_fast.finetune.data.names import plural
from ueo_fast.finetune.evaluation.results_table import doubts, verdict
from ueo_fast.finetune.files.atomic import atomic_file
from ueo_fast.finetune.files.run_files import HEADLINE, METRICS, REPORT, WarningRecord
from ueo_fast.finetune.methods import METHODS
from ueo_fast.finetune.report import tables
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
    window,
)
from ueo_fast.finetune.report.run_data import (
    KNOWN,
    UNKNOWN,
    UNLABELLED,
    Predictions,
    RunData,
    read_run,
)

if TYPE_CHECKING:
    from ueo_fast.finetune.commands.options import ReportConfig

Chart = tuple[str, str]
"""Its heading, and an ``<svg>`` element."""

MOST_LISTED = 100
"""Warnings and skipped files that are listed; of more, the number and the file that has them."""

FIRST_WARNINGS = 5
"""Warnings that are seen at once."""


def run(config: ReportConfig) -> None:
    """Write the page and say where it is."""
    path = write_report(Path(config.run), None if config.out is None else Path(config.out))
    print(f"report: {path}")


def write_report(run: Path, out: Path | None = None) -> Path:
    """Write the report of a run as one HTML page.

    The page needs no network and no other file: styles, charts (SVG), thumbnails (JPEG) and one
    script, which sorts its tables, are in it. Its content security policy forbids everything else,
    so no name of a class or a file can run code. Only the run folder is read, and no image that it
    names is opened: the run made the thumbnails, and links lead only to images of its
    ``images.json``.

    A page has 150 to 800 kB, and less than 4 MB where every name and message is long and full of
    markup: curves have at most 400 points, there are at most 24 thumbnails of 160 pixels, long
    words lose their middle, and long tables are cut, with a line that names the complete file.

    Args:
        run: a run folder of ``ueo-fast finetune``, finished or not.
        out: of the page; ``None``: ``report.html`` in the run folder. It is written whole or not
            at all.

    Returns:
        Where the page is.

    Raises:
        FileNotFoundError, NotADirectoryError: ``run`` is not a run folder.
        ValueError: a file of the run is broken; with its name and line.
        OSError: the page cannot be written.
    """
    path = run / REPORT if out is None else out
    page = _template().render(**_content(read_run(run)))
    # Surrogates and controls were escaped before; this catches what was overlooked.
    data = page.encode("utf-8", "backslashreplace")
    with atomic_file(path) as file:
        file.write(data)
    return path


@functools.cache  # compiling it takes a fifth of a page's time
def _template() -> Template:
    environment = Environment(
        loader=PackageLoader("ueo_fast.finetune.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for name in ("percent", "count", "score", "duration", "shown", "name"):
        environment.filters[name] = getattr(tables, name)
    environment.filters["plural"] = plural
    return environment.get_template("page.html")


def _content(run: RunData) -> dict[str, Any]:
    """What the template shows, and the functions that it calls."""
    given, others = tables.options(run)
    rows = tables.class_rows(run)
    gained, lost = tables.gained_and_lost(rows)
    ends = tables.before_and_after(run)
    predictions, problem = run.predictions, run.problem
    medians = None
    if predictions is not None and len(predictions):
        scores = (predictions.zeroshot_mcm, predictions.adapted_mcm)
        medians = [float(np.median(values)) for values in scores]
    kinds = problem.left_out.values() if problem else ()
    return {
        "run": run,
        "version": __version__,
        "tables": tables,
        "script": Markup(_SCRIPT),
        "script_hash": base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode(),
        "title": _title(run),
        "subject": _subject(run),
        "verdict": _verdict(run, ends),
        "warnings": (*_doubts(run, ends), *run.warnings),
        "resume": shlex.join(["ueo-fast", "finetune", "--resume", "--out", str(run.path)]),
        "first_warnings": FIRST_WARNINGS,
        "most_listed": MOST_LISTED,
        "known_names": frozenset(problem.known if problem else ()),
        "left_out": [pair for kind in kinds for pair in kind.items()],
        "given": given,
        "others": others,
        "facts": tables.facts(run.environment),
        "zero_shot_only": run.config["method"] == "zeroshot",
        "before": ends[0],
        "after": ends[1],
        "cards": [(name, tables.ROWS[name]) for name in HEADLINE],
        "metrics": tables.metrics_tables(run),
        "medians": medians,
        "rows": rows,
        "gained": gained,
        "lost": lost,
        "by_count": sorted(rows, key=lambda row: -(row.put_after or 0)),
        "score_charts": [(title, Markup(svg)) for title, svg in score_charts(run)],
        "training_charts": [(title, Markup(svg)) for title, svg in training_charts(run)],
        "window": window(len(run.steps)) if run.steps else 1,
        "training_seconds": sum(step.seconds for step in run.steps),
    }


_SCRIPT = files("ueo_fast.finetune.report").joinpath("templates/sort.js").read_text("utf-8")


def _verdict(run: RunData, ends: tables.Ends) -> str:
    before, after = ends
    moved = None
    if run.predictions is not None and run.config["method"] != "zeroshot":
        moved = (run.predictions.changed, len(run.predictions))
    return verdict(
        after.title if after else _title(run),
        before.values if before else None,
        after.values if after else None,
        moved=moved,
        counts=run.counts,
    )


def _doubts(run: RunData, ends: tables.Ends) -> list[WarningRecord]:
    """What makes the results doubtful, whichever method they are of."""
    if run.problem is None or run.predictions is None:
        return []
    line = ends[1] or ends[0]
    found = doubts(
        classes=run.problem.known,
        predicted=run.predictions.adapted_counts,
        images=len(run.predictions),
        auroc=line.auroc if line else None,
    )
    return [WarningRecord(None, text) for text in found]


def _title(run: RunData) -> str:
    """The method's name, as tables write it."""
    method = run.config["method"]
    return METHODS[method].title if method in METHODS else str(method)


def _subject(run: RunData) -> str:
    """What was adapted to what, in a few words."""
    config = run.config
    model = " ".join(
        str(config[key]) for key in ("model", "pretrained") if config.get(key) not in (None, "")
    )
    if config.get("dataset"):
        images = " ".join(
            str(config[key]) for key in ("dataset", "domain", "scenario") if config.get(key)
        )
    else:
        images = Path(str(config.get("data") or "")).name
    return " on ".join(part for part in (model, images) if part)


def score_charts(run: RunData) -> list[Chart]:
    """Histograms of the MCM score before and after, and the ROC curves of both."""
    predictions = run.predictions
    if predictions is None or not len(predictions):
        return []
    scores = {"zero-shot": predictions.zeroshot_mcm}
    if run.config["method"] != "zeroshot":
        scores["adapted"] = predictions.adapted_mcm
    groups = {stage: _groups(values, predictions) for stage, values in scores.items()}
    edges = histogram_edges(list(scores.values()))
    highest = highest_bin([part for stage in groups.values() for part in stage.values()], edges)
    charts = [
        (
            title := f"MCM score, {stage}",
            histogram_chart(f"histogram-{stage}", title, parts, edges, highest=highest),
        )
        for stage, parts in groups.items()
    ]
    if predictions.labelled:
        has_label = predictions.group != UNLABELLED
        is_known = predictions.group[has_label] == KNOWN
        curves = {stage: (values[has_label], is_known) for stage, values in scores.items()}
        charts.append(("ROC curve, known as positive", roc_chart("roc", curves)))
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
    charts: list[Chart] = []
    if run.steps:
        classes = len(run.problem.known) if run.problem else None
        charts.append(("Loss", loss_chart("loss", run.steps)))
        charts.append(("Entropy", entropy_chart("entropy", run.steps, classes)))
        rates = learning_rate_chart("learning-rate", run.steps)
        if rates is not None:
            charts.append(("Learning rate", rates))
    for split, title in tables.SPLITS.items():
        lines = [m for m in run.metrics if m.split == split]
        if not any(m.stage == "during" for m in lines):
            continue
        last = {m.epoch: m for m in sorted(lines, key=lambda m: m.stage != "during")}
        epochs = sorted(last)
        values = {
            METRICS[key].title: [last[epoch].values[key] for epoch in epochs]
            for key in HEADLINE
            if any(last[epoch].values[key] is not None for epoch in epochs)
        }
        chart = metrics_chart(f"metrics-{split}", epochs, values)
        charts.append((f"Metrics: {title.lower()}", chart))
    return charts
