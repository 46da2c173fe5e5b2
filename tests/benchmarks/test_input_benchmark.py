"""The benchmark of loading images: it runs, compares what it loads, and its table is its CSV's."""

from __future__ import annotations

import pytest

from benchmarks import (
    __main__,
    bench_input,
    input_run,
    render,
    results_file,
    training_tables,
)


def test_a_run_goes_from_measuring_to_the_docs(tmp_path, monkeypatch):
    """As `python -m benchmarks input` does it, but of one size."""
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)  # no times are kept in one
    monkeypatch.setattr(results_file, "FOLDER", tmp_path)
    monkeypatch.setenv("UEO_FAST_BENCH_CASES", "tiny")
    for name, value in {"PHOTOS": 4, "MEGAPIXELS": "0.2"}.items():
        monkeypatch.setattr(input_run, name, value)
    monkeypatch.setattr(input_run, "LOADING", dict(list(input_run.LOADING.items())[-1:]))
    __main__.measure_input({"command": "a test", "threads": "2"}, 2, 1)
    header, rows = results_file.read(training_tables.INPUT)
    assert header["threads"] == "1"
    assert [(row["view"], row["contender"]) for row in rows] == [
        (view, name) for view in bench_input.VIEWS for name in bench_input.CONTENDERS
    ]
    assert {row["megapixels"] for row in rows} == {"0.8"}
    assert all(float(row["lowest_us"]) > 0 for row in rows)
    (row,) = results_file.read(training_tables.INPUT_RUN)[1]
    assert row["photos"] == "4"
    assert 0 < float(row["first_s"]) < float(row["run_s"])
    assert 0 < float(row["epoch_s"]) < float(row["run_s"])
    for marker in training_tables.INPUT_TABLES:
        drawn = render.rendered(f"before\n<!-- table: {marker} -->\n<!-- end -->\nafter")
        assert "Not measured yet" not in drawn
        assert render.rendered(drawn) == drawn


def test_sizes_match_their_megapixels():
    for megapixels, (width, height) in bench_input.SIZES.items():
        assert width * height / 1e6 == pytest.approx(float(megapixels), rel=0.02)


def test_a_contender_with_a_different_view_is_rejected(monkeypatch):
    monkeypatch.setitem(bench_input.SIZES, "0.1", (400, 300))
    monkeypatch.setitem(bench_input.MAKERS, "ueo_fast", lambda view: bench_input.ours("training"))
    bench_input.contender("ueo_fast", ("0.1", "later epochs"))
    with pytest.raises(AssertionError):
        bench_input.contender("ueo_fast", ("0.1", "first pass"))


def test_the_table_is_that_of_the_csv(tmp_path):
    rows = [
        {
            **dict(zip(training_tables.INPUT_KEYS, ("12", view, 2, 3000), strict=True)),
            "contender": name,
            "median_us": f"{median:.1f}",
        }
        for view in ("first pass", "later epochs")
        for name, median in (("ueo_fast", 1e5), ("authors", 6e5), ("tensors", 4e5))
    ]
    results_file.write(training_tables.INPUT, {"command": "a test"}, rows, tmp_path)
    assert training_tables.TABLES["input"](tmp_path)[2:] == [
        "| 12 | 3000 | first pass | 20.0 | 3.3 | 5.0 | **6.0** (target 5) | 4.0 |",
        "| 12 | 3000 | later epochs | 20.0 | 3.3 | 5.0 | 6.0 (target 25, missed) | 4.0 |",
    ]
    assert training_tables.TABLES["input expectation"](tmp_path)[2:] == [
        "| 12 | first pass | 8 min | 50 min |",
        "| 12 | later epochs | 8 min | 50 min |",
    ]


def test_without_a_csv_the_tables_say_so(tmp_path, monkeypatch):
    monkeypatch.setattr(results_file, "FOLDER", tmp_path)
    for table in training_tables.INPUT_TABLES.values():
        assert table() == ["Not measured yet: `python -m benchmarks input` does it."]
