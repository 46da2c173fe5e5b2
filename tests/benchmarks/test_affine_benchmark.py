"""The benchmarks of the affine layers and of a patched tower, with tiny shapes and on the CPU."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import (
    __main__,
    affine_cases,
    bench_affine_gpu,
    gpu_tables,
    render,
    results_file,
    training_tables,
    visual_cases,
    visual_memory,
)
from benchmarks.tables import LAYER_KEYS, TOWER_KEYS
from benchmarks.visual_cases import Step, VisualCase

ROOT = Path(__file__).resolve().parents[2]

CPU = torch.device("cpu")


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    "bench", ["bench_affine.py", pytest.param("bench_visual_step.py", marks=pytest.mark.slow)]
)
def test_the_cpu_benchmarks_run_with_tiny_shapes(bench, monkeypatch):
    """As `python -m benchmarks` does it; without torch.compile, which takes long."""
    if bench == "bench_visual_step.py":
        pytest.importorskip("open_clip")
    monkeypatch.setenv("UEO_FAST_BENCH_CASES", "tiny")
    monkeypatch.setenv("PYTEST_ADDOPTS", "-k 'not compile'")
    # pytest-benchmark keeps no times in a worker of xdist, which this test may run in.
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    keys = {"bench_affine.py": LAYER_KEYS}.get(bench, TOWER_KEYS)
    rows = __main__.measure_time(bench, keys, 1, 1, {})
    ours = "ueo_fast" if bench == "bench_affine.py" else "patched"
    assert {ours, "eager"} <= {row["contender"] for row in rows}
    assert all(float(str(row["median_us"])) > 0 for row in rows)
    assert set(keys) < set(rows[0])


def test_a_kept_tensor_counts_once_under_the_names_of_all_that_keep_it():
    class Tower(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(4)
            self.conv = nn.Conv2d(4, 4, 1)

        def forward(self, x):
            return self.conv(torch.relu_(self.norm(x))).mean((1, 2, 3))

    tower = Tower().eval()
    tower.conv.requires_grad_(False)
    step = object.__new__(Step)
    step.case = VisualCase("none", 2)
    step.visual = tower
    step.images = torch.randn(2, 4, 5, 5).permute(0, 1, 3, 2)
    total, by_kind = visual_memory.saved(step)
    size = 4 * 2 * 4 * 5 * 5
    # The norm keeps the images only, which are not an activation; its result is kept by two.
    assert by_kind["Convolution + Relu"] == size
    assert total == sum(by_kind.values())
    assert total < 2 * size


def test_a_patched_tower_keeps_less_and_the_whole_tower_trained_keeps_more():
    pytest.importorskip("open_clip")
    case = visual_cases.DRY_CASES[0]
    kept = {name: visual_memory.saved(Step(name, case, CPU)) for name in visual_memory.CONTENDERS}
    assert kept["patched"][0] < kept["eager"][0] < kept["everything"][0]
    assert all(total == sum(by_kind.values()) for total, by_kind in kept.values())
    found = visual_memory.measure(case, "patched", 1)  # in a process of its own
    assert found.saved == kept["patched"][0]
    assert found.by_kind == kept["patched"][1]
    assert found.peak >= 0


def test_a_floor_moves_what_the_case_must_move():
    for case in (*affine_cases.DRY_CASES, *affine_cases.CASES[-2:]):
        assert case.moves == (7 if "add" in case.op else 5)
    case = affine_cases.DRY_CASES[0]
    (x,) = affine_cases.make_inputs(case, 1, CPU)
    affine_cases.floor(case, x)()


def write_cpu_results(folder):
    """CSVs by hand: three layers and two towers."""
    layers = [("bn+relu", "64x256x56x56", "contiguous", "float32", times) for times in
              ({"ueo_fast": 10, "eager": 26, "compile": 20, "floor": 9},)]  # fmt: skip
    slow = {"ueo_fast": 10, "eager": 10.4, "compile": 8, "floor": 5}
    layers.append(("affine", "64x197x768", "contiguous", "bfloat16", slow))
    rows = [
        {**dict(zip(LAYER_KEYS, key, strict=True)), "contender": name,
         "median_us": us}
        for *key, times in layers
        for name, us in times.items()
    ]  # fmt: skip
    for name in (training_tables.LAYERS_TUNED, training_tables.LAYERS_DEFAULT):
        results_file.write(name, {"command": "a test"}, rows, folder)
    towers = {
        ("RN50", "16"): {"patched": 1000, "eager": 1500, "compile": 900},
        ("ViT-B-16", "8"): {"patched": 1000, "eager": 1010, "compile": 1100},
    }
    times, sizes = [], []
    for (model, batch), by_name in towers.items():
        key = {"model": model, "batch": batch, "layout": "contiguous", "dtype": "float32"}
        times += [{**key, "contender": n, "median_us": us} for n, us in by_name.items()]
        kept = {"patched": 40, "eager": 100, "everything": 120}
        for name, mebibytes in kept.items():
            quantities = {"saved": mebibytes, "peak": 2 * mebibytes,
                          "peak as it comes": 3 * mebibytes, "Convolution + Relu": 0.5,
                          "NativeLayerNorm": mebibytes - 0.5}  # fmt: skip
            sizes += [
                {**key, "contender": name, "quantity": what, "bytes": int(size * 2**20)}
                for what, size in quantities.items()
            ]
    results_file.write(training_tables.PATCH_STEP, {"command": "a test"}, times, folder)
    results_file.write(training_tables.PATCH_MEMORY, {"command": "a test"}, sizes, folder)


def test_the_cpus_tables_are_those_of_the_csvs(tmp_path):
    write_cpu_results(tmp_path)
    tables = training_tables.AFFINE_TABLES
    first, second = tables["affine tuned"](tmp_path)[2:]
    assert first.endswith("| **2.6** (target 2.5) | 2.0 | 90% |")
    assert second.endswith("| 1.0 | 0.8 | 50% |")
    assert "target" not in tables["affine default"](tmp_path)[2]
    steps = tables["patch speed"](tmp_path)[2:]
    assert [line.split(" | ")[-2] for line in steps] == ["1.50", "1.01"]
    memory = tables["patch memory"](tmp_path)[2:]
    assert "**0.40** (target 0.5)" in memory[0]
    assert "target" not in memory[1]
    heap = tables["patch memory heap"](tmp_path)[2:]
    assert heap[0].endswith("| 120 MiB | 300 MiB | 0.40 |")
    kinds = tables["patch kinds transformer"](tmp_path)
    assert "| layer norm | 40 MiB | 100 MiB |" in kinds
    assert "| ReLU and convolution | 0.5 MiB | 0.5 MiB |" in kinds  # above a hundredth of one
    assert kinds[-1] == "| together | 40 MiB | 100 MiB |"


@pytest.mark.parametrize(
    ("floor", "said"),
    [
        (50.0, "channels_last, float32 (plain PyTorch takes 2.00 times the floor)."),
        (40.0, "The target is beyond the floor: nowhere."),  # 2.5 times: what is asked for
    ],
)
def test_a_target_beyond_the_floor_is_said(tmp_path, floor, said):
    times = {"ueo_fast": 50.0, "eager": 100.0, "floor": floor}
    cases = {training_tables.TARGET_SHAPE: times, "1x64x56x56": {**times, "floor": 90.0}}
    rows = [
        {"op": "bn+relu", "shape": shape, "layout": "channels_last", "dtype": "float32",
         "contender": name, "median_us": us}
        for shape, by_name in cases.items()
        for name, us in by_name.items()
    ]  # fmt: skip
    results_file.write(training_tables.LAYERS_TUNED, {"command": "a test"}, rows, tmp_path)
    (line,) = training_tables.TABLES["affine beyond the floor"](tmp_path)
    assert line.endswith(said)
    assert "1 x 64" not in line


def test_where_patching_does_not_pay_is_said(tmp_path, monkeypatch):
    write_cpu_results(tmp_path)
    monkeypatch.setattr(results_file, "FOLDER", tmp_path)
    eager, _, compiled = training_tables.AFFINE_TABLES["patch no gain"]()
    assert "plain PyTorch: ViT-B-16, 8, contiguous, float32 (1.01)." in eager
    assert "torch.compile: RN50, 16, contiguous, float32 (0.90)." in compiled
    eager, _, compiled = training_tables.AFFINE_TABLES["affine no gain"]()
    assert "bfloat16 (1.04)" in eager
    assert "bfloat16 (0.80)" in compiled
    for table in training_tables.AFFINE_TABLES.values():
        assert "Not measured" not in "\n".join(table())


def test_without_a_csv_the_cpus_tables_say_so(tmp_path, monkeypatch):
    monkeypatch.setattr(results_file, "FOLDER", tmp_path)
    for table in training_tables.AFFINE_TABLES.values():
        assert "python -m benchmarks affine visual" in table()[0]


def test_an_unknown_part_is_an_error():
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "afine"], cwd=ROOT, env=dict(os.environ),
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2
    assert "unknown part afine: choose from loss, calls, affine, visual" in done.stderr


def test_a_dry_run_of_the_affine_layers_goes_from_measuring_to_the_docs(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(visual_cases, "unavailable_reason", lambda: "open_clip is not installed")
    assert bench_affine_gpu.main(["--dry-run", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^bn\+relu 2x3x4x4 contiguous float32( +[0-9.]+){2}$", printed, re.M)
    assert "Left out: patched: open_clip is not installed." in printed
    for name in gpu_tables.AFFINE_CSVS:
        header, rows = results_file.read(name, tmp_path)
        assert header["gpu"] == "none: a dry run"
        assert str(tmp_path) not in header["command"]
        assert all(row["median_us"] or row["note"] for row in rows)
    assert {row["note"] for row in rows} == {"open_clip is not installed"}
    monkeypatch.setattr(results_file, "FOLDER", tmp_path)
    for marker in (
        "gpu affine replayed",
        "gpu affine launched",
        "gpu affine provenance",
        "gpu patch",
    ):
        page = f"before\n<!-- table: {marker} -->\n<!-- end -->\nafter"
        drawn = render.rendered(page)
        assert "Not measured" not in drawn
        assert render.rendered(drawn) == drawn
        if marker in ("gpu affine replayed", "gpu affine launched"):
            assert "| with ReLU | 2 x 3 x 4 x 4 |" in drawn


def test_a_dry_run_measures_a_patched_tower(tmp_path, monkeypatch):
    pytest.importorskip("open_clip")
    monkeypatch.setattr(affine_cases, "DRY_CASES", ())
    assert bench_affine_gpu.main(["--dry-run", "--out", str(tmp_path)]) == 0
    _, rows = results_file.read(gpu_tables.TOWERS, tmp_path)
    assert {row["contender"] for row in rows} == {"patched", "eager"}
    assert all(float(row["median_us"]) > 0 and not row["note"] for row in rows)
    assert not (tmp_path / gpu_tables.LAYERS).exists()
    assert "| tiny | 2 | channels_last |" in "\n".join(gpu_tables.TABLES["gpu patch"](tmp_path))


def test_a_wrong_layer_is_seen_and_left_out(tmp_path, monkeypatch):
    def wrong(op, x, constants, backend):
        return 2 * affine_cases.eager(op, x, constants)

    monkeypatch.setattr(affine_cases, "ours", wrong)
    monkeypatch.setattr(affine_cases, "DRY_CASES", affine_cases.DRY_CASES[:1])
    monkeypatch.setattr(visual_cases, "DRY_CASES", ())
    assert bench_affine_gpu.main(["--dry-run", "--out", str(tmp_path)]) == 0
    _, rows = results_file.read(gpu_tables.LAYERS, tmp_path)
    (note,) = (row["note"] for row in rows if row["contender"] == "cpp")
    assert "wrong: output off by 1" in note


def test_ratios_of_the_affine_layers_are_those_of_the_times(tmp_path):
    layer = dict(zip(LAYER_KEYS, ("bn", "8x4", "contiguous", "float32"), strict=True))
    times = [
        ("cuda", 1, 5, 2),
        ("eager", 1, 12, 9),
        ("copy", 1, 2, ""),
        ("cuda", 2, 5, 2.5),  # beside the compiler
        ("compile", 2, 6, 4),
        ("copy", 2, 3, ""),
    ]
    rows = [
        {**layer, "contender": name, "mode": mode, "median_us": us, "inputs": 2, "round": turn,
         "note": ""}
        for name, turn, *both in times
        for mode, us in zip(("launched", "replayed"), both, strict=True)
        if us
    ]  # fmt: skip
    header = {"gpu": "Test GPU", "copied bytes": "640"}
    results_file.write(gpu_tables.LAYERS, header, rows, tmp_path)
    (line,) = gpu_tables.TABLES["gpu affine replayed"](tmp_path)[2:]
    # A copy moves 1280 bytes in 2 us; 8 x 4 float32, five times: 640 bytes.
    assert line.endswith("| 2.0 µs | 9.0 µs | 4.0 µs | 4.5 | 1.6 | 50% |")
    (line,) = gpu_tables.TABLES["gpu affine launched"](tmp_path)[2:]
    assert line.endswith("| 2.4 | 1.2 | 20% |")
