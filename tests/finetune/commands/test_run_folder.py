"""Run folders, result tables and plots."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import json
import os
import subprocess
import sys
import time
from typing import Annotated, Literal

import pytest
import torch

from ueo_fast.finetune.evaluation.results_table import ResultsTable, Spread
from ueo_fast.finetune.files.records import BrokenFileError, Range, as_record
from ueo_fast.finetune.files.run_folder import RunFolder


def test_default_folders_are_numbered_within_a_second(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "strftime", lambda pattern: pattern.split("-")[0] + "-now")
    names = []
    for _ in range(3):
        with RunFolder.create(None, prefix="demo") as folder:
            folder.write_text("note.txt", "used")
            names.append(folder.path.as_posix())
    assert names == ["runs/demo-now", "runs/demo-now-2", "runs/demo-now-3"]


def create(out):
    with RunFolder.create(out, prefix="demo") as folder:
        return folder.path


def test_a_folder_with_content_is_never_used(tmp_path):
    fresh = tmp_path / "a" / "b"
    assert create(fresh) == fresh
    assert not fresh.exists()  # nothing was written
    fresh.mkdir()
    (fresh / ".config.json.partial").write_text("{")  # of a process that was killed
    assert create(fresh) == fresh
    fresh.mkdir()
    (fresh / "metrics.jsonl").write_text("mine")
    with pytest.raises(FileExistsError, match="is not empty, and nothing is overwritten: choose"):
        create(fresh)
    with pytest.raises(FileExistsError, match="is a file; --out names a folder"):
        create(fresh / "metrics.jsonl")
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


def test_a_damaged_file_is_named(tmp_path):
    folder = RunFolder(tmp_path)
    for data, message in (
        (b'{"a": 1', "config.json, line 1: Expecting ',' delimiter; the file was changed or dam"),
        (b'"\xff"', "config.json: 'utf-8' codec can't decode byte 0xff"),
        (b"[" * 10**6, "config.json: lists or objects are nested too deep"),
        (b'{"a": ' + b"9" * 5000 + b"}", "config.json: Exceeds the limit .* for integer string"),
        (b'{"a": Infinity}', "config.json: Infinity is not a JSON number"),
        (b"3", "config.json: holds a int, expected an object"),
    ):
        (tmp_path / "config.json").write_bytes(data)
        with pytest.raises(BrokenFileError, match=message):
            folder.read_json("config.json", dict)
    (tmp_path / "train.jsonl").write_text('{"a": 1}\n{"a": \n{"a": 3}\n')
    with pytest.raises(ValueError, match=r"train.jsonl, line 2: Expecting value"):
        folder.read_json_lines("train.jsonl")
    with pytest.raises(FileNotFoundError, match=r"metrics.jsonl"):
        folder.read_json_lines("metrics.jsonl")


def test_only_the_folder_of_a_run_is_opened(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"/gone does not exist"):
        RunFolder.open(tmp_path / "gone")
    with pytest.raises(FileNotFoundError, match=r"has no config.json \(found: nothing\)"):
        RunFolder.open(tmp_path)
    for number in range(7):
        (tmp_path / f"{number}.jpg").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"0.jpg, 1.jpg, 2.jpg, .* and 2 more\)"):
        RunFolder.open(tmp_path)
    with (
        pytest.raises(NotADirectoryError, match=r"0.jpg is a file; give the folder of a run"),
        RunFolder.resume(tmp_path / "0.jpg"),
    ):
        pass
    RunFolder(tmp_path).write_json("config.json", {"a": [1, None, "é"]})
    assert RunFolder.open(str(tmp_path)).read_json("config.json", dict) == {"a": [1, None, "é"]}


def test_a_resumed_run_goes_on_with_whole_lines(tmp_path):
    folder = RunFolder(tmp_path)
    folder.write_json("config.json", {})
    for step in range(1, 5):
        folder.append_json_line("train.jsonl", {"step": step})
    (tmp_path / "warnings.jsonl").write_text('{"st')  # cut off in its first line
    (tmp_path / ".config.json.partial").write_text("{")
    with open(tmp_path / "train.jsonl", "a") as file:
        file.write('{"step": 5, "lo')
    with RunFolder.resume(tmp_path) as resumed:
        assert not (tmp_path / ".config.json.partial").exists()
        assert (tmp_path / "warnings.jsonl").read_text() == ""
        resumed.drop_json_lines("train.jsonl", "step", 3)
        resumed.append_json_line("train.jsonl", {"step": 4, "again": True})
    steps = [{"step": 1}, {"step": 2}, {"step": 3}, {"step": 4, "again": True}]
    assert resumed.read_json_lines("train.jsonl") == steps


@dataclasses.dataclass
class Inner:
    name: str
    numbers: tuple[float, ...]


@dataclasses.dataclass
class Outer:
    whole: int
    flag: bool
    one: Inner | None
    kind: Literal["a", "b"]
    many: dict[str, int | None]
    share: Annotated[float, Range(0, 1, "a fraction in 0..1")] | None
    paths: tuple[str | int | None, ...]
    text: str = "absent"


SOUND = {
    "whole": 3,
    "flag": True,
    "one": {"name": "é", "numbers": [1, 2.5]},
    "kind": "b",
    "many": {"x": None, "y": 7},
    "share": 1,
    "paths": ["a", None, "b"],
    "of another version": [1],
}


def test_an_object_becomes_a_dataclass():
    found = as_record(Outer)(SOUND)
    inner, paths = Inner("é", (1.0, 2.5)), ("a", None, "b")
    assert found == Outer(3, True, inner, "b", {"x": None, "y": 7}, 1.0, paths)
    assert as_record(Outer)({**SOUND, "one": None, "text": "t"}).text == "t"
    assert as_record(Inner)({"name": "a", "numbers": []}) == Inner("a", ())
    with pytest.raises(KeyError, match="numbers"):
        as_record(Inner)({"name": "a"})


def test_records_are_written_as_they_are_read(tmp_path):
    folder, record = RunFolder(tmp_path), as_record(Outer)(SOUND)
    folder.write_json("one.json", record)
    assert folder.read_json("one.json", Outer) == record
    folder.append_json_line("some.jsonl", record)
    folder.append_json_line("some.jsonl", dataclasses.replace(record, whole=4))
    lines = folder.read_json_lines("some.jsonl", Outer)
    assert [line.whole for line in lines] == [3, 4]
    folder.write_json_lines("others.jsonl", lines)
    assert (tmp_path / "others.jsonl").read_bytes() == (tmp_path / "some.jsonl").read_bytes()
    with pytest.raises(BrokenFileError, match=r"some.jsonl, line 1: 'name' is missing"):
        folder.read_json_lines("some.jsonl", Inner)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"whole": 3.0}, "whole is 3.0, of the wrong type"),
        ({"whole": True}, "whole is True, of the wrong type"),
        ({"whole": 10**30}, "whole is 1000000000000000000000000000000, which is out of range"),
        ({"flag": 1}, "flag is 1, of the wrong type"),
        ({"one": []}, r"one is \[\], of the wrong type"),
        ({"one": {"name": "x"}}, "one.numbers"),
        ({"one": {"name": "x", "numbers": [1, "2"]}}, "one.numbers is '2', of the wrong type"),
        ({"one": {"name": "x", "numbers": 3}}, "one.numbers is 3, of the wrong type"),
        ({"one": {"name": "x", "numbers": [1e999]}}, "one.numbers is inf, not a finite number"),
        ({"one": {"name": "x", "numbers": [10**400]}}, "one.numbers is 1000.*not a finite number"),
        ({"kind": "c"}, "kind is 'c', expected one of a, b"),
        ({"kind": ["a"]}, r"kind is \['a'\], expected one of a, b"),
        ({"many": {"x": "7"}}, "many is '7', of the wrong type"),
        ({"many": [["x", 7]]}, "many is .* of the wrong type"),
        ({"share": 1.5}, "share is 1.5, expected a fraction in 0..1"),
        ({"share": "1"}, "share is '1', of the wrong type"),
        ({"paths": ["a", 1.5]}, "paths is 1.5, of the wrong type"),
        ({"paths": ["a", 10**30]}, "paths is 1000000000000000000000000000000, which is out of"),
        ({"text": None}, "text is None, of the wrong type"),
    ],
)
def test_a_value_that_does_not_fit_is_named(change, message):
    with pytest.raises((KeyError, TypeError, ValueError), match=message):
        as_record(Outer)({**SOUND, **change})


def test_one_process_writes_to_a_run(tmp_path):
    code = f"""
from ueo_fast.finetune.files.records import BrokenFileError, as_record
from ueo_fast.finetune.files.run_folder import RunFolder
try:
    with RunFolder.create({str(tmp_path / "run")!r}, prefix="x"):
        print("mine")
except BlockingIOError as error:
    print(error)
"""

    def other() -> str:
        return subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout

    with RunFolder.create(tmp_path / "run", prefix="x") as folder:
        said = other()
        assert folder.path.exists()  # though there was nothing in it
    assert "another process is writing to this run" in said
    assert str(tmp_path) in said
    assert other() == "mine\n"
    assert os.listdir(tmp_path) == []


def test_a_folder_with_something_in_it_is_never_removed(tmp_path):
    for name in ("used", "unused"):
        with (
            contextlib.suppress(RuntimeError),
            RunFolder.create(tmp_path / name, prefix="x") as folder,
        ):
            if name == "used":
                folder.write_text("note.txt", "mine")
            raise RuntimeError("the model broke")
    assert os.listdir(tmp_path) == ["used"]
    assert (tmp_path / "used" / "note.txt").read_text() == "mine"


def test_a_table_is_written_as_csv(tmp_path):
    rows = [["a, b.jpg", 'say "cat"'], ["ü\nn.png", ""]]
    path = RunFolder(tmp_path).write_csv("p.csv", ["image", "class"], iter(rows))
    with open(path, encoding="utf-8", newline="") as file:
        assert list(csv.reader(file)) == [["image", "class"], *rows]
    before = path.read_bytes()

    def fails():
        yield ["x", "y"]
        raise RuntimeError("the model broke")

    with pytest.raises(RuntimeError, match="the model broke"):
        RunFolder(tmp_path).write_csv("p.csv", ["image"], fails())
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["p.csv"]


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
