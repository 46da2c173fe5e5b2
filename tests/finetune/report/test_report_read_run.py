"""Reading a run folder for its report: tolerant of what is absent, strict about what is broken."""

from __future__ import annotations

import csv
import json
import os
import re
import warnings

import numpy as np
import pytest
from report_page import parse_file, section
from report_run import ReportRun, make_run

from ueo_fast.finetune.data.names import printable
from ueo_fast.finetune.files.run_folder import RunFolder
from ueo_fast.finetune.report import read_run, write_report, write_thumbnails
from ueo_fast.finetune.report.run_data import KEPT, KNOWN, UNKNOWN

pytestmark = pytest.mark.usefixtures("without_charts")


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path)


def test_everything_is_read(run):
    data = read_run(run)
    assert data.config["method"] == "ueo"
    assert data.environment["threads"] == 2
    assert data.problem.unknown == ("kettle", "umbrella")
    assert data.problem.skipped[0].reason == "the file is empty"
    assert data.problem.left_out == {"train": {".txt": 3, "hidden": 1}}
    assert [step.step for step in data.steps] == list(range(1, 41))
    assert data.steps[0].learning_rates.keys() == {"prompt", "affine"}
    assert [epoch.epoch for epoch in data.epochs] == [1, 2, 3, 4]
    assert [line.stage for line in data.metrics] == ["before", "during", "after"]
    assert data.finished
    assert data.outcome.seconds == 12.5
    assert data.outcome.stopped is None


def test_predictions_are_counted_and_ranked(run):
    data = read_run(run)
    with open(run / "predictions.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    found = data.predictions
    assert len(found) == len(rows) == 60
    np.testing.assert_array_equal(found.adapted_mcm, [float(row["adapted_mcm"]) for row in rows])
    known = [KNOWN if row["label"] in data.problem.known else UNKNOWN for row in rows]
    assert found.group.tolist() == known
    changed = sum(row["zeroshot_class"] != row["adapted_class"] for row in rows)
    assert found.changed == changed > 0
    ranked = sorted(rows, key=lambda row: -float(row["adapted_mcm"]))
    assert [p.image for p in found.most_confident] == [row["image"] for row in ranked[:KEPT]]
    assert [p.image for p in found.lowest] == [row["image"] for row in reversed(ranked)]
    unknown = [row["image"] for row in rows if row["known"] == "false"]
    assert (found.known, found.unknown) == (60 - len(unknown), len(unknown))
    assert [p.image for p in found.likely_unknown] == [
        row["image"] for row in ranked[: -KEPT - 1 : -1] if row["image"] in unknown
    ]


def test_of_equal_scores_the_first_images_are_kept(run):
    lines = (run / "predictions.csv").read_text(encoding="utf-8").splitlines()
    rows = [f"{i}.png,{i}.png,,a,0.5,a,0.5,1.0,false" for i in range(100)]
    (run / "predictions.csv").write_text("\n".join([lines[0], *rows]))
    found = read_run(run).predictions
    first = [f"{i}.png" for i in range(KEPT)]
    assert [one.image for one in found.most_confident] == first
    assert [one.image for one in found.lowest[:KEPT]] == first
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write_report(run)


def test_few_images_are_at_both_ends(run):
    text = (run / "predictions.csv").read_text(encoding="utf-8").splitlines()
    (run / "predictions.csv").write_text("\n".join(text[:4]) + "\n", encoding="utf-8")
    found = read_run(run).predictions
    assert {p.image for p in found.most_confident} == {p.image for p in found.lowest}
    assert len(found.most_confident) == 3
    write_report(run)


def test_of_few_images_each_is_likely_known_or_likely_unknown(run):
    head = (run / "predictions.csv").read_text(encoding="utf-8").splitlines()[0]
    rows = [f"{i}.png,{i}.png,,a,0.5,a,0.{9 - i},1.0,{str(i < 2).lower()}" for i in range(5)]
    (run / "predictions.csv").write_text("\n".join([head, *rows]), encoding="utf-8")
    found = read_run(run).predictions
    assert [one.image for one in found.likely_known] == ["0.png", "1.png"]
    assert [one.image for one in found.likely_unknown] == ["4.png", "3.png", "2.png"]
    page = parse_file(write_report(run))
    for name, images in (("images", found.likely_known), ("unknown", found.likely_unknown)):
        items = section(page, name).one("ul", **{"class": "gallery"}).find("li")
        assert [li.one("div", **{"class": "file"}).text for li in items] == [
            one.image for one in images
        ]


def test_no_images_at_all(run):
    head = (run / "predictions.csv").read_text(encoding="utf-8").splitlines()[0]
    (run / "predictions.csv").write_text(head + "\n")
    assert len(read_run(run).predictions) == 0
    assert "No predictions yet." in write_report(run).read_text()


def test_steps_that_a_resumed_run_took_again_are_there_once(run):
    lines = (run / "train.jsonl").read_text().splitlines()
    again = [json.dumps({**json.loads(line), "loss": 7.0}) for line in lines[29:35]]
    (run / "train.jsonl").write_text("\n".join([*lines[:35], *again]) + "\n")
    steps = read_run(run).steps
    assert [step.step for step in steps] == list(range(1, 36))
    assert [step.loss for step in steps[28:31]] == [json.loads(lines[28])["loss"], 7.0, 7.0]


def test_a_torn_last_line_is_left_out(run):
    with open(run / "train.jsonl", "a") as file:
        file.write('{"step": 41, "lo')
    assert read_run(run).steps[-1].step == 40


@pytest.mark.parametrize(
    "name", ["environment.json", "problem.json", "train.jsonl", "epochs.jsonl", "metrics.jsonl"]
)
def test_any_file_but_the_config_may_be_absent(run, name):
    (run / name).unlink()
    assert read_run(run).config
    write_report(run)


def spoil(path, line, change):
    lines = path.read_text(encoding="utf-8").splitlines()
    lines[line - 1] = change(lines[line - 1])
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def without(key):
    return lambda line: json.dumps({k: v for k, v in json.loads(line).items() if k != key})


def with_(**values):
    return lambda line: json.dumps({**json.loads(line), **values})


BROKEN = [
    ("train.jsonl", 7, lambda line: line[:20], r"train.jsonl, line 7: "),
    ("train.jsonl", 7, without("loss"), r"train.jsonl, line 7: 'loss' is missing; the file was"),
    ("train.jsonl", 7, with_(loss="low"), r"train.jsonl, line 7: loss is 'low', of the wrong type"),
    ("train.jsonl", 7, with_(loss=float("nan")), r"train.jsonl, line 7: NaN is not a JSON number"),
    ("train.jsonl", 7, with_(learning_rates={"prompt": "x"}), r"line 7: learning_rates is 'x', of"),
    ("train.jsonl", 7, lambda line: "[1]", r"train.jsonl, line 7: holds a list, expected an obj"),
    (
        "epochs.jsonl",
        2,
        with_(histogram=3),
        r"epochs.jsonl, line 2: histogram is 3, of the wrong",
    ),
    ("metrics.jsonl", 3, with_(auroc=86.8), r"line 3: auroc is 86.8, expected a fraction in 0..1"),
    ("metrics.jsonl", 1, with_(stage="then"), r"line 1: stage is 'then', expected one of before,"),
    (
        *("metrics.jsonl", 1, with_(class_accuracies=[0.5])),
        r"line 1: class_accuracies has 1 numbers, but problem.json 5 known classes",
    ),
    (
        "predictions.csv",
        1,
        lambda line: "image,path",
        r"predictions.csv, line 1: no column label, ",
    ),
    ("predictions.csv", 5, lambda line: "a,b", r"predictions.csv, line 5: 2 cells, expected 9"),
    (
        *("predictions.csv", 5, lambda line: "a,b,,x,0.1,x,high,1.0,"),
        r"predictions.csv, line 5: adapted_mcm is 'high', not a number",
    ),
    (
        *("predictions.csv", 5, lambda line: "a,b,,x,nan,x,0.1,1.0,"),
        r"predictions.csv, line 5: zeroshot_mcm is 'nan', not a finite number",
    ),
    (
        *("predictions.csv", 5, lambda line: "a,b,,x,0.1,x,0.1,1.0,perhaps"),
        r"predictions.csv, line 5: known is 'perhaps', expected true, false or nothing",
    ),
    (
        "finished.json",
        4,
        lambda line: '"threshold": {"rule": 3, "value": 0.5}, "x": {',
        "threshold.rule is 3, of the wrong",
    ),
    (
        "finished.json",
        4,
        lambda line: '"threshold": {"rule": "otsu"}, "x": {',
        "'threshold.value' is missing",
    ),
    ("problem.json", 1, lambda line: "{]", r"problem.json, line 1: "),
    ("config.json", 2, lambda line: "nothing", r"config.json, line 2: "),
]


@pytest.mark.parametrize(("name", "line", "change", "message"), BROKEN)
def test_a_broken_file_is_named_with_its_line(run, name, line, change, message):
    spoil(run / name, line, change)
    with pytest.raises(ValueError, match=message) as caught:
        write_report(run)
    assert str(run / name) in str(caught.value)
    assert "restore it, or remove it to have a report without it" in str(caught.value)
    assert not (run / "report.html").exists()


def test_a_broken_problem_says_what_is_missing(run):
    (run / "problem.json").write_text('{"known": ["a"]}')
    with pytest.raises(ValueError, match=r"problem.json: 'unknown' is missing; the file was"):
        read_run(run)
    (run / "problem.json").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"problem.json: 'utf-8' codec can't decode"):
        read_run(run)


def test_a_run_of_another_kind(run):
    (run / "config.json").write_text('{"tower": "bn"}')
    with pytest.raises(
        ValueError, match=r"config.json names no method, model, seed, so this is not a run of"
    ):
        write_report(run)


def test_what_is_no_run_folder(tmp_path, run):
    with pytest.raises(FileNotFoundError, match=r"nowhere does not exist; give the folder"):
        write_report(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"not the folder of a run: it has no config.json"):
        write_report(tmp_path)
    with pytest.raises(NotADirectoryError, match=r"config.json is a file; give the folder of"):
        write_report(run / "config.json")
    missing = tmp_path / "no" / "page.html"
    with pytest.raises(FileNotFoundError, match=re.escape(str(missing))):
        write_report(run, missing)


def test_file_names_that_are_not_utf8_are_found(tmp_path):
    run = make_run(tmp_path, ReportRun(labelled=False, unknown=()))
    path = read_run(run).predictions.most_confident[5].path
    renamed = path.replace("photo", "caf\udce9")  # Latin-1, as the system hands it over
    try:
        os.rename(path, renamed)
    except OSError:
        pytest.skip("this file system has no such names")
    lists = json.loads((run / "images.json").read_text())
    paths = [renamed if one == path else one for one in lists["train"]["paths"]]
    lists["train"]["paths"] = paths
    (run / "images.json").write_text(json.dumps(lists))
    table = (run / "predictions.csv").read_text(encoding="utf-8")
    (run / "predictions.csv").write_text(table.replace(path, printable(renamed)), encoding="utf-8")
    write_thumbnails(RunFolder(run), paths, read_run(run).problem.known)
    data = read_run(run)
    name = data.predictions.most_confident[5].path
    assert name == printable(renamed)
    assert data.thumbnails[name].jpeg
    assert "/caf%E9%20" in data.links[name]
    assert f'href="{data.links[name]}"' in write_report(run).read_text(encoding="utf-8")
