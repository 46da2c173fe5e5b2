"""docs/demo.md shows the run folders' own tables, and the rule by which they are read."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

for module in ("open_clip", "sklearn", "matplotlib", "tqdm"):
    pytest.importorskip(module)

from benchmarks import demo_results  # noqa: E402
from ueo_fast.finetune.demo.report import RULE  # noqa: E402


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def test_the_generated_block_is_the_committed_tables():
    page = read(demo_results.DOCS / "demo.md")
    tables = [read(demo_results.OUT / f"{name}.md") for name in demo_results.FILES]
    assert page.count(demo_results.BEGIN) == page.count(demo_results.END) == 1
    assert demo_results.generated_block(tables) in page


def test_every_table_is_of_its_recipe():
    for recipe, name in zip(demo_results.RECIPES, demo_results.FILES, strict=True):
        assert f"Command: `{recipe.command()}`\n" in read(demo_results.OUT / f"{name}.md")


def test_the_prose_states_the_rule():
    page = read(demo_results.DOCS / "demo.md")
    prose = page[: page.index(demo_results.BEGIN)]
    assert RULE in " ".join(prose.split())
