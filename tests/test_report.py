"""The HTML report of a run: what is on the page, and that it is whole in itself."""

from __future__ import annotations

import base64
import io
import json
import math
import os
import re
import shlex
import subprocess
import sys
from itertools import pairwise

import pytest
from PIL import Image
from report_page import parse, parse_file
from report_run import ODD_NAMES, SCRIPT, ReportRun, make_run

from ueo_fast.finetune.report import read_run, write_report
from ueo_fast.finetune.report.charts import MOST_POINTS

SECTIONS = ("run", "metrics", "scores", "classes", "training", "images")
HEADINGS = {
    "per_class_accuracy": "Per-class accuracy",
    "accuracy": "Accuracy",
    "hm": "HM",
    "auroc": "AUROC",
    "aupr": "AUPR",
    "fpr95": "FPR95 (low is good)",
}
MANY = [f"class {i:03d}" for i in range(345)]


@pytest.fixture(scope="module")
def ordinary(tmp_path_factory):
    """A finished, labelled run, and its page."""
    run = make_run(tmp_path_factory.mktemp("ordinary"), ReportRun(warnings=("it collapsed",)))
    return run, parse_file(write_report(run))


def report_of(tmp_path, run):
    return parse_file(write_report(make_run(tmp_path, run)))


def section(page, name):
    return page.one("section", id=name)


def chart(page, name):
    (node,) = [
        svg
        for svg in page.find("svg")
        if svg.attributes["aria-labelledby"].startswith(f"{name}-title ")
    ]
    return node


def metrics_of(run):
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_page_has_every_section_and_what_a_reader_without_eyes_needs(ordinary):
    _, page = ordinary
    assert page.one("html").attributes["lang"] == "en"
    assert (
        page.one("head").one("title").text == "UEO: RN50 openai on photos & <more> | ueo_fast run"
    )
    assert page.one("h1").text == "UEO"
    for name in SECTIONS:
        heading = section(page, name).attributes["aria-labelledby"]
        assert section(page, name).one("h2", id=heading).text
        assert page.one("nav").find("a", href=f"#{name}")
    levels = [int(node.tag[1]) for node in page.find("*") if re.fullmatch(r"h\d", node.tag)]
    assert levels[0] == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    for table in page.find("table"):
        assert table.one("caption").text
        assert table.find("th", scope="row")
    for svg in page.find("svg"):
        title, description = svg.attributes["aria-labelledby"].split()
        assert svg.attributes["role"] == "img"
        assert svg.one("title", id=title).text
        assert svg.one("desc", id=description).text
    assert all(image.attributes["alt"] for image in page.find("img"))
    assert page.one("meta", name="viewport").attributes["content"].startswith("width=device-width")
    assert page.one("aside", **{"aria-label": "Warnings"}).text == "1 warning step 3: it collapsed"


def test_numbers_are_those_of_metrics_jsonl(ordinary):
    run, page = ordinary
    before, during, after = metrics_of(run)
    assert [before["stage"], during["stage"], after["stage"]] == ["before", "during", "after"]
    head, *rows = section(page, "metrics").one("table").table()
    assert head == ["Metric, %", "zero-shot", "UEO", "points"]
    assert [row[0] for row in rows] == list(HEADINGS.values())
    for key, row in zip(HEADINGS, rows, strict=True):
        assert row[1] == f"{100 * before[key]:.1f}"
        assert row[2] == f"{100 * after[key]:.1f}"
        change = float(row[3].replace("\N{MINUS SIGN}", "-"))
        assert change == pytest.approx(100 * (after[key] - before[key]), abs=0.0501)
    cells = {
        row[0].text: row[1:]
        for row in (
            [cell for cell in tr.children if not isinstance(cell, str)]
            for tr in section(page, "metrics").find("tr")
        )
    }
    better = ["better" in cells[name][2].attributes["class"] for name in HEADINGS.values()]
    assert all(better)  # a lower FPR95 is better, too
    text = section(page, "metrics").text
    assert "with known images as the positive class" in text
    assert f"{after['known_images']} of known classes, {after['unknown_images']} of" in text


def test_class_table_has_each_accuracy_and_how_many_images_were_put_there(ordinary):
    run, page = ordinary
    before, _, after = metrics_of(run)
    data = read_run(run)
    first, full = (table.table() for table in section(page, "classes").find("table"))
    assert full[0][:5] == ["Class", "Images", "Zero-shot", "Adapted", "Points"]
    assert [row[:5] for row in full[1:]] == [row[:5] for row in first[1:]]
    for i, (name, row) in enumerate(zip(data.problem.known, full[1:], strict=True)):
        assert row[0] == name
        assert row[1] == str(data.predictions.labels[name])
        assert row[2] == f"{100 * before['class_accuracies'][i]:.1f}"
        assert row[3] == f"{100 * after['class_accuracies'][i]:.1f}"
        assert row[5] == str(data.predictions.zeroshot_counts[name])
        assert row[6] == str(data.predictions.adapted_counts[name])


def test_charts_show_both_stages_and_the_areas_of_the_metrics(ordinary):
    run, page = ordinary
    before, _, after = metrics_of(run)
    names = [svg.attributes["aria-labelledby"].split()[0] for svg in page.find("svg")]
    assert names == [
        f"{name}-title"
        for name in (
            *("histogram-zero-shot", "histogram-adapted", "roc"),
            *("loss", "entropy", "learning-rate", "metrics-test"),
        )
    ]
    drawn = chart(page, "roc").text
    assert f"zero-shot, AUROC {100 * before['auroc']:.1f}" in drawn
    assert f"adapted, AUROC {100 * after['auroc']:.1f}" in drawn
    for stage in ("zero-shot", "adapted"):
        words = chart(page, f"histogram-{stage}").text
        assert "known images" in words
        assert "unknown images" in words
    words = chart(page, "entropy").text
    assert f"log C = {math.log(5):.2f}" in words
    assert "marginal" in words
    assert "conditional" in words
    last = json.loads((run / "train.jsonl").read_text().splitlines()[-1])
    assert f"to {last['loss']:.4g} at step 40" in chart(page, "loss").one("desc").text


def test_options_of_the_command_come_first(ordinary):
    run, page = ordinary
    config = json.loads((run / "config.json").read_text())
    command = json.loads((run / "environment.json").read_text())["command"]
    part = section(page, "run")
    assert part.find("pre")[0].text == command
    given, others = (table.table() for table in part.find("table", **{"class": "pairs"})[:2])
    assert dict(given) == {
        "--data": "photos & <more>",
        "--classes": "names.txt",
        "--epochs": "4",
        "--mcm-scale": "20.0",
    }
    assert len(given) + len(others) == len(config)
    assert ["--early-stop", "none"] in others
    assert ["--channels-last", "false"] in others
    words = part.text
    for text in ("broken.jpg the file is empty", "kettle umbrella", "threads used 2", "torch 2"):
        assert text in words


def test_thumbnails_are_the_extremes_small_and_of_every_kind_of_file(ordinary):
    run, page = ordinary
    predictions = read_run(run).predictions
    most, least = section(page, "images").find("ul", **{"class": "gallery"})
    shown = [li.one("div", **{"class": "file"}).text for li in most.find("li")]
    assert shown == [one.image for one in predictions.most_confident]
    assert set(ODD_NAMES) <= set(shown)
    scores = [one.adapted_mcm for one in predictions.most_confident]
    assert scores == sorted(scores, reverse=True)
    assert scores[0] == predictions.adapted_mcm.max()
    assert predictions.least_confident[0].adapted_mcm == predictions.adapted_mcm.min()
    images = most.find("img") + least.find("img")
    assert len(images) == 24
    for image in images:
        head, _, data = image.attributes["src"].partition(",")
        assert head == "data:image/jpeg;base64"
        with Image.open(io.BytesIO(base64.b64decode(data))) as picture:
            assert picture.format == "JPEG"
            assert max(picture.size) == 160
            assert picture.size == (
                int(image.attributes["width"]),
                int(image.attributes["height"]),
            )
    for li, one in zip(most.find("li"), predictions.most_confident, strict=True):
        assert one.adapted_class in li.text
        assert f"MCM {one.adapted_mcm:#.5g}" in li.text
    verdicts = {li.attributes["class"] for li in [*most.find("li"), *least.find("li")]}
    assert verdicts <= {"right", "wrong", "unknown"}
    assert {"right", "unknown"} <= verdicts


def test_files_that_are_gone_or_broken_have_their_reason(tmp_path):
    run = make_run(tmp_path)
    most = read_run(run).predictions.most_confident
    os.unlink(most[3].path)
    with open(most[4].path, "wb") as file:
        file.write(b"\x89PNG\r\n\x1a\nnothing")
    with open(most[5].path, "wb"):
        pass
    page = parse_file(write_report(run))
    items = section(page, "images").find("ul", **{"class": "gallery"})[0].find("li")
    reasons = [items[i].one("div", **{"class": "gone"}).text for i in (3, 4, 5)]
    assert reasons[0] == "not shown No such file or directory"
    assert reasons[1].startswith("not shown ")
    assert reasons[2] == "not shown the file is empty"
    assert len(page.find("img")) == 21


def external_references(html: str) -> list[str]:
    """What a browser would fetch."""
    page = parse(html)
    links = [
        value
        for node in page.find("*")
        for key, value in node.attributes.items()
        if key in ("src", "href", "srcset", "data", "action", "poster", "xlink:href")
    ]
    links += re.findall(r"url\(\s*['\"]?([^)'\"]*)", html) + re.findall(r"@import\s+\S+", html)
    return [link for link in links if not link.startswith(("data:", "#"))]


def test_nothing_is_loaded_and_nothing_can_run(ordinary):
    run, page = ordinary
    html = (run / "report.html").read_text(encoding="utf-8")
    assert external_references(html) == []
    assert external_references('<p><img src="https://x/a.png"></p>') == ["https://x/a.png"]
    assert not page.find("script")
    assert not page.find("link")
    assert not [key for n in page.find("*") for key in n.attributes if key.startswith("on")]
    policy = page.one("meta", **{"http-equiv": "Content-Security-Policy"}).attributes["content"]
    assert policy.startswith("default-src 'none'; img-src data:; style-src 'unsafe-inline'")
    ids = [node.attributes["id"] for node in page.find("*") if "id" in node.attributes]
    assert len(ids) == len(set(ids))
    referred = re.findall(r"(?:url\(|href=\")#([^)\"]+)", html)
    referred += [i for svg in page.find("svg") for i in svg.attributes["aria-labelledby"].split()]
    assert set(referred) <= set(ids)
    # Colours are the page's: none of matplotlib's is left where dark follows light.
    drawn = "".join(re.findall(r"<svg.*?</svg>", html, re.DOTALL))
    assert not re.findall(r"#[0-9a-f]{6}", drawn)
    assert "http" not in drawn


def test_words_of_the_user_are_words(tmp_path):
    sneaky = "\"><img src=x onerror=alert(2)>' & {{ 7 * 7 }} $\\frac{1}{0}$ \x07\udcff"
    run = ReportRun(
        known=(SCRIPT, sneaky, "plain"),
        unknown=("</style><script>alert(3)</script>",),
        warnings=(sneaky,),
        skipped=((sneaky, SCRIPT),),
        options={"prompt_template": sneaky, "note": {"a": [SCRIPT]}},
        title=sneaky,
    )
    path = make_run(tmp_path, run)
    html = write_report(path).read_text(encoding="utf-8")
    page = parse(html)
    assert not page.find("script")
    assert all("onerror" not in node.attributes for node in page.find("*"))
    assert all(image.attributes["src"].startswith("data:") for image in page.find("img"))
    shown = sneaky.replace("\x07", "\\x07").replace("\udcff", "\\udcff")
    names = [row[0] for row in section(page, "classes").find("table")[0].table()[1:]]
    assert names == [SCRIPT, shown, "plain"]
    assert shown in page.one("aside", **{"aria-label": "Warnings"}).text
    assert f"{shown} {SCRIPT}" in section(page, "run").text
    title = section(page, "metrics").one("table").table()[0][2]
    assert title.startswith(sneaky[:40])  # cut in its middle, as a heading has to be
    assert " … " in title


def test_unlabelled_run_has_no_metrics_but_all_the_rest(tmp_path):
    page = report_of(tmp_path, ReportRun(labelled=False, unknown=()))
    assert "the images have no labels" in section(page, "metrics").text
    assert not section(page, "metrics").find("table")
    names = [svg.attributes["aria-labelledby"].split()[0] for svg in page.find("svg")]
    assert "histogram-adapted-title" in names
    assert "roc-title" not in names
    assert "A ROC curve needs labelled images" in section(page, "scores").text
    table = section(page, "classes").one("table").table()
    assert table[0] == ["Class", "Put here, zero-shot", "Put here, adapted"]
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
        assert "Put here, adapted" not in page.text
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
