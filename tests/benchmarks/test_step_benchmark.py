"""The benchmark of a whole step: it runs, compares the losses, and its tables are its CSV's."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch

from benchmarks import (
    __main__,
    authors_step,
    render,
    results_file,
    step_cases,
    training_tables,
    visual_cases,
)
from benchmarks.step_cases import PARTS, Step, StepCase

TINY = step_cases.DRY_CASES[0]


pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_authors_step_is_independent():
    tree = ast.parse(Path(authors_step.__file__).read_text(encoding="utf-8"))
    imported = {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
    } | {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert imported == {"__future__", "collections.abc", "typing", "torch"}


def test_the_class_names_are_domainnets():
    names = step_cases.class_names(300)
    assert len(set(names)) == 300
    assert names[0] == "aircraft_carrier"
    assert len(step_cases.class_names(1000)) == 345


def test_both_contenders_take_the_same_steps():
    pytest.importorskip("open_clip")
    ours, theirs = Step("ueo_fast", TINY), Step("authors", TINY)
    before = [(step(), step())[-1][0] for step in (ours, theirs)]
    assert before[0] == pytest.approx(before[1], abs=1e-5)
    classifier = ours.training.classifier
    assert classifier.patch_handle is not None
    assert classifier.prompt.packed_rows is not None
    assert theirs.training.prompts().shape[1] == 77
    contexts = [classifier.prompt.context, theirs.training.prompts.context]
    torch.testing.assert_close(*contexts, rtol=0, atol=1e-6)
    for (name, one), other in zip(
        theirs.training.affine.items(), classifier.affine_parameters(), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6, msg=name)


@pytest.mark.slow  # the benchmarks of the affine layers and of loading images do it in less time
def test_a_run_goes_from_measuring_to_the_docs(tmp_path, monkeypatch):
    """As `python -m benchmarks step` does it, but a tiny tower."""
    pytest.importorskip("open_clip")
    # pytest-benchmark keeps no times in a worker of xdist, which this test may run in.
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    monkeypatch.setattr(results_file, "FOLDER", tmp_path)
    monkeypatch.setattr(step_cases, "CASES", (TINY,))
    monkeypatch.setenv("UEO_FAST_BENCH_CASES", "tiny")  # the text tower's
    __main__.measure_step({"command": "a test", "threads": "1"}, 1, 2)
    header, rows = results_file.read(training_tables.STEP)
    assert header["open_clip"] == visual_cases.version()
    assert header["allocator"] == "as it comes"
    assert {row["contender"] for row in rows} == {"ueo_fast", "authors"}
    assert [row["part"] for row in rows[:7]] == [training_tables.WHOLE, *PARTS]
    assert {row["turns"] for row in rows} == {"2"}
    for name in ("ueo_fast", "authors"):
        times = {row["part"]: float(row["lowest_s"]) for row in rows if row["contender"] == name}
        assert all(seconds > 0 for seconds in times.values())
        whole = times.pop(training_tables.WHOLE)
        assert 0.5 * whole < sum(times.values()) < whole
    _, texts = results_file.read(training_tables.STEP_TEXT)
    assert {row["contender"] for row in texts} == set(training_tables.TEXTS)
    rows_of = {row["contender"]: int(row["rows"]) for row in texts}
    assert rows_of["packed"] < rows_of["cut"] < rows_of["whole"] == 4 * 77
    for marker in training_tables.STEP_TABLES:
        drawn = render.rendered(f"before\n<!-- table: {marker} -->\n<!-- end -->\nafter")
        assert "Not measured yet" not in drawn
        assert render.rendered(drawn) == drawn


def test_the_tolerance_of_the_losses_tells_another_loss_from_the_right_one(monkeypatch):
    pytest.importorskip("open_clip")
    right = authors_step.universal_entropy
    step = Step("authors", TINY)
    loss, _ = step()
    monkeypatch.setattr(authors_step, "universal_entropy", lambda z, w: right(z, w, 0.9))
    assert abs(step()[0] - loss) > 10 * step_cases.LOSSES_OFF


def write_results(folder):
    """A CSV by hand: a tower that is fast enough, and one that is not, larger batch first."""
    times = {
        ("RN50", 64): {"ueo_fast": 2.0, "authors": 8.0},
        ("RN50", 16): {"ueo_fast": 0.5, "authors": 4.0},
        ("ViT-B-16", 64): {"ueo_fast": 5.0, "authors": 10.0},
    }
    runs = [
        {
            "stats": {"median": whole * factor},
            "extra_info": {
                "model": model,
                "batch": batch,
                "classes": 300,
                "contender": name,
                "parts": dict.fromkeys(PARTS, whole * factor / 8),
            },
        }
        for (model, batch), by_name in times.items()
        for factor in (0.9, 1.0, 1.5)
        for name, whole in by_name.items()
    ]
    rows = __main__.step_rows(runs)
    results_file.write(training_tables.STEP, {"command": "a test"}, rows, folder)


def test_the_tables_are_those_of_the_csv(tmp_path):
    write_results(tmp_path)
    first, second, third = training_tables.TABLES["step speed"](tmp_path)[2:]
    assert first == "| RN50 | 16 | 300 | 500.0 ms | 4.00 s | **8.0** (target 2.4) |"
    assert second.startswith("| RN50 | 64 |")
    assert third.endswith("| 5.00 s | 10.00 s | 2.0 (target 2.4, missed) |")
    parts = training_tables.TABLES["step parts"](tmp_path)
    assert len(parts) == 2 + 6
    assert parts[2] == f"| RN50 | 16 | ueo_fast |{' 62.5 ms |' * 6}"
    assert parts[3].startswith("| RN50 | 16 | the authors' | 500.0 ms |")
    (sentence,) = training_tables.TABLES["step missed"](tmp_path)
    assert "ViT-B-16 at batch 64 (2.00; the image tower alone is 25% of the authors'" in sentence
    assert "4.00 times as fast" in sentence
    assert "RN50 at batch 16 (" not in sentence
    assert "Not measured: ViT-B-16 at batch 16, RN50 at batch 32, ViT-B-16 at batch 32." in sentence


def test_where_nothing_is_missed_that_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(training_tables, "STEP_TARGET", 1.5)
    write_results(tmp_path)
    monkeypatch.setattr(training_tables, "CASES", ())
    missed = training_tables.TABLES["step missed"](tmp_path)
    assert missed == ["Less than 1.5 times as fast: nowhere."]


def test_without_a_csv_the_tables_say_so(tmp_path, monkeypatch):
    monkeypatch.setattr(results_file, "FOLDER", tmp_path)
    for table in training_tables.STEP_TABLES.values():
        assert table() == ["Not measured yet: `python -m benchmarks step` does it."]


def test_the_cases_are_those_of_the_design():
    assert {case.batch for case in step_cases.CASES} == {16, 32, 64}
    assert {case.model for case in step_cases.CASES} == {"RN50", "ViT-B-16"}
    assert all(case.classes == 300 and case.pixels == 224 for case in step_cases.CASES)
    assert str(StepCase("RN50", 16)) == "RN50-16-300"
