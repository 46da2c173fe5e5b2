"""Draws docs/images/ueo_loss_cpu.png and the tables of the docs from the CSVs.

    python -m benchmarks.render

A table stands between `<!-- table: NAME -->` and `<!-- end -->`. A test compares the committed docs
with what this script makes from the committed CSVs.
"""

from __future__ import annotations

import re
from pathlib import Path

from benchmarks import gpu_tables, loss_tables, results_file, training_tables
from benchmarks.tables import LOSS_KEYS, by_case

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = (
    ROOT / "README.md",
    *(DOCS / f"{name}.md" for name in ("performance", "math", "patch", "guide")),
)
PICTURE = DOCS / "images" / "ueo_loss_cpu.png"

TABLES = {**loss_tables.TABLES, **training_tables.TABLES, **gpu_tables.TABLES}


def rendered(page: str) -> str:
    """Return the page with every table drawn again."""

    def replace(match: re.Match[str]) -> str:
        name = match.group(1)
        body = "\n".join(TABLES[name]())
        return f"<!-- table: {name} -->\n\n{body}\n\n<!-- end -->"

    return re.sub(r"<!-- table: ([a-z ]+) -->.*?<!-- end -->", replace, page, flags=re.DOTALL)


def draw() -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    csv = loss_tables.LOSS_TUNED
    lines = {
        (int(line["rows"]), int(line["columns"])): line
        for line in by_case(LOSS_KEYS, "median_us")(csv, results_file.FOLDER)
        if line["dtype"] == "float32"
    }
    shown = [lines[size] for size in loss_tables.TARGETS]
    header = results_file.read(csv)[0]
    figure, axes = plt.subplots(figsize=(8, 3.2), layout="constrained")
    for offset, (name, label, colour) in enumerate(
        (
            ("eager", "well-written eager PyTorch", "#9aa5b1"),
            ("compile", "torch.compile", "#4c78a8"),
        )
    ):
        ratios = [line[name] / line["ueo_fast"] for line in shown]
        positions = [place + 0.38 * (offset - 0.5) for place in range(len(shown))]
        bars = axes.bar(positions, ratios, width=0.36, label=f"against {label}", color=colour)
        axes.bar_label(bars, fmt="%.1f", fontsize=8)
    axes.axhline(1, color="black", linewidth=0.8)
    sizes = [f"{rows} x {columns}" for rows, columns in loss_tables.TARGETS]
    axes.set_xticks(range(len(shown)), sizes)
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
