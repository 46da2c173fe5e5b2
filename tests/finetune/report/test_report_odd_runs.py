"""The HTML report of runs that are not the ordinary one: unlabelled, unfinished, huge."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys

import pytest
from report_page import SECTIONS, chart, metrics_of, parse_file, report_of, section
from report_run import ReportRun, make_run

from ueo_fast.finetune.report import write_report
from ueo_fast.finetune.report.charts import MOST_POINTS

MANY = [f"class {i:03d}" for i in range(345)]


def test_unlabelled_run_has_no_metrics_but_all_the_rest(tmp_path):
    page = report_of(tmp_path, ReportRun(labelled=False, unknown=()))
    assert "the images have no labels" in section(page, "metrics").text
    assert not section(page, "metrics").find("table")
    names = [svg.attributes["aria-labelledby"].split()[0] for svg in page.find("svg")]
    assert "histogram-adapted-title" in names
    assert "roc-title" not in names
    assert "A ROC curve needs labelled images" in section(page, "scores").text
    table = section(page, "classes").one("table").table()
    assert table[0] == ["Class", "Predicted, zero-shot", "Predicted, adapted"]
    assert sum(int(row[2]) for row in table[1:]) == 60
    assert len(page.find("img")) == 24
    assert not page.find("div", **{"class": "verdict"})
    assert page.one("h1").text == "UEO"


def test_without_unknown_images_detection_has_dashes_and_the_reason(tmp_path):
    page = report_of(tmp_path, ReportRun(unknown=()))
    rows = {row[0]: row[1:] for row in section(page, "metrics").one("table").table()}
    for name in ("HM", "AUROC", "AUPR", "FPR95 (low is good)"):
        assert rows[name] == ["-", "-", "-"]
    assert rows["Accuracy"][0] != "-"
    assert "not defined, because there are no images of unknown classes" in page.text
    assert "A ROC curve needs labelled images" in page.text


def test_unfinished_run_says_so_and_how_to_go_on(tmp_path):
    page = report_of(tmp_path, ReportRun(finished=False))
    note = page.one("aside", **{"aria-label": "State of the run"}).text
    assert note.startswith("This run is not finished It has taken 40 of 80 steps (epoch 4).")
    assert f"ueo-fast finetune --resume --out {tmp_path / 'run'}" in note
    head = section(page, "metrics").one("table").table()[0]
    assert head == ["Metric, %", "zero-shot", "UEO, epoch 2", "points"]
    assert len(section(page, "training").find("svg")) == 4
    for name in ("scores", "images"):
        assert "No predictions yet." in section(page, name).text


def test_run_that_only_began(tmp_path):
    run = make_run(tmp_path)
    for file in run.iterdir():
        if file.name != "config.json":
            file.unlink()
    page = parse_file(write_report(run))
    assert "It has taken no training step yet." in page.text
    assert [node.attributes["id"] for node in page.find("section")] == list(SECTIONS)
    assert not page.find("svg")
    options = section(page, "run").find("table", **{"class": "pairs"})[0].table()
    assert ["--method", "ueo"] in options


def test_training_that_ended_early_says_why(tmp_path):
    run = make_run(tmp_path)
    (run / "finished.json").write_text('{"stopped": "no gain for 3 epochs", "seconds": 1.5}')
    note = parse_file(write_report(run)).one("aside", **{"aria-label": "State of the run"}).text
    assert note == "Training ended early no gain for 3 epochs (after 40 of 40 steps)"


@pytest.mark.parametrize("method", ["zeroshot", "adabn"])
def test_methods_without_steps_have_no_curves(tmp_path, method):
    run = ReportRun(method=method, title={"adabn": "AdaBN"}.get(method, "zero-shot"), during=())
    page = report_of(tmp_path, run)
    assert section(page, "training").text == "Training This method takes no gradient steps."
    head = section(page, "metrics").one("table").table()[0]
    charts = section(page, "scores").find("svg")
    if method == "zeroshot":
        assert head == ["Metric, %", "zero-shot"]
        assert len(charts) == 2
        assert "Predicted, adapted" not in page.text
    else:
        assert head == ["Metric, %", "zero-shot", "AdaBN", "points"]
        assert len(charts) == 3


def test_online_predictions_stand_beside_zero_shot_on_the_same_images(tmp_path):
    run = make_run(tmp_path, ReportRun(method="tent", title="Tent"))
    before, _, after = metrics_of(run)
    online = {**after, "split": "online", "auroc": 0.25}
    with open(run / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(online) + "\n")
    tables = section(parse_file(write_report(run)), "metrics").find("table")
    assert [t.one("caption").text.split(":")[0] for t in tables] == [
        "Test images",
        "Training images, each predicted as it was met",
    ]
    rows = {row[0]: row[1:] for row in tables[1].table()}
    assert rows["Metric, %"] == ["zero-shot", "Tent", "points"]
    assert rows["AUROC"][:2] == [f"{100 * before['auroc']:.1f}", "25.0"]


def test_page_of_a_big_run_is_small_and_readable(tmp_path):
    run = ReportRun(
        known=MANY[:300],
        unknown=MANY[300:],
        images=3450,
        steps=5000,
        epochs=50,
        during=range(1, 50),
        warnings=[f"warning {i}" for i in range(1000)],
        skipped=[(f"{i}.jpg", "the file is empty") for i in range(5000)],
    )
    path = write_report(make_run(tmp_path, run))
    assert path.stat().st_size < 1_000_000
    page = parse_file(path)
    gained, lost, full = (table.table() for table in section(page, "classes").find("table"))
    assert (len(gained), len(lost), len(full)) == (11, 11, 301)
    rises = [float(row[4]) for row in gained[1:]]
    assert rises == sorted(rises, reverse=True)
    everything = [float(row[4].replace("\N{MINUS SIGN}", "-")) for row in full[1:]]
    assert rises[0] == max(everything)
    falls = [float(row[4].replace("\N{MINUS SIGN}", "-")) for row in lost[1:]]
    assert falls[0] == min(everything) < 0
    assert "Each point is the mean of 13 steps" in section(page, "training").text
    assert "The other 900 are in warnings.jsonl" in page.text
    assert "4,900 more are in problem.json" in page.text
    for name in ("loss", "entropy", "learning-rate", "roc"):
        for line in chart(page, name).find("path"):
            points = len(re.findall(r"[ML]", line.attributes.get("d", "")))
            assert points <= 2 * MOST_POINTS + 10


def test_page_is_below_two_megabytes_whatever_the_run(tmp_path):
    names = [f"{'very ' * 30}long name {i}" for i in range(21_000)]  # ImageNet-21k and worse
    run = ReportRun(known=names, unknown=(), images=400, during=())
    path = make_run(tmp_path, run)
    page = write_report(path)
    assert page.stat().st_size < 2_000_000
    assert "20,000 more classes are in metrics.jsonl" in parse_file(page).text


def test_where_the_page_goes(tmp_path, monkeypatch):
    run = make_run(tmp_path)
    assert write_report(run) == run / "report.html"
    other = tmp_path / "page.html"
    assert write_report(run, other) == other
    assert other.read_bytes() == (run / "report.html").read_bytes()

    def killed(*_):
        raise OSError("killed")

    other.write_text("mine")
    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(OSError, match="killed"):
        write_report(run, other)
    assert other.read_text() == "mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["images", "page.html", "run"]


def test_style_of_the_user_and_of_the_program_is_not_touched(tmp_path):
    run = make_run(tmp_path)
    code = (
        "import sys, matplotlib\n"
        "matplotlib.rcParams.update({'font.size': 31, 'axes.facecolor': '#abcdef'})\n"
        "from pathlib import Path\n"
        "from ueo_fast.finetune.report import write_report\n"
        f"page = write_report(Path({str(run)!r})).read_text(encoding='utf-8')\n"
        "print('31px' in page, 'abcdef' in page, matplotlib.rcParams['font.size'], "
        "'matplotlib.pyplot' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["False", "False", "31.0", "False"], shlex.quote(done.stderr)
