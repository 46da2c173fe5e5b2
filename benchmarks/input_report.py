"""The tables of the images that are loaded per second, for docs/performance.md."""

from __future__ import annotations

from pathlib import Path

from benchmarks import affine_report, markdown, results_file

CSV = "input_cpu.csv"
KEYS = ("megapixels", "view", "images", "kb")
NOT_MEASURED = ["Not measured yet: `python -m benchmarks input` does it."]
TARGETS = {("12", "test"): 5.0, ("2", "test"): 2.0}
"""At least this many times as fast as the authors', in the first pass over the images."""


def table(folder: Path | None = None) -> list[str]:
    seconds: dict[tuple[str, ...], dict[str, float]] = {}
    for row in results_file.read(CSV, folder)[1]:
        case = tuple(row[key] for key in KEYS)
        seconds.setdefault(case, {})[row["contender"]] = float(row["median_us"]) / 1e6
    head = ["megapixels", "kB", "view", "ueo_fast", "the authors'", "torchvision's tensors"]
    lines = []
    for (megapixels, view, images, kb), by_name in seconds.items():
        names = ("ueo_fast", "authors", "tensors")
        rates = [f"{int(images) / by_name[name]:.1f}" for name in names]
        faster = by_name["authors"] / by_name["ueo_fast"]
        ratios = [
            markdown.ratio(faster, TARGETS.get((megapixels, view))),
            f"{by_name['tensors'] / by_name['ueo_fast']:.1f}",
        ]
        lines.append([megapixels, kb, view, *rates, *ratios])
    return markdown.table([*head, "vs the authors'", "vs tensors"], lines, words=3)


TABLES = {
    "input": affine_report.if_measured(CSV, table, NOT_MEASURED),
    "input provenance": affine_report.if_measured(
        CSV, lambda: markdown.provenance(results_file.read(CSV)[0]), NOT_MEASURED
    ),
}
"""By name of the marker."""
