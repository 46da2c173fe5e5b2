"""Run folders of somebody else: a report opens no file that they name, and links to few."""

from __future__ import annotations

import base64
import builtins
import csv
import io
import json
import os

import pytest
from PIL import Image
from report_page import parse, parse_file, section
from report_run import make_run

from ueo_fast.finetune.files.run_folder import RunFolder
from ueo_fast.finetune.report import read_run, write_report, write_thumbnails

pytestmark = pytest.mark.usefixtures("without_charts")  # which name no file

SECRET = (250, 10, 200)


def is_secret(uri):
    with Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) as image:
        pixel = image.convert("RGB").getpixel((0, 0))
    return all(abs(a - b) < 30 for a, b in zip(pixel, SECRET, strict=True))


def a_file(place, image):
    return place / "secret.png"


def a_link_out(place, image):
    image.unlink()
    image.symlink_to(place / "secret.png")
    return image


def a_way_up(place, image):
    return image.parent / ".." / "secret.png"


def a_pipe(place, image):
    os.mkfifo(place / "pipe.png")
    return place / "pipe.png"


def a_device(place, image):
    return "/dev/zero"


def a_process(place, image):
    return "/proc/self/environ"


def name_it(run, old, new, everywhere):
    """Put another path into predictions.csv, and into the other files too."""
    with open(run / "predictions.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    for row in rows:
        row[1] = new if row[1] == old else row[1]
    with open(run / "predictions.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    if everywhere:
        lists = json.loads((run / "images.json").read_text())
        paths = lists["train"]["paths"]
        lists["train"]["paths"] = [new if path == old else path for path in paths]
        (run / "images.json").write_text(json.dumps(lists))
        config = json.loads((run / "config.json").read_text())
        (run / "config.json").write_text(json.dumps({**config, "data": "/", "data_root": "/"}))


@pytest.mark.parametrize("everywhere", [False, True], ids=["in the table", "in every file"])
@pytest.mark.parametrize(
    "target", [a_file, a_link_out, a_way_up, a_pipe, a_device, a_process], ids=lambda f: f.__name__
)
def test_no_file_that_a_run_names_is_opened(tmp_path, monkeypatch, target, everywhere):
    run = make_run(tmp_path)
    Image.new("RGB", (64, 64), SECRET).save(tmp_path / "secret.png")
    image = tmp_path / "images" / read_run(run).predictions.most_confident[4].image
    named = str(target(tmp_path, image))
    name_it(run, str(image), named, everywhere)
    opened = []
    for module, function in ((builtins, "open"), (io, "open"), (os, "open"), (Image, "open")):
        real = getattr(module, function)

        def watched(path, *more, real=real, **options):
            opened.append(path)
            return real(path, *more, **options)

        monkeypatch.setattr(module, function, watched)
    page = parse_file(write_report(run))
    outside = [
        path
        for path in opened
        if isinstance(path, (str, os.PathLike))
        and any(str(path).startswith(s) for s in (named, str(tmp_path / "images"), "/dev", "/proc"))
    ]
    monkeypatch.undo()
    assert outside == []
    assert not any(is_secret(img.attributes["src"]) for img in page.find("img"))
    item = section(page, "images").one("ul", **{"class": "gallery"}).find("li")[4]
    if target is a_link_out:  # what the run saw before
        assert item.find("img")
    else:
        assert "the run kept no thumbnail" in item.text
    # What the run's own list does not have is not linked to either.
    links = [a.attributes["href"] for a in page.find("a")]
    assert any(link.startswith("file:") for link in links)
    if not everywhere and target is not a_link_out:
        assert not any("secret" in x or "pipe" in x or "/dev" in x or "/proc" in x for x in links)


@pytest.mark.parametrize(
    "path",
    [
        "javascript:alert(1)",
        "https://host/x.png",
        "//host/share/x.png",
        "relative/x.png",
        "",
    ],
)
def test_a_path_that_is_no_file_of_this_machine_is_not_linked_to(tmp_path, path):
    run = make_run(tmp_path)
    name_it(run, read_run(run).predictions.lowest[0].path, path, everywhere=True)
    page = parse_file(write_report(run))
    for link in page.find("a"):
        assert link.attributes["href"].startswith(("#", f"file://{tmp_path}/images/"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"jpeg": 'AAAA" onerror="alert(1)'}, "thumbnails.json"),
        ({"jpeg": "A" * 200_000}, "a thumbnail has more than 100000 bytes"),
        ({"jpeg": None}, "jpeg is None, of the wrong type"),
        ({"width": 10**9}, "width is 1000000000, expected 0 to 160"),
        ({"height": '1" onload="x'}, "height is "),
        ({"reason": ["x"]}, "reason is ['x'], of the wrong type"),
    ],
)
def test_thumbnails_that_are_none_are_refused(tmp_path, values, message):
    run = make_run(tmp_path)
    kept = json.loads((run / "thumbnails.json").read_text())
    first = next(iter(kept))
    kept[first] = {**kept[first], **values}
    (run / "thumbnails.json").write_text(json.dumps(kept))
    with pytest.raises(ValueError, match=r"thumbnails\.json") as caught:
        write_report(run)
    assert message in str(caught.value)


def test_the_words_of_a_thumbnail_are_words(tmp_path):
    run = make_run(tmp_path)
    kept = json.loads((run / "thumbnails.json").read_text())
    one = read_run(run).predictions.most_confident[0].path
    script = "<script>alert(1)</script>"
    kept[one] = {"jpeg": "", "width": 0, "height": 0, "reason": script}
    (run / "thumbnails.json").write_text(json.dumps(kept))
    html = write_report(run).read_text(encoding="utf-8")
    assert len(parse(html).find("script")) == 1
    assert f"not shown {script}" in section(parse(html), "images").text


def test_a_pipe_among_the_own_images_does_not_stop_the_run(tmp_path):
    run = make_run(tmp_path)
    data = read_run(run)
    image = data.predictions.most_confident[2].path
    os.unlink(image)
    os.mkfifo(image)
    paths = json.loads((run / "images.json").read_text())["train"]["paths"]
    write_thumbnails(RunFolder(run), paths, data.problem.known)
    thumbnail = read_run(run).thumbnails[image]
    assert (thumbnail.jpeg, thumbnail.reason) == (
        "",
        "not a regular file (a pipe, socket or device)",
    )
