"""The tables of loading images and of a run on photographs, for the docs."""

from __future__ import annotations

import functools
from pathlib import Path

from benchmarks import markdown, results_file
from benchmarks.affine_report import read_times

CSV = "input_cpu.csv"
RUNS = "input_run_cpu.csv"
KEYS = ("megapixels", "view", "images", "kb")
NOT_MEASURED = ["Not measured yet: `python -m benchmarks input` does it."]
TARGETS = {
    **{("12", "first pass"): 5.0, ("2", "first pass"): 2.0},
    **{("12", "later epochs"): 25.0, ("2", "later epochs"): 4.0, ("0.2", "later epochs"): 1.5},
}
"""Design targets: times as fast as the authors' loading."""


def table(folder: Path | None = None) -> list[str]:
    head = ["megapixels", "kB", "view", "ueo_fast", "the authors'", "torchvision's tensors"]
    lines = []
    for (megapixels, view, images, kb), by_name in read_times(CSV, KEYS, folder).cases.items():
        names = ("ueo_fast", "authors", "tensors")
        rates = [f"{1e6 * int(images) / by_name[name]:.1f}" for name in names]
        faster = by_name["authors"] / by_name["ueo_fast"]
        ratios = [
            markdown.ratio(faster, TARGETS.get((megapixels, view))),
            f"{by_name['tensors'] / by_name['ueo_fast']:.1f}",
        ]
        lines.append([megapixels, kb, view, *rates, *ratios])
    return markdown.table([*head, "vs the authors'", "vs tensors"], lines, words=3)


def run_table(folder: Path | None = None) -> list[str]:
    head = ["loading", "first pass", "the last epoch", "the whole run"]
    return markdown.table(
        head,
        [
            [
                row["loading"],
                *(f"{float(row[name]):.1f} s" for name in ("first_s", "epoch_s", "run_s")),
            ]
            for row in results_file.read(RUNS, folder)[1]
        ],
        words=1,
    )


PHOTOS = 10_000


def expectation(folder: Path | None = None) -> list[str]:
    """What a user with many photographs waits for, from the measured rates."""
    lines = []
    for (megapixels, view, images, _), by_name in read_times(CSV, KEYS, folder).cases.items():
        seconds = {name: by_name[name] / 1e6 / int(images) for name in ("ueo_fast", "authors")}
        lines.append([megapixels, view, *(_duration(PHOTOS * seconds[n]) for n in seconds)])
    return markdown.table(["megapixels", "", "ueo_fast", "the authors' loading"], lines, words=2)


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


_if_measured = functools.partial(markdown.if_measured, otherwise=NOT_MEASURED)

TABLES = {
    "input": _if_measured(CSV, table),
    "input provenance": _if_measured(CSV, lambda: markdown.provenance(CSV)),
    "input expectation": _if_measured(CSV, expectation),
    "input run": _if_measured(RUNS, run_table),
    "input run provenance": _if_measured(RUNS, lambda: markdown.provenance(RUNS)),
}
"""By name of the marker."""
