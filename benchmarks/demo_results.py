"""Runs the demonstration's recipes and puts their tables and plots into docs/.

    python benchmarks/demo_results.py         # three runs, some five minutes on two cores

The run folders' own `results.md` go to docs/results/ and, one below the other, into docs/demo.md,
so that no number there is written by hand.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from ueo_fast.finetune.demo.config import DemoConfig
from ueo_fast.finetune.demo.run import run_demo

DOCS = Path(__file__).parents[1] / "docs"
OUT = DOCS / "results"
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"

# The default; the shift without AdaBN's confound; the shift that the method does not repair.
RECIPES = (
    DemoConfig(tower="bn", shift="contrast"),
    DemoConfig(tower="vit", shift="noise"),
    DemoConfig(tower="bn", shift="rotation"),
)
FILES = tuple(f"demo_{recipe.tower}_{recipe.shift}" for recipe in RECIPES)
PLOTS = ("mcm_histogram", "per_class_accuracy", "samples")  # of the default run


def generated_block(tables: list[str]) -> str:
    """What stands in docs/demo.md from :data:`BEGIN` to :data:`END`, both included."""
    # A heading of a run becomes one below the page's own two levels.
    body = "\n".join(table.replace("# ", "### ", 1) for table in tables)
    return f"{BEGIN}\n\n{body}\n{END}"


def main() -> None:
    tables = []
    for recipe, name in zip(RECIPES, FILES, strict=True):
        with tempfile.TemporaryDirectory() as folder:
            # `out` is not part of the command that results.md shows.
            run = run_demo(DemoConfig(**{**recipe.as_dict(), "out": folder}))
            shutil.copyfile(run / "results.md", OUT / f"{name}.md")
            tables.append((run / "results.md").read_text(encoding="utf-8"))
            if recipe == DemoConfig():
                for plot in PLOTS:
                    shutil.copyfile(run / f"{plot}.png", OUT / f"{name}_{plot}.png")
    page = DOCS / "demo.md"
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    page.write_text(f"{before}{generated_block(tables)}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
