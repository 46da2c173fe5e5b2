"""The benchmark of what a call costs: it runs, compares gradients, and its table is its CSV's."""

from __future__ import annotations

import pytest
import torch

import ueo_fast
from benchmarks import (
    __main__,
    bench_calls,
    loss_tables,
    render,
    results_file,
)
from ueo_fast import backends

needs_ops = pytest.mark.skipif(
    backends.unavailable_reason("cpp") is not None, reason="it measures the C++ ops"
)


@needs_ops
def test_a_run_goes_from_measuring_to_the_docs(tmp_path, monkeypatch):
    monkeypatch.setattr(results_file, "FOLDER", tmp_path)
    before = torch.get_num_threads()
    __main__.measure_calls({"command": "a test", "threads": "2"}, 2, 1)
    assert torch.get_num_threads() == before
    header, rows = results_file.read(loss_tables.CALLS)
    assert [
        (*(row[key] for key in bench_calls.Case._fields), row["contender"]) for row in rows
    ] == [(*map(str, case), name) for case in bench_calls.CASES for name in bench_calls.CONTENDERS]
    assert header["threads"] == "1"
    assert all(float(row["lowest_us"]) > 0 for row in rows)
    for marker in loss_tables.CALLS_TABLES:
        drawn = render.rendered(f"before\n<!-- table: {marker} -->\n<!-- end -->\nafter")
        assert "Not measured yet" not in drawn
        assert render.rendered(drawn) == drawn


@needs_ops
def test_a_loss_with_another_gradient_is_rejected(monkeypatch):
    case = bench_calls.CASES[1]
    bench_calls.contender("ueo_fast", case)
    loss = ueo_fast.ueo_loss
    monkeypatch.setattr(ueo_fast, "ueo_loss", lambda *args, **options: 2 * loss(*args, **options))
    with pytest.raises(AssertionError):
        bench_calls.contender("ueo_fast", case)


def test_half_of_the_cases_give_a_confidence():
    for case in bench_calls.CASES:
        logits, confidence = case.inputs()
        assert logits.shape == (case.rows, case.columns)
        assert isinstance(confidence, torch.Tensor) == (case.confidence == "given")


def write(folder, times):
    rows = [
        {
            **bench_calls.Case(*case)._asdict(),
            "contender": name,
            "lowest_us": f"{time}",
        }
        for case, by_name in times.items()
        for name, time in zip(bench_calls.CONTENDERS, by_name, strict=True)
    ]
    results_file.write(loss_tables.CALLS, {"command": "a test"}, rows, folder)


def test_the_table_is_that_of_the_csv_and_either_target_will_do(tmp_path):
    write(
        tmp_path,
        {
            (8, 10, "own"): (30.0, 9.0, 45.0, 70.0),
            (8, 10, "given"): (60.0, 10.0, 100.0, 120.0),
            (64, 345, "own"): (30.0, 20.0, 60.0, 90.0),
        },
    )
    assert loss_tables.TABLES["calls"](tmp_path)[2:] == [
        "| 8 x 10 | own | 30.0 µs | 9.0 µs | 45.0 µs | 70.0 µs | 6.0 µs | 31.0 µs | 1.56 | met |",
        "| 8 x 10 | given | 60.0 µs | 10.0 µs | 100 µs | 120 µs | 30.0 µs | 50.0 µs | 1.20 | met |",
        "| 64 x 345 | own | 30.0 µs | 20.0 µs | 60.0 µs | 90.0 µs | 10.0 µs | 40.0 µs | 1.50 "
        "| missed |",
    ]


def test_without_a_csv_the_tables_say_so(tmp_path, monkeypatch):
    monkeypatch.setattr(results_file, "FOLDER", tmp_path)
    for table in loss_tables.CALLS_TABLES.values():
        assert table() == ["Not measured yet: `python -m benchmarks calls` does it."]
