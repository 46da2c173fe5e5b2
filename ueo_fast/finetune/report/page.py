"""``report.html``: one page that tells what a run did, whole in itself."""

from __future__ import annotations

import base64
import functools
import hashlib
import shlex
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from ueo_fast import __version__
from ueo_fast.finetune.data.names import plural
from ueo_fast.finetune.evaluation.results_table import LOWER_IS_BETTER, doubts, verdict
from ueo_fast.finetune.files.atomic import atomic_file
from ueo_fast.finetune.methods import METHODS
from ueo_fast.finetune.report import tables, text
from ueo_fast.finetune.report.charts import window
from ueo_fast.finetune.report.figures import score_charts, training_charts
from ueo_fast.finetune.report.read_run import RunData, RunWarning, read_run

MOST_LISTED = 100
"""Warnings and skipped files that are listed; of more, the number and the file that has them."""

FIRST_WARNINGS = 5
"""Warnings that are seen at once."""


def write_report(run: Path, out: Path | None = None) -> Path:
    """Write the report of a run as one HTML page.

    The page needs no network and no other file: styles, charts (SVG), thumbnails (JPEG) and one
    script, which sorts its tables, are in it. It forbids itself everything else, so no name of a
    class or a file can make it do something. Nothing but the run folder is read, and no image that
    it names is opened: thumbnails were made by the run, and links lead only to images of its
    ``images.json``.

    A page has 150 to 800 kB, and less than 4 MB where every name and message is long and full of
    markup: curves have at most 400 points, there are at most 24 thumbnails of 160 pixels, long
    words lose their middle, and long tables are cut, with a line that names the file that has all.

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
    path = run / "report.html" if out is None else out
    page = render(read_run(run))
    # Surrogates and controls were escaped before; this catches what was overlooked.
    data = page.encode("utf-8", "backslashreplace")
    with atomic_file(path) as file:
        file.write(data)
    return path


def render(run: RunData) -> str:
    """The page of a run, as HTML."""
    return _template().render(**_content(run))


@functools.cache  # compiling it takes a fifth of a page's time
def _template() -> Template:
    environment = Environment(
        loader=PackageLoader("ueo_fast.finetune.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for name in ("percent", "points", "count", "score", "duration", "shown", "name"):
        environment.filters[name] = getattr(text, name)
    environment.filters["plural"] = plural
    return environment.get_template("page.html")


def _content(run: RunData) -> dict[str, Any]:
    given, others = tables.options(run)
    rows = tables.class_rows(run)
    gained, lost = tables.gained_and_lost(rows)
    before, after = tables.before_and_after(run)
    zero_shot_only = run.config.get("method") == "zeroshot"
    predictions = run.predictions
    markup = partial(map, lambda chart: (chart.title, Markup(chart.svg)))
    return {
        "run": run,
        "version": __version__,
        "tables": tables,
        "script": Markup(_SCRIPT),
        "script_hash": base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode(),
        "verdict": _verdict(run),
        "lower_is_better": LOWER_IS_BETTER,
        "known_names": frozenset(run.problem.known if run.problem else ()),
        "warnings": (*_doubts(run), *run.warnings),
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
    }


_SCRIPT = files("ueo_fast.finetune.report").joinpath("templates/sort.js").read_text("utf-8")


def _verdict(run: RunData) -> str:
    before, after = tables.before_and_after(run)
    predictions = run.predictions
    moved = None
    if predictions is not None and run.config.get("method") != "zeroshot":
        moved = (predictions.changed, len(predictions))
    return verdict(
        after.title if after else _title(run),
        before.values if before else None,
        after.values if after else None,
        moved=moved,
        counts=run.counts,
    )


def _doubts(run: RunData) -> list[RunWarning]:
    """What makes the results doubtful, whichever method they are of."""
    if run.problem is None or run.predictions is None:
        return []
    before, after = tables.before_and_after(run)
    line = after or before
    found = doubts(
        classes=run.problem.known,
        predicted=run.predictions.adapted_counts,
        images=len(run.predictions),
        auroc=line.values["auroc"] if line else None,
    )
    return [RunWarning(None, text) for text in found]


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
