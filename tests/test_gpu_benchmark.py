"""The GPU's benchmark and its script, as far as they run without a GPU."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import (  # noqa: E402
    bench_ueo_loss_gpu,
    gpu_affine_report,
    gpu_cases,
    gpu_counters,
    gpu_measure,
    gpu_report,
    gpu_requirements,
    render,
    results_file,
    sanitize_set,
)
from benchmarks.cases import Case  # noqa: E402

SCRIPT = ROOT / "benchmarks" / "gpu.sh"
GPU = {"gpu": "Test GPU", "copied bytes": "1000000000", "command": "a test"}


def test_a_dry_run_goes_from_measuring_to_the_docs(tmp_path, monkeypatch, capsys):
    assert bench_ueo_loss_gpu.main(["--dry-run", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "64 x 37 float32" in printed
    assert all(name in printed for name in ("cpp", "loss_and_grad", "eager"))
    for name in gpu_report.CSVS:
        header, rows = results_file.read(name, tmp_path)
        assert header["gpu"] == "none: a dry run"
        assert str(tmp_path) not in header["command"]
        assert {row["contender"] for row in rows} - {"copy"} == {"cpp", "loss_and_grad", "eager"}
    monkeypatch.setattr(results_file, "FOLDER", tmp_path)
    for marker in gpu_report.TABLES:
        page = f"before\n<!-- table: {marker} -->\n<!-- end -->\nafter"
        drawn = render.rendered(page)
        assert "Not measured" not in drawn
        assert "64 x 37" in drawn or marker in ("gpu floors", "gpu provenance")
        assert render.rendered(drawn) == drawn


def test_without_a_csv_the_tables_say_so(tmp_path, monkeypatch):
    monkeypatch.setattr(results_file, "FOLDER", tmp_path)
    for marker, table in {**gpu_report.TABLES, **gpu_affine_report.TABLES}.items():
        expected = marker != "gpu floors"  # bytes are known without measuring
        assert ("Not measured yet" in table()[0]) == expected


def write_times(folder, rows):
    names = ("rows", "columns", "dtype", "contender", "mode", "median_us", "inputs", "note")
    table = [dict(zip(names, row, strict=True)) for row in rows]
    results_file.write(gpu_report.TIME, GPU, table, folder)


def test_ratios_and_floors_are_those_of_the_times(tmp_path):
    small, large = (1024, 1000, "float32"), (16384, 1000, "float32")
    write_times(
        tmp_path,
        [
            (*small, "cuda", "launched", 50, 1, ""),
            (*small, "cuda", "replayed", 5, 1, ""),
            (*small, "eager", "launched", 100, 1, ""),
            (*small, "eager", "replayed", 30, 1, ""),
            (*small, "copy", "launched", 1000, 1, ""),
            (*large, "cuda", "replayed", 100, 4, ""),
            (*large, "loss_and_grad", "replayed", 80, 4, ""),
            (*large, "eager", "launched", 2500, 4, ""),  # too long for a graph
            (*large, "compile", "replayed", 140, 4, ""),
            (*large, "liger", "", "", 0, "liger_kernel is not installed"),
            (*large, "copy", "launched", 1000, 1, ""),
        ],
    )
    replayed = gpu_report.time_table("replayed", tmp_path)
    (line,) = (line for line in replayed if line.startswith("| 1024"))
    assert "| 5.0 µs |" in line
    assert "6.0 (target 8, missed)" in line
    assert line.endswith("| - | - | - | - |")  # in the cache: no floor
    (line,) = (line for line in replayed if line.startswith("| 16384"))
    # A copy of 1 GB in 1 ms moves 2 TB/s; 65.5 MB of logits, three times: 98.3 us.
    assert "**25.0** (target 8)" in line
    assert "1.4 (target 1.5, missed)" in line
    assert "| 98.3 µs | **98%** (target 85%) | 65.5 µs | 82% (target 85%, missed) |" in line
    assert any("Liger: liger_kernel is not installed (16384 x 1000" in line for line in replayed)
    launched = gpu_report.time_table("launched", tmp_path)
    assert "2.0 (target 8, missed)" in next(line for line in launched if line[:6] == "| 1024")
    assert gpu_report.bandwidth(tmp_path) == pytest.approx(2000)
    assert gpu_report.short_table(tmp_path)[-1] == "copy: 2000 GB/s"


def settings(*contenders):
    return gpu_measure.Settings(torch.device("cpu"), contenders, 1, 1e3, 1 << 20, 1 << 10, 0)


def test_a_contender_that_fails_or_is_wrong_is_left_out_with_the_reason():
    def fails():
        raise RuntimeError("no such\nkernel")

    def wrong():
        return gpu_cases.through_autograd(lambda z: 2 * z.logsumexp(1).mean())

    def slow():
        raise AssertionError("must not be built")

    rows = gpu_measure.Rows()
    bench = gpu_measure.Bench(
        settings(
            gpu_cases.Contender("cuda", "", fails, 1),
            gpu_cases.Contender("triton", "", wrong, 1),
            gpu_cases.Contender("liger", "", slow, 1, lambda: "not installed"),
            gpu_cases.Contender("compile", "", slow, 1 << 40),
            gpu_cases.EAGER,
        )
    )
    bench.measure(Case(8, 10), rows)
    notes = {row["contender"]: str(row["note"]) for row in rows.time}
    assert notes["cuda"] == "failed: RuntimeError: no such kernel"
    assert notes["triton"].startswith("wrong: loss ")
    assert notes["liger"] == "not installed"
    assert "GiB beside the logits" in notes["compile"]
    assert notes["eager"] == ""
    assert {row["contender"] for row in rows.launches} == set(notes) - {"copy"}


def test_a_wrong_gradient_is_seen():
    grad = torch.randn(20, 3)
    other = grad.clone()
    other[-1, 0] += 1
    loss = torch.tensor(1.0)
    assert gpu_measure.disagreement((loss, grad), (loss, grad), Case(20, 3)) == ""
    assert "gradient off" in gpu_measure.disagreement((loss, other), (loss, grad), Case(20, 3))
    nan = torch.tensor(torch.nan)
    assert "loss nan" in gpu_measure.disagreement((nan, grad), (loss, grad), Case(20, 3))


def test_large_logits_take_turns_and_small_ones_stay_in_the_cache():
    cache = 50 << 20
    assert gpu_cases.inputs_wanted(Case(64, 345), cache) == 1
    assert gpu_cases.inputs_wanted(Case(16384, 1000), cache) == 4
    assert gpu_cases.inputs_wanted(gpu_cases.LARGEST, cache) == 2
    first, second = gpu_cases.make_inputs(Case(8, 10, "bfloat16"), 2, torch.device("cpu"))
    assert first.dtype == torch.bfloat16
    assert first.requires_grad
    assert not torch.equal(first, second)


def test_only_what_runs_on_the_device_counts_as_a_launch():
    device, host = torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType.CPU
    events = [
        SimpleNamespace(name="void ueo_fast::cuda::rows<float, 4>(Args)", device_type=device),
        SimpleNamespace(name="void ueo_fast::cuda::rows<float, 4>(Args)", device_type=device),
        SimpleNamespace(name="Memset (Device)", device_type=device, is_user_annotation=False),
        SimpleNamespace(name="a range", device_type=device, is_user_annotation=True),
        SimpleNamespace(name="cudaLaunchKernel", device_type=host),
    ]
    found = gpu_counters.count_launches(events)
    assert found.total() == 3
    names = [gpu_counters.short_name(name) for name in found]
    assert names == ["rows", "Memset"]
    assert gpu_counters.short_name("void (anonymous namespace)::fill<int>(int)") == "fill"


def test_the_sanitizers_set_is_right_on_the_cpu():
    assert sanitize_set.main(["cpp"]) == 0


def test_missing_things_are_named_together(monkeypatch):
    monkeypatch.setattr(gpu_requirements, "_program_missing", lambda name: name != "ninja")
    monkeypatch.setitem(gpu_requirements.PACKAGES, "test", ("torch", "no_such_package"))
    found = gpu_requirements.missing(["build", "test"])
    assert found == ["c++", "cmake", "nvcc", "Python package no_such_package"]


def run_script(tmp_path, *args, cases="exit 0;", seconds="60"):
    """The script with a python that obeys ``cases``, by what it is asked to run."""
    if shutil.which("timeout") is None:
        pytest.skip("needs timeout, of GNU coreutils")
    python = tmp_path / "python"
    python.write_text(
        "#!/usr/bin/env bash\n"
        f'case "$*" in *gpu_requirements*) echo 90-real;; *sys.executable*) echo /nowhere;; {cases}'
        " esac\n"
    )
    python.chmod(0o755)
    return subprocess.run(
        ["bash", str(SCRIPT), "--out", str(tmp_path / "out"), *args],
        env=dict(os.environ, PYTHON=str(python), TOTAL_SECONDS=seconds),
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_the_script_goes_on_after_a_failed_stage_and_sums_up(tmp_path):
    cases = (
        '*setup.py*) echo "arch $UEO_FAST_CUDA_ARCHITECTURES, CUDA $CUDA"; exit 3;;'
        '*-m\\ pytest*) sleep 30;; *bench_ueo_loss_gpu*) echo "args $*";;'
    )
    done = run_script(tmp_path, "--quick", "build", "test", "bench", cases=cases, seconds="6")
    assert done.returncode == 1
    assert "arch 90-real, CUDA 1" in done.stdout
    assert "--quick" in next(line for line in done.stdout.splitlines() if "args " in line)
    summary = done.stdout.strip().splitlines()[-3:]
    assert [line.split()[0] for line in summary] == ["build", "test", "bench"]
    assert [line.split(" s  ")[1] for line in summary] == ["failed (3)", "timed out", "passed"]


def test_the_script_passes_only_if_every_stage_did(tmp_path):
    assert run_script(tmp_path, "build", "bench", cases="*) exit 0;;").returncode == 0
    if shutil.which("compute-sanitizer") is None:
        done = run_script(tmp_path, "sanitize", cases="*) exit 0;;")
        assert done.returncode == 1
        assert done.stdout.strip().endswith("skipped: compute-sanitizer is not on PATH")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_script_says_what_is_missing():
    environment = dict(os.environ, PYTHON=sys.executable)
    done = subprocess.run(["bash", str(SCRIPT), "bench"], env=environment, capture_output=True)
    assert done.returncode == 2
    assert b"missing here: a GPU" in done.stderr or b"a torch with CUDA" in done.stderr
    assert bench_ueo_loss_gpu.main([]) == 2
