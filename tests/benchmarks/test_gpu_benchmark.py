"""The GPU's benchmark and its script, as far as they run without a GPU."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import (
    bench_affine_gpu,
    bench_ueo_loss_gpu,
    gpu_cases,
    gpu_counters,
    gpu_tables,
    render,
    results_file,
    sanitize_set,
)
from benchmarks.cases import Case

ROOT = Path(__file__).resolve().parents[2]

SCRIPT = ROOT / "benchmarks" / "gpu.sh"
GPU = {"gpu": "Test GPU", "copied bytes": "1000000000", "command": "a test"}


LOSS_TABLES = ("replayed", "launched", "memory", "launches", "provenance")


def test_a_dry_run_goes_from_measuring_to_the_docs(tmp_path, monkeypatch, capsys):
    assert bench_ueo_loss_gpu.main(["--dry-run", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "64 x 37 float32" in printed
    names = {"cpp", "loss_and_grad", "eager", "compile"}
    assert all(name in printed for name in names)
    for name in gpu_tables.LOSS_CSVS:
        header, rows = results_file.read(name, tmp_path)
        assert header["gpu"] == "none: a dry run"
        assert str(tmp_path) not in header["command"]
        assert {row["contender"] for row in rows} - {"copy"} == names
        if name != gpu_tables.TIME:  # counted once, though ours is in both rounds
            assert len(rows) == len(names) * len(gpu_cases.DRY_CASES)
    monkeypatch.setattr(results_file, "FOLDER", tmp_path)
    for marker in LOSS_TABLES:
        page = f"before\n<!-- table: gpu {marker} -->\n<!-- end -->\nafter"
        drawn = render.rendered(page)
        assert "Not measured" not in drawn
        assert "64 x 37" in drawn or marker == "provenance"
        assert render.rendered(drawn) == drawn


def test_without_a_csv_the_tables_say_so(tmp_path, monkeypatch):
    monkeypatch.setattr(results_file, "FOLDER", tmp_path)
    for marker, table in gpu_tables.TABLES.items():
        if marker == "gpu predictions":
            assert all(line.count("not yet") == 4 for line in table()[2:])
        else:  # bytes are known without measuring
            assert ("Not measured yet" in table()[0]) == (marker != "gpu floors")


def write_times(folder, rows):
    names = ("rows", "columns", "dtype", "contender", "mode", "median_us", "inputs", "note")
    table = [dict(zip(names, row, strict=True)) for row in rows]
    results_file.write(gpu_tables.TIME, GPU, table, folder)


def test_ratios_and_floors_are_those_of_the_times(tmp_path):
    small, large = (1024, 1000, "float32"), (16384, 1000, "float32")
    write_times(
        tmp_path,
        [
            (*small, "cuda", "launched", 50, 1, ""),
            (*small, "cuda", "replayed", 5, 1, ""),
            (*small, "eager", "launched", 100, 1, ""),
            (*small, "eager", "replayed", 30, 1, ""),
            (*small, "compile", "launched", 60, 1, "no graph: planted"),
            (*small, "copy", "launched", 1000, 1, ""),
            (*large, "cuda", "replayed", 100, 4, ""),
            (*large, "loss_and_grad", "replayed", 150, 4, ""),
            (*large, "eager", "replayed", 2500, 4, ""),
            (*large, "compile", "replayed", 140, 4, ""),
            (*large, "liger", "", "", 0, "liger_kernel is not installed"),
            (*large, "copy", "launched", 1000, 1, ""),
        ],
    )
    replayed = gpu_tables.TABLES["gpu replayed"](tmp_path)
    (line,) = (line for line in replayed if line.startswith("| 1024"))
    assert "| 5.0 µs |" in line
    assert "6.0 (target 8, missed)" in line
    assert line.endswith("| - | - | - | - |")  # not replayed: no ratio; in the cache: no floor
    (line,) = (line for line in replayed if line.startswith("| 16384"))
    # A copy of 1 GB in 1 ms moves 2 TB/s; 65.5 MB of logits, three times: 98.3 us.
    assert "**25.0** (target 8)" in line
    assert "1.4 (target 1.5, missed)" in line
    assert "| 98.3 µs | **98%** (target 85%) | 66% (target 85%, missed) |" in line
    assert any("Liger: liger_kernel is not installed (16384 x 1000" in line for line in replayed)
    launched = gpu_tables.TABLES["gpu launched"](tmp_path)
    assert "2.0 (target 8, missed)" in next(line for line in launched if line[:6] == "| 1024")
    assert gpu_tables.bandwidth(tmp_path) == pytest.approx(2000)
    assert "copy: 2000 GB/s" in gpu_tables.short_report(tmp_path)


def test_each_prediction_is_next_to_the_measurement_of_the_same_kernels(tmp_path, monkeypatch):
    key = ("16384", "1000", "float32")

    def line_of(kernels):
        table = gpu_tables.TABLES["gpu predictions"]()
        (line,) = (row for row in table if row.startswith(f"| {kernels} | 16384 x 1000 | float32"))
        return line

    def write(folder, time, instructions):
        folder.mkdir(exist_ok=True)
        write_times(folder, [(*key, "cuda", "replayed", time, 4, ""),
                             (*key, "copy", "launched", 1000, 1, "")])  # fmt: skip
        blank = dict.fromkeys(gpu_tables.COUNTERS, "")
        rows = [
            {**blank, "case": "16384x1000-float32", "kernel": name, "instructions_per_row": count}
            for name, count in instructions.items()
        ]
        results_file.write(gpu_tables.KERNELS, GPU, rows, folder)

    monkeypatch.setattr(results_file, "FOLDER", tmp_path)
    first = {"ueo_statistics": 1900, "ueo_marginal": 20, "ueo_gradient": 1600}
    write(tmp_path / gpu_tables.BEFORE, 200, first)
    # Predicted: 196.6 MB at 3 TB/s, 65.5 us, are 66%. Measured at 2 TB/s, as above: 98.3 of 200 us.
    assert line_of("before").endswith("| 1876 | 1920 | 1554 | 1600 | 99 µs | 200 µs | 66% | 49% |")
    assert line_of("registers").count("not yet") == 4
    write(tmp_path, 120, {"ueo_statistics": 600, "ueo_gradient": 870})
    assert line_of("registers").endswith("| 613 | 600 | 868 | 870 | 78 µs | 120 µs | 84% | 82% |")
    assert line_of("before").endswith("| 66% | 49% |")
    assert "600 / 1876 / 613" in "\n".join(gpu_tables.short_report(tmp_path))


def test_only_what_is_missing_from_a_table_is_noted_below_it(tmp_path):
    names = (
        "rows",
        "columns",
        "dtype",
        "contender",
        "mode",
        "median_us",
        "inputs",
        "round",
        "note",
    )
    spent = "the time was spent"
    rows = [
        ("64", "345", "float32", "cuda", "replayed", 10, 1, 1, ""),
        ("64", "345", "float32", "copy", "launched", 1000, 1, 1, ""),
        ("64", "345", "float32", "cuda", "", "", 0, 2, spent),
        ("64", "345", "float32", "compile", "", "", 0, 2, spent),
    ]
    table = [dict(zip(names, row, strict=True)) for row in rows]
    results_file.write(gpu_tables.TIME, GPU, table, tmp_path)
    notes = [line for line in gpu_tables.TABLES["gpu replayed"](tmp_path) if "Left out" in line]
    assert notes == [f"Left out: (c) compile: {spent}."]


SETTINGS = bench_ueo_loss_gpu.Settings(torch.device("cpu"), 1, 1e3, 1 << 20, 1 << 10)


def test_a_contender_that_fails_or_is_wrong_is_left_out_with_the_reason():
    def fails():
        raise RuntimeError("no such\nkernel")

    def wrong():
        return gpu_cases.through_autograd(lambda z: 2 * z.logsumexp(1).mean())

    def slow():
        raise AssertionError("must not be built")

    rows = bench_ueo_loss_gpu.Rows()
    contenders = (
        gpu_cases.Contender("cuda", "", fails, 1),
        gpu_cases.Contender("triton", "", wrong, 1),
        gpu_cases.Contender("liger", "", slow, 1, lambda: "not installed"),
        gpu_cases.Contender("compile", "", slow, 1 << 40),
        gpu_cases.EAGER,
    )
    bench_ueo_loss_gpu.Bench(SETTINGS).measure(Case(8, 10), contenders, rows)
    notes = {row["contender"]: str(row["note"]) for row in rows.time}
    assert notes["cuda"] == "failed: RuntimeError: no such kernel"
    assert notes["triton"].startswith("wrong: loss ")
    assert notes["liger"] == "not installed"
    assert "GiB besides the logits" in notes["compile"]
    assert notes["eager"] == ""
    assert {row["contender"] for row in rows.launches} == set(notes) - {"copy"}


def test_a_wrong_gradient_is_seen():
    grad = torch.randn(20, 3)
    other = grad.clone()
    other[-1, 0] += 1
    loss = torch.tensor(1.0)
    assert bench_ueo_loss_gpu.disagreement((loss, grad), (loss, grad), Case(20, 3)) == ""
    assert "gradient off" in bench_ueo_loss_gpu.disagreement(
        (loss, other), (loss, grad), Case(20, 3)
    )
    nan = torch.tensor(torch.nan)
    assert "loss nan" in bench_ueo_loss_gpu.disagreement((nan, grad), (loss, grad), Case(20, 3))


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


def test_a_sample_that_fails_is_named_and_keeps_none_from_running(monkeypatch, capsys):
    def check(sample, backend, device):
        if sample.rows == 33:
            raise AssertionError("planted")

    monkeypatch.setattr(sanitize_set, "_check", check)
    monkeypatch.setattr(sanitize_set, "AFFINE", ())
    monkeypatch.setattr(sanitize_set, "NORMS", ())
    assert sanitize_set.run("cpp") == 1
    printed = capsys.readouterr().out.splitlines()
    assert "failed: rows at every alignment, float16: AssertionError: planted" in printed
    assert len(printed) == len(sanitize_set.SAMPLES)
    parts = [sanitize_set.run("cpp", part, 3) for part in range(3)]
    assert sum(parts) == 1
    assert sorted(capsys.readouterr().out.splitlines()) == sorted(printed)


# What Nsight Compute writes: lines of its own, a table, a line of units. Two cases of gpu_counters.
PROFILE = """==PROF== Connected to process 1 (/usr/bin/python3.12)
==PROF== Disconnected from process 1
"ID","Host Name","Kernel Name","Block Size","Grid Size","dram__bytes_read.sum",\
"gpu__time_duration.sum","launch__registers_per_thread","smsp__inst_executed.sum"
"","","","","","byte","ns","register/thread","inst"
"0","127.0.0.1","spin_kernel(long)","(1, 1, 1)","(1, 1, 1)","0","2,000","16","30"
"1","127.0.0.1","void ueo_statistics<float, 0>(StatisticsArguments<T1>)","(256, 1, 1)",\
"(396, 1, 1)","65,579,264","51,616","64","33,757,986"
"2","127.0.0.1","spin_kernel(long)","(1, 1, 1)","(1, 1, 1)","0","2,000","16","30"
"3","127.0.0.1","void ueo_gradient<__nv_bfloat16, 0>(GradientArguments<T1>)","(256, 1, 1)",\
"(528, 1, 1)","n/a","32,608","60","22580500"
""".replace("\\\n", "")


def test_the_profilers_table_becomes_ours():
    first, second = gpu_counters.read_profile(PROFILE.splitlines())
    assert first["case"] == str(gpu_counters.LOSS[0]) == "16384x1000-float32"
    assert second["case"] == str(gpu_counters.LOSS[1]) == "16384x1000-bfloat16"
    assert (first["kernel"], second["kernel"]) == ("ueo_statistics", "ueo_gradient")
    assert first["blocks"] == "(396, 1, 1)"
    assert first["time_us"] == "51.616"
    assert first["instructions_per_row"] == "2060.4"
    assert first["dram_read_bytes"] == "6.55793e+07"
    assert second["dram_read_bytes"] == second["issue_active_percent"] == ""
    assert "127.0.0.1" not in {*first.values(), *second.values()}
    assert gpu_counters.read_profile(["==ERROR== no permission"]) == []


def test_the_counters_come_from_the_profiler_or_say_why_not(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu_counters.main(["--out", str(tmp_path)]) == gpu_counters.NOT_THERE
    assert capsys.readouterr().out == "ncu is not on PATH\n"
    (tmp_path / "profile.txt").write_text(PROFILE)
    ncu = tmp_path / "ncu"
    ncu.write_text(
        "#!/bin/bash\n"
        "while (($#)); do [[ $1 == --log-file ]] && log=$2; shift; done\n"
        f'while read -r line; do echo "$line"; done <{tmp_path}/profile.txt >"$log"\n'
    )
    ncu.chmod(0o755)
    assert gpu_counters.main(["--out", str(tmp_path)]) == 0
    header, rows = results_file.read(gpu_tables.KERNELS, tmp_path)
    assert {"gpu", "torch", "command"} <= set(header)
    assert [row["registers"] for row in rows] == ["64", "60"]
    table = "\n".join(gpu_tables.TABLES["gpu counters"](tmp_path))
    assert "| 16384x1000-float32 | ueo_statistics | 51.6 | 2060 | - | - | 65.6 MB |" in table
    ncu.write_text("#!/bin/bash\necho no permission; exit 9\n")
    (tmp_path / "ncu.txt").unlink()
    assert gpu_counters.main(["--out", str(tmp_path)]) == 9


def run_script(tmp_path, *args, cases="", seconds="100"):
    """The script with programs that obey ``cases``, by what python is asked to run."""
    if shutil.which("timeout") is None:
        pytest.skip("needs timeout, of GNU coreutils")
    programs = tmp_path / "programs"
    programs.mkdir(exist_ok=True)
    python = programs / "python"
    python.write_text(
        "#!/usr/bin/env bash\n"
        f'case "$*" in *sys.executable*) echo {python};; *ueo_fast.info*) echo backend cuda ready;;'
        f" {cases} esac\n"
    )
    for name in ("nvidia-smi", "compute-sanitizer"):
        (programs / name).write_text("#!/bin/sh\necho a GPU\n")
    for program in programs.iterdir():
        program.chmod(0o755)
    tree = tmp_path / "tree"  # the script's own results folder is in the tree
    (tree / "benchmarks").mkdir(parents=True, exist_ok=True)
    (tree / "ueo_fast").mkdir(exist_ok=True)
    (tree / "ueo_fast" / "_cuda.so").write_text("_ZN8ueo_fast4cuda")
    shutil.copy(SCRIPT, tree / "benchmarks")
    return subprocess.run(
        ["bash", str(tree / "benchmarks" / "gpu.sh"), "--out", str(tmp_path / "out"), *args],
        env=dict(os.environ, PYTHON=str(python), TOTAL_SECONDS=seconds,
                 PATH=f"{programs}:{os.environ['PATH']}"),
        capture_output=True,
        text=True,
        timeout=60,
    )  # fmt: skip


def states(summary):
    """Step to what became of it."""
    lines = (line.split(" s  ") for line in summary.splitlines() if " s  " in line)
    return {words.split()[0]: state for words, state in lines}


def test_the_script_runs_every_step_and_packs_what_they_left(tmp_path):
    cases = (
        '*bench_ueo_loss_gpu*) echo a,b >"${@: -1}/ueo_loss_gpu_time.csv"; echo "$*";;'
        '*pytest*) echo "$*"; echo 3 passed;; *gpu_tables*) echo the report;;'
    )
    done = run_script(tmp_path, cases=cases, seconds="590")
    assert done.returncode == 0, done.stdout + done.stderr
    summary = (tmp_path / "out" / "gpu_summary.txt").read_text()
    assert summary in done.stdout
    assert list(states(summary)) == [
        "build", "smoke", "cuda_tests", "memcheck", "racecheck", "loss", "affine", "counters",
        "triton_tests", "initcheck", "stalls",
    ]  # fmt: skip
    assert set(states(summary).values()) == {"passed"}
    assert "triton_tests: 3 passed" in summary
    assert "the report" in summary
    with tarfile.open(tmp_path / "out" / "gpu_results.tar.gz") as packed:
        names = set(packed.getnames())
        tests = packed.extractfile("./triton_tests.log").read().decode()
    assert {"./ueo_loss_gpu_time.csv", "./memcheck.log", "./report.txt"} <= names
    assert "--only-backend triton" in tests
    assert sorted(os.listdir(tmp_path / "out")) == ["gpu_results.tar.gz", "gpu_summary.txt"]


def test_the_script_goes_on_after_steps_that_fail_or_take_too_long(tmp_path):
    cases = (
        '*sanitize_set\\ cuda*) echo "failed: float64: AssertionError: planted"; exit 3;;'
        "*bench_ueo_loss_gpu*) sleep 60;; *gpu_counters*) echo ncu is not on PATH; exit 77;;"
    )
    done = run_script(tmp_path, "smoke", "counters", "loss", cases=cases, seconds="20")
    assert done.returncode == 1
    summary = (tmp_path / "out" / "gpu_summary.txt").read_text()
    assert states(summary) == {
        "smoke": "failed (1)",
        "counters": "skipped: ncu is not on PATH",
        "loss": "timed out",
    }
    assert "-- smoke\n" in summary
    assert "1 failed: float64: AssertionError: planted" in summary
    assert run_script(tmp_path, "nonsense").returncode == 2


def test_the_script_builds_unless_the_libraries_are_prebuilt(tmp_path):
    cases = '*setup.py*) echo "a build"; touch built;;'
    tree = tmp_path / "tree"
    (tree / "build" / "cmake").mkdir(parents=True)  # an older build: brought up to date
    assert run_script(tmp_path, "build", cases=cases).returncode == 0
    assert (tree / "built").exists()
    (tree / "built").unlink()
    shutil.rmtree(tree / "build")
    assert run_script(tmp_path, "build", cases=cases).returncode == 0
    assert not (tree / "built").exists()


def test_tests_of_one_backend_that_find_no_time_have_not_passed():
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "-p", "no:xdist"]
    command += ["tests/affine/test_layer_norm.py", "--only-backend", "reference", "--until"]
    environment = {name: value for name, value in os.environ.items() if "XDIST" not in name}
    done = subprocess.run(
        [*command, "1"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    results = [line for line in done.stdout.splitlines() if line.startswith("tests/")]
    assert len(results) > 5
    assert all("reference" in line and "SKIPPED" in line for line in results)
    assert done.returncode == pytest.ExitCode.INTERRUPTED


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_benchmarks_say_so(tmp_path, capsys):
    assert bench_ueo_loss_gpu.main([]) == 2
    assert bench_affine_gpu.main([]) == 2
    assert "no GPU is present" in capsys.readouterr().err
    if shutil.which("nvidia-smi") is None:
        done = subprocess.run(["bash", str(SCRIPT)], capture_output=True, text=True)
        assert done.returncode == 2
        assert "there is no GPU here" in done.stderr
