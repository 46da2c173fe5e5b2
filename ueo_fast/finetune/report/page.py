"""``report.html``: one page that tells what a run did, whole in itself."""

from __future__ import annotations

import shlex
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from ueo_fast import __version__
from ueo_fast.finetune.files.atomic import atomic_file
from ueo_fast.finetune.methods.registry import METHODS
from ueo_fast.finetune.report import tables, text
from ueo_fast.finetune.report.charts import window
from ueo_fast.finetune.report.figures import score_charts, training_charts
from ueo_fast.finetune.report.read_run import RunData, read_run
from ueo_fast.finetune.report.thumbnails import thumbnails

MOST_LISTED = 100
"""Warnings and skipped files that are listed; of more, the number and the file that has them."""

FIRST_WARNINGS = 5
"""Warnings that are seen at once."""


def write_report(run: Path, out: Path | None = None) -> Path:
    """Write the report of a run as one HTML page.

    The page needs no network and no other file: styles, charts (SVG) and thumbnails (JPEG) are in
    it. It has no script and forbids itself all that it does not bring, so that no name of a class
    or a file can make it do something. It is some 150 to 500 kB, and less than 3 MB where every
    name and message is long and nothing but markup: curves have at most 400 points, there are at
    most 24 thumbnails of 160 pixels, long words lose their middle, and long tables end where they
    are said to.

    Args:
        run: a run folder of ``ueo-fast finetune``, finished or not.
        out: of the page; ``None``: ``report.html`` in the run folder. It is written whole or not
            at all.

    Returns:
        Where the page is.

    Raises:
        FileNotFoundError, NotADirectoryError: ``run`` is no run folder.
        ValueError: a file of the run is broken; with its name and line.
        OSError: the page cannot be written.
    """
    path = run / "report.html" if out is None else out
    page = render(read_run(run))
    # What is no character was escaped before; this is for what nobody thought of.
    data = page.encode("utf-8", "backslashreplace")
    with atomic_file(path) as file:
        file.write(data)
    return path


def render(run: RunData) -> str:
    """The page of a run, as HTML."""
    environment = Environment(
        loader=PackageLoader("ueo_fast.finetune.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for name in ("percent", "points", "count", "score", "duration", "plural", "shown", "name"):
        environment.filters[name] = getattr(text, name)
    return environment.get_template("page.html").render(**_content(run))


def _content(run: RunData) -> dict[str, Any]:
    given, others = tables.options(run)
    rows = tables.class_rows(run)
    gained, lost = tables.gained_and_lost(rows)
    known = run.problem.known if run.problem else ()
    before, after = tables.before_and_after(run)
    zero_shot_only = run.config.get("method") == "zeroshot"
    predictions = run.predictions
    markup = partial(map, lambda chart: (chart.title, Markup(chart.svg)))
    return {
        "run": run,
        "version": __version__,
        "tables": tables,
        "title": _title(run),
        "subject": _subject(run),
        "resume": shlex.join(["ueo-fast", "finetune", "--resume", "--out", str(run.path)]),
        "first_warnings": FIRST_WARNINGS,
        "most_listed": MOST_LISTED,
        "given": given,
        "others": others,
        "facts": tables.facts(run.environment),
        "zero_shot_only": zero_shot_only,
        "before": before,
        "after": after,
        "metrics": tables.metrics_tables(run),
        "medians": None
        if predictions is None or not len(predictions)
        else (
            float(np.median(predictions.zeroshot_mcm)),
            float(np.median(predictions.adapted_mcm)),
        ),
        "score_charts": list(markup(score_charts(run))),
        "rows": rows,
        "gained": gained,
        "lost": lost,
        "by_count": sorted(rows, key=lambda row: -(row.put_after or 0)),
        "training_charts": list(markup(training_charts(run))),
        "window": window(len(run.steps)) if run.steps else 1,
        "training_seconds": sum(step.seconds for step in run.steps),
        "most_confident": thumbnails(predictions.most_confident, known) if predictions else [],
        "least_confident": thumbnails(predictions.least_confident, known) if predictions else [],
    }


def _title(run: RunData) -> str:
    """The method's name, as tables write it."""
    name = str(run.config.get("method", "run"))
    return METHODS[name].title if name in METHODS else name


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
