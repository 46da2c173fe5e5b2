"""Run folders, result tables and plots."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import warnings

import pytest
import torch

from ueo_fast.finetune.plots import (
    plot_mcm_histograms,
    plot_per_class_accuracy,
    plot_samples,
)
from ueo_fast.finetune.results_table import ResultsTable, Spread
from ueo_fast.finetune.run_folder import RunFolder


def test_default_folders_are_numbered_within_a_second(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "strftime", lambda pattern: pattern.split("-")[0] + "-now")
    names = [RunFolder.create(None, prefix="demo").path.as_posix() for _ in range(3)]
    assert names == ["runs/demo-now", "runs/demo-now-2", "runs/demo-now-3"]


def test_a_folder_with_content_is_never_used(tmp_path):
    fresh = tmp_path / "a" / "b"
    assert RunFolder.create(fresh, prefix="demo").path == fresh
    assert RunFolder.create(fresh, prefix="demo").path == fresh  # still empty
    (fresh / "metrics.jsonl").write_text("mine")
    with pytest.raises(FileExistsError, match="is not empty, and nothing is overwritten: choose"):
        RunFolder.create(fresh, prefix="demo")
    with pytest.raises(FileExistsError, match="is a file; --out names a folder"):
        RunFolder.create(fresh / "metrics.jsonl", prefix="demo")
    assert (fresh / "metrics.jsonl").read_text() == "mine"


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    folder = RunFolder(tmp_path)
    folder.write_json("config.json", {"a": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        folder.write_json("config.json", {"a": float("nan")})

    def killed(*_):
        raise OSError("killed")

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(OSError, match="killed"):
        folder.write_json("config.json", {"a": 2})
    assert json.loads((tmp_path / "config.json").read_text()) == {"a": 1}


def test_json_lines_survive_a_torn_last_line(tmp_path):
    folder = RunFolder(tmp_path)
    records = [{"seed": 0, "hm": 0.5}, {"seed": 1, "hm": None}]
    for record in records:
        folder.append_json_line("metrics.jsonl", record)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"seed": 2, "h')
    assert folder.read_json_lines("metrics.jsonl") == records


def test_environment_says_what_numbers_depend_on(tmp_path):
    folder = RunFolder(tmp_path)
    folder.write_environment(command="ueo-fast demo --seeds 4", seeds=(4,), threads=2)
    values = json.loads((tmp_path / "environment.json").read_text())
    assert values["command"] == "ueo-fast demo --seeds 4"
    assert values["seeds"] == [4]
    assert values["threads"] == 2
    assert values["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert values["cpu"]
    assert values["cpu_capability"] == torch.backends.cpu.get_cpu_capability()


RECORDS = [
    {"method": "zero-shot", "per_class_accuracy": 0.5, "auroc": 0.6, "hm": 0.55},
    {"method": "UEO", "per_class_accuracy": 0.8, "auroc": 0.7, "hm": 0.75},
    {"method": "zero-shot", "per_class_accuracy": 0.6, "auroc": 0.6, "hm": 0.60},
    {"method": "UEO", "per_class_accuracy": 0.9, "auroc": 0.9, "hm": 0.90},
]


def test_table_has_mean_and_sample_deviation_in_percent():
    table = ResultsTable.from_records(RECORDS)
    assert list(table.rows) == ["zero-shot", "UEO"]
    spread = table.rows["UEO"]["per_class_accuracy"]
    assert (spread.mean, spread.std, spread.count) == (
        pytest.approx(0.85),
        pytest.approx(0.0707107, rel=1e-5),
        2,
    )
    assert table.markdown().splitlines() == [
        "| method | per-class accuracy | AUROC (known as positive) | HM |",
        "| --- | ---: | ---: | ---: |",
        "| zero-shot | 55.0 ± 7.1 | 60.0 ± 0.0 | 57.5 ± 3.5 |",
        "| UEO | 85.0 ± 7.1 | 80.0 ± 14.1 | 82.5 ± 10.6 |",
    ]
    lines = table.text().splitlines()
    assert len(lines) == 4
    assert len({len(line) for line in lines}) == 1
    assert "known as positive" in lines[0]


def test_table_of_one_seed_has_no_spread_and_undefined_metrics_a_dash():
    record = {"method": "UEO", "per_class_accuracy": 0.25, "auroc": None, "hm": None}
    table = ResultsTable.from_records([record])
    assert table.markdown().splitlines()[-1] == "| UEO | 25.0 | - | - |"
    assert Spread.of([0.25]).std is None


def png_size(path) -> int:
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG")
    return len(data)


def test_plots_are_small_png_files(tmp_path):
    scores = torch.rand(50)
    known = torch.arange(50) % 3 > 0
    plot_mcm_histograms(tmp_path / "h.png", {"before": (scores, known), "after": (scores, known)})
    plot_mcm_histograms(tmp_path / "closed.png", {"all": (scores, torch.ones(50).bool())})
    plot_per_class_accuracy(
        tmp_path / "a.png",
        {"x": {"cat": 0.5}, "y": {"cat": 1.0, "dog": 0.2}},
        classes=["cat", "dog"],
    )
    row = (torch.rand(4, 3, 8, 8), ["a", "b", "c", "d"])
    plot_samples(tmp_path / "s.png", {"source": row, "target": row})
    for name in ("h", "closed", "a", "s"):
        assert png_size(tmp_path / f"{name}.png") < 150_000


@pytest.mark.parametrize("value", [0.25, 0.0])
def test_equal_scores_are_drawn_without_a_warning(tmp_path, value):
    scores = torch.full((20,), value)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plot_mcm_histograms(tmp_path / "h.png", {"all": (scores, torch.arange(20) < 12)})
    assert png_size(tmp_path / "h.png") > 0


def test_plots_leave_the_program_its_own_backend():
    code = "import sys, ueo_fast.finetune.plots\nprint('matplotlib.pyplot' in sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.strip() == "False"
