"""The figures in the docs are those of the committed CSVs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import setup_script

from benchmarks import gpu_tables, render, results_file

ROOT = Path(__file__).resolve().parents[2]

CPU_FACTS = {"torch", "processor", "instruction set", "threads"}
GPU_FACTS = {"torch", "gpu", "driver", "multiprocessors", "L2", "triton", "nvcc", "commit"}
KERNEL_FACTS = {"gpu", "driver", "nvcc"}  # of kernels that were launched without PyTorch


@pytest.mark.parametrize("page", render.PAGES, ids=lambda page: page.name)
def test_tables_are_what_the_csvs_make(page):
    text = page.read_text(encoding="utf-8")
    assert "<!-- table: " in text
    assert render.rendered(text) == text, "run `python -m benchmarks.render`"


@pytest.mark.parametrize("path", sorted(results_file.FOLDER.rglob("*.csv")), ids=lambda p: p.name)
def test_results_say_where_they_were_made(path):
    header, rows = results_file.read(path.name, path.parent)
    facts = GPU_FACTS if path.name in gpu_tables.CSVS else CPU_FACTS
    if path.name == "gpu_experiments.csv":
        facts = KERNEL_FACTS
    assert {"date", "command", *facts} <= set(header)
    assert "dry run" not in header.get("gpu", "")
    assert rows


def test_the_docs_have_gpu_figures_if_and_only_if_they_were_measured():
    present = {name: (results_file.FOLDER / name).exists() for name in gpu_tables.CSVS}
    assert len({present[name] for name in gpu_tables.LOSS_CSVS}) == 1, "they belong together"
    page = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    assert ("Not measured yet" in page) == (not all(present.values()))


def test_links_of_the_documentation_lead_somewhere():
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("**/*.md")]
    for page in pages:
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_description_for_a_package_index_has_no_link_into_the_repository():
    text = setup_script.load().description()
    links = re.findall(r"\]\(([^)]*)\)", text)
    assert links == ["https://arxiv.org/abs/2308.12919"]
    assert "![" not in text
    assert "drawn from" not in text  # the caption goes with its picture
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"^#.*$", text, re.M) == re.findall(r"^#.*$", page, re.M)
    assert "docs/guide.md (from photographs to scores), docs/methods.md" in text


def test_the_first_screen_of_the_readme_names_the_two_commands():
    first_screen = "\n".join((ROOT / "README.md").read_text(encoding="utf-8").splitlines()[:40])
    assert "make demo" in first_screen
    assert "make test" in first_screen


def test_pre_commit_runs_the_checks_of_ci():
    hooks = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    checks = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "entry: make lint\n" in hooks
    assert "entry: bash .ci/run\n" in hooks
    assert "\nmake lint\n" in checks
