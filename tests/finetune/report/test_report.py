"""The HTML report of a run: what is on the page, and that it is whole in itself."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import math
import os
import re
from itertools import pairwise
from urllib.parse import unquote, urlsplit

import pytest
from PIL import Image
from report_page import HEADINGS, SECTIONS, chart, metrics_of, parse, parse_file, report_of, section
from report_run import ODD_NAMES, SCRIPT, ReportRun, make_run

from ueo_fast.finetune.files.run_folder import RunFolder
from ueo_fast.finetune.report import read_run, write_report, write_thumbnails


@pytest.fixture(scope="module")
def ordinary(tmp_path_factory):
    """A finished, labelled run, and its page."""
    run = make_run(tmp_path_factory.mktemp("ordinary"), ReportRun(warnings=("it collapsed",)))
    return run, parse_file(write_report(run))


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
    assert "left out: .txt 3" in words


def test_thumbnails_are_the_extremes_small_and_of_every_kind_of_file(ordinary):
    run, page = ordinary
    predictions = read_run(run).predictions
    least = section(page, "unknown").one("ul", **{"class": "gallery"})
    most = section(page, "images").one("ul", **{"class": "gallery"})
    shown = [li.one("div", **{"class": "file"}).text for li in most.find("li")]
    assert shown == [one.image for one in predictions.most_confident]
    assert set(ODD_NAMES) <= set(shown)
    scores = [one.adapted_mcm for one in predictions.most_confident]
    assert scores == sorted(scores, reverse=True)
    assert scores[0] == predictions.adapted_mcm.max()
    shown = [li.one("div", **{"class": "file"}).text for li in least.find("li")]
    assert shown == [one.image for one in predictions.lowest[:12] if not one.known]
    assert predictions.lowest[0].adapted_mcm == predictions.adapted_mcm.min()
    images = most.find("img") + least.find("img")
    assert len(images) == 12 + len(shown) > 12
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
    data = read_run(run)
    most = data.predictions.most_confident
    os.unlink(most[3].path)
    with open(most[4].path, "wb") as file:
        file.write(b"\x89PNG\r\n\x1a\nnothing")
    with open(most[5].path, "wb"):
        pass
    paths = json.loads((run / "images.json").read_text())["train"]["paths"]
    write_thumbnails(RunFolder(run), paths, data.problem.known)
    page = parse_file(write_report(run))
    items = section(page, "images").one("ul", **{"class": "gallery"}).find("li")
    reasons = [items[i].one("div", **{"class": "gone"}).text for i in (3, 4, 5)]
    assert reasons[0] == "not shown No such file or directory"
    assert reasons[1].startswith("not shown ")
    assert reasons[2] == "not shown the file is empty"
    assert len(section(page, "images").find("img")) == 9


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
    # A link is followed only by who clicks it; those to the images are tested by themselves.
    images = {a.attributes["href"] for a in page.find("a") if "bdi" in [n.tag for n in a.find("*")]}
    return [x for x in links if not x.startswith(("data:", "#")) and x not in images]


def script_hash(page):
    code = page.one("script").children[0]
    return base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()


def test_nothing_is_loaded_and_nothing_can_run_but_the_sorting(ordinary):
    run, page = ordinary
    html = (run / "report.html").read_text(encoding="utf-8")
    assert external_references(html) == []
    assert external_references('<p><img src="https://x/a.png"></p>') == ["https://x/a.png"]
    assert not page.one("script").attributes
    assert not page.find("link")
    assert not [key for n in page.find("*") for key in n.attributes if key.startswith("on")]
    policy = page.one("meta", **{"http-equiv": "Content-Security-Policy"}).attributes["content"]
    assert policy == (
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{script_hash(page)}'; base-uri 'none'; form-action 'none'"
    )
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
    assert page.one("script").text.startswith("for (const table of")  # the page's own
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


def images_table(page):
    head, *rows = section(page, "images").one("table", **{"class": "images sortable"}).table()
    return head, rows


def test_table_of_all_images_is_that_of_predictions_csv(ordinary):
    run, page = ordinary
    with open(run / "predictions.csv", newline="", encoding="utf-8") as file:
        expected = sorted(csv.DictReader(file), key=lambda row: float(row["adapted_mcm"]))
    head, found = images_table(page)
    assert head == ["Image", "Known?", "Class", "MCM", "Zero-shot class", "Zero-shot MCM", "Label"]
    assert len(found) == len(expected) == 60
    for cells, row in zip(found, expected, strict=True):
        assert cells[0] == row["image"]
        assert cells[1] == {"true": "known", "false": "unknown"}[row["known"]]
        assert (cells[2], cells[4], cells[6]) == (
            *(row["adapted_class"], row["zeroshot_class"], row["label"]),
        )
        assert float(cells[3]) == pytest.approx(float(row["adapted_mcm"]), rel=1e-4)
        assert float(cells[5]) == pytest.approx(float(row["zeroshot_mcm"]), rel=1e-4)


def test_links_lead_to_the_files_percent_encoded(ordinary):
    run, page = ordinary
    _, rows = images_table(page)
    links = section(page, "images").one("table", **{"class": "images sortable"}).find("a")
    assert len(links) == len(rows)
    for link, row in zip(links, rows, strict=True):
        uri = urlsplit(link.attributes["href"])
        assert (uri.scheme, uri.netloc, uri.query, uri.fragment) == ("file", "", "", "")
        assert unquote(uri.path) == str(run.parent / "images" / row[0])
        assert re.fullmatch(r"[A-Za-z0-9/._~%-]+", uri.path)


def test_relative_paths_are_linked_from_where_the_run_was_started(tmp_path, monkeypatch):
    started = tmp_path / "a folder"
    started.mkdir()
    monkeypatch.chdir(started)
    run = make_run(started)
    table = (run / "predictions.csv").read_text(encoding="utf-8")
    (run / "predictions.csv").write_text(table.replace(f"{started}/", ""), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    page = parse_file(write_report(run))
    links = section(page, "images").one("table", **{"class": "images sortable"}).find("a")
    names = [row[0] for row in images_table(page)[1]]
    found = [unquote(urlsplit(link.attributes["href"]).path) for link in links]
    assert found == [str(started / "images" / name) for name in names]
    assert len(found) == 60


def test_a_page_begins_with_the_verdict(ordinary):
    run, page = ordinary
    before, _, after = metrics_of(run)
    main = [node for node in page.one("main").children if not isinstance(node, str)]
    words = main[0].text
    accuracy, auroc = (
        f"from {100 * before[key]:.1f}% to {100 * after[key]:.1f}%"
        for key in ("per_class_accuracy", "auroc")
    )
    assert words.startswith(f"Better: UEO raised per-class accuracy {accuracy} (by ")
    assert f" and AUROC {auroc} (by " in words
    finished = json.loads((run / "finished.json").read_text())
    with open(run / "predictions.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    known = [row["known"] == "true" for row in rows]
    assert known == [float(r["adapted_mcm"]) >= finished["threshold"]["value"] for r in rows]
    assert words.endswith(
        f"at a threshold of {finished['threshold']['value']:.6g} on the MCM score (otsu), "
        f"{sum(known)} of 60 images count as known and {60 - sum(known)} as unknown."
    )
    ids = [node.attributes["id"] for node in page.one("main").find("section")]
    assert ids == list(SECTIONS)


def test_what_did_not_change_is_neither_better_nor_worse(tmp_path):
    run = make_run(tmp_path)
    before, during, after = metrics_of(run)
    kept = {key: before[key] for key in (*HEADINGS, "class_accuracies")}
    kept["auroc"] -= 0.0004  # 0.0 points, as it is written
    lines = [before, during, {**after, **kept}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = parse_file(write_report(run))
    assert page.one("p", **{"class": "lead"}).text.startswith(
        f"No change: UEO left per-class accuracy at {100 * before['per_class_accuracy']:.1f}% and "
        f"AUROC at {100 * kept['auroc']:.1f}%; "
    )
    marked = [n for n in page.find("*") if {"better", "worse"} & set(n.classes)]
    assert marked == []


def test_of_many_images_the_table_has_the_lowest_and_says_so(tmp_path):
    path = write_report(make_run(tmp_path, ReportRun(images=1234)))
    page = parse_file(path)
    _, rows = images_table(page)
    scores = [float(row[3]) for row in rows]
    assert len(scores) == 1000
    assert scores == sorted(scores)
    words = section(page, "images").text
    assert "The table has the 1,000 images with the lowest scores; all 1,234 are in" in words
    assert path.stat().st_size < 1_000_000


def test_one_image_is_one_image(tmp_path):
    run = ReportRun(known=("a",), images=1, unknown=(), skipped=(), warnings=("x",))
    page = report_of(tmp_path, run)
    assert "1 image" in section(page, "images").text
    assert not re.search(r"\b1 (images|warnings|files|options|steps|classes)\b", page.text)
    assert "the scores allow no threshold (otsu)" in page.one("p", **{"class": "lead"}).text


def test_what_makes_results_doubtful_is_a_warning(tmp_path):
    run = make_run(tmp_path)
    before, during, after = metrics_of(run)
    lines = [before, during, {**after, "auroc": 0.412}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with open(run / "predictions.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    with open(run / "predictions.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows({**row, "adapted_class": "bicycle"} for row in rows)
    page = parse_file(write_report(run))
    words = page.one("aside", **{"aria-label": "Warnings"}).text
    assert words.startswith("2 warnings all 60 images are put into one class, 'bicycle'")
    assert "AUROC is 41.2, below 50, which is chance" in words


def test_an_ordinary_run_has_no_warning(tmp_path):
    assert not report_of(tmp_path, ReportRun()).find("aside")
