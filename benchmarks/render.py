"""Draws docs/images/ueo_loss_cpu.png and the tables of the docs from the CSVs.

    python -m benchmarks.render

A table stands between `<!-- table: NAME -->` and `<!-- end -->`; a test holds what is committed to
what this script makes of the committed CSVs.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from benchmarks import (
    affine_report,
    calls_report,
    gpu_report,
    input_report,
    markdown,
    results_file,
    step_report,
)

DOCS = Path(__file__).parents[1] / "docs"
PAGES = tuple(
    page
    for name in ("performance", "math", "patch", "guide")
    if (page := DOCS / f"{name}.md").exists()
)
PICTURE = DOCS / "images" / "ueo_loss_cpu.png"

# design targets: at least this many times faster than (b) eager and (c) torch.compile.
TARGETS = {
    (64, 345): (6.0, 4.5),
    (256, 1000): (8.0, 5.5),
    (1024, 1000): (12.0, 8.0),
    (4096, 1000): (9.0, 5.0),
    (65536, 345): (6.0, 4.0),
    (4096, 21841): (6.5, 4.0),
}
# where there is no AVX-512: of the size that CLIP's batches have.
TARGETS_AVX2 = {(1024, 1000): (6.0, 4.0)}
Targets = dict[tuple[int, int], tuple[float, float]]
Key = tuple[int, int, str]


def times(name: str) -> dict[Key, dict[str, float]]:
    """Median microseconds by case and contender."""
    table: dict[Key, dict[str, float]] = {}
    for row in results_file.read(name)[1]:
        key = int(row["rows"]), int(row["columns"]), row["dtype"]
        table.setdefault(key, {})[row["contender"]] = float(row["median_us"])
    return table


def time_table(name: str, targets: Targets | None = None) -> list[str]:
    lines = [
        "| B x C | dtype | ueo_fast | (b) | (c) | vs (b) | vs (c) | vs (a) | of the floor |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for (rows, columns, dtype), by_name in times(name).items():
        ours = by_name["ueo_fast"]
        wanted = (targets or {}).get((rows, columns)) if dtype == "float32" else None
        authors = f"{by_name['authors'] / ours:.1f}" if "authors" in by_name else "-"
        cells = [
            f"{rows} x {columns}",
            dtype,
            markdown.time(ours),
            markdown.time(by_name["eager"]),
            markdown.time(by_name["compile"]),
            markdown.ratio(by_name["eager"] / ours, wanted[0] if wanted else None),
            markdown.ratio(by_name["compile"] / ours, wanted[1] if wanted else None),
            authors,
            f"{100 * by_name['floor'] / ours:.0f}%",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def memory_table() -> list[str]:
    table: dict[Key, dict[str, str]] = {}
    for row in results_file.read("ueo_loss_cpu_memory.csv")[1]:
        key = int(row["rows"]), int(row["columns"]), row["dtype"]
        table.setdefault(key, {})[row["contender"]] = row["peak_over_logits"]
    lines = [
        "| B x C | dtype | ueo_fast | (b) eager | (c) compile |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    for (rows, columns, dtype), peak in table.items():
        cells = [f"{rows} x {columns}", dtype, peak["ueo_fast"], peak["eager"], peak["compile"]]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def instructions_table() -> list[str]:
    """Per loop of the loss: instructions for each register of eight floats, with AVX2."""
    listed = results_file.read("ueo_loss_cpu_instructions.csv")[1]
    numbers = [name for name in listed[0] if name != "loop"]
    totals = [f"{sum(float(row[name]) for row in listed):.1f}" for name in numbers]
    return markdown.table(
        ["loop", *numbers],
        [*([row["loop"], *(row[name] for name in numbers)] for row in listed), ["all", *totals]],
        words=1,
    )


def experiments(only: str = "", name: str = "experiments.csv") -> list[str]:
    lines = [
        "| change | predicted | B x C | before | after | |",
        "| --- | --- | --- | ---: | ---: | --- |",
    ]
    last = ""
    for row in results_file.read(name)[1]:
        change = row["change"]
        if not change.startswith(only):
            continue
        words = [change, row["prediction"]] if change != last else ["", ""]
        size = f"{row['rows']} x {row['columns']} {row.get('dtype', '')}".strip()
        spent = [markdown.time(float(row["before_us"])), markdown.time(float(row["after_us"]))]
        verdict = row["verdict"] if change != last else ""
        lines.append(f"| {' | '.join([*words, size, *spent, verdict])} |")
        last = change
    return lines


TABLES: dict[str, Callable[[], list[str]]] = {
    "tuned": lambda: time_table("ueo_loss_cpu_tuned_allocator.csv", TARGETS),
    "tuned provenance": lambda: markdown.provenance("ueo_loss_cpu_tuned_allocator.csv"),
    "avx": lambda: time_table("ueo_loss_cpu_tuned_allocator_avx2.csv", TARGETS_AVX2),
    "avx provenance": lambda: markdown.provenance("ueo_loss_cpu_tuned_allocator_avx2.csv"),
    "instructions": instructions_table,
    "instructions provenance": lambda: markdown.provenance("ueo_loss_cpu_instructions.csv"),
    "default": lambda: time_table("ueo_loss_cpu_default_allocator.csv"),
    "default provenance": lambda: markdown.provenance("ueo_loss_cpu_default_allocator.csv"),
    "memory": memory_table,
    "memory provenance": lambda: markdown.provenance("ueo_loss_cpu_memory.csv"),
    "experiments": experiments,
    "experiments provenance": lambda: markdown.provenance("experiments.csv"),
    "avx experiments": lambda: experiments(name="experiments_avx2.csv"),
    "avx experiments provenance": lambda: markdown.provenance("experiments_avx2.csv"),
    "keep": lambda: experiments("backward reads exp"),
    "gpu experiments": lambda: experiments(name="gpu_experiments.csv"),
    "gpu experiments provenance": lambda: [  # its command is a description
        f"Measured with {line.replace('`', '')}"
        for line in markdown.provenance("gpu_experiments.csv")
    ],
    **calls_report.TABLES,
    **gpu_report.TABLES,
    **affine_report.TABLES,
    **step_report.TABLES,
    **input_report.TABLES,
}


def rendered(page: str) -> str:
    """The page with every table made anew."""

    def replace(match: re.Match[str]) -> str:
        name = match.group(1)
        body = "\n".join(TABLES[name]())
        return f"<!-- table: {name} -->\n\n{body}\n\n<!-- end -->"

    return re.sub(r"<!-- table: ([a-z ]+) -->.*?<!-- end -->", replace, page, flags=re.DOTALL)


def draw() -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    table = times("ueo_loss_cpu_tuned_allocator.csv")
    keys = [(rows, columns, "float32") for rows, columns in TARGETS]
    header = results_file.read("ueo_loss_cpu_tuned_allocator.csv")[0]
    figure, axes = plt.subplots(figsize=(8, 3.2), layout="constrained")
    for offset, (name, label, colour) in enumerate(
        (
            ("eager", "well-written eager PyTorch", "#9aa5b1"),
            ("compile", "torch.compile", "#4c78a8"),
        )
    ):
        ratios = [table[key][name] / table[key]["ueo_fast"] for key in keys]
        positions = [place + 0.38 * (offset - 0.5) for place in range(len(keys))]
        bars = axes.bar(positions, ratios, width=0.36, label=f"against {label}", color=colour)
        axes.bar_label(bars, fmt="%.1f", fontsize=8)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xticks(range(len(keys)), [f"{rows} x {columns}" for rows, columns, _ in keys])
    axes.set_xlabel("logits (batch x classes), float32")
    axes.set_ylabel("times faster")
    threads = header["threads"].split()[0]
    axes.set_title(
        f"ueo_loss, forward + backward, {threads} threads of {header['processor']}, "
        f"{header['instruction set']}",
        fontsize=10,
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="upper left")
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE, dpi=130, metadata={"Software": None})
    plt.close(figure)


def main() -> None:
    for page in PAGES:
        page.write_text(rendered(page.read_text(encoding="utf-8")), encoding="utf-8")
    draw()


if __name__ == "__main__":
    main()
