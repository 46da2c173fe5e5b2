"""The tables of the images that are loaded per second, for docs/performance.md."""

from __future__ import annotations

import functools
from pathlib import Path

from benchmarks import markdown
from benchmarks.affine_report import read_times

CSV = "input_cpu.csv"
KEYS = ("megapixels", "view", "images", "kb")
NOT_MEASURED = ["Not measured yet: `python -m benchmarks input` does it."]
TARGETS = {("12", "test"): 5.0, ("2", "test"): 2.0}
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


_if_measured = functools.partial(markdown.if_measured, otherwise=NOT_MEASURED)

TABLES = {
    "input": _if_measured(CSV, table),
    "input provenance": _if_measured(CSV, lambda: markdown.provenance(CSV)),
}
"""By name of the marker."""
