"""The report in a real browser: it is drawn whole, fits a phone, and asks nobody for anything.

The page under test stands unchanged in frames of several widths; a script of the page around them
looks at it and writes what it sees into the document, which the browser prints.
"""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess

import pytest
from report_page import parse
from report_run import SCRIPT, ReportRun, make_run

from ueo_fast.finetune.report import write_report

BROWSER = next(
    filter(
        None,
        map(
            shutil.which,
            ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome"),
        ),
    ),
    None,
)
pytestmark = pytest.mark.skipif(
    BROWSER is None, reason="no chromium or chrome is installed to open the page in"
)
WIDTHS = (360, 400, 1200)

PROBE = """
<!DOCTYPE html><meta charset="utf-8"><pre id="seen"></pre>
%s
<script>
addEventListener("load", () => {
  const seen = [...document.querySelectorAll("iframe")].map((frame) => {
    const page = frame.contentDocument, root = page.documentElement;
    const wide = [...page.body.querySelectorAll("*")].filter((node) =>
      !node.closest(".scroll, svg, .hidden, .skip, bdi") &&
      node.getBoundingClientRect().right > root.clientWidth + 1);
    for (const node of page.querySelectorAll("details")) node.open = true;
    const images = [...page.images];
    return {
      width: root.clientWidth,
      overflow: root.scrollWidth - root.clientWidth,
      wide: wide.map((node) => node.tagName + "." + node.className),
      sections: [...page.querySelectorAll("main section")]
        .filter((node) => node.getBoundingClientRect().height > 40).map((node) => node.id),
      images: images.length,
      broken: images.filter((one) => !(one.complete && one.naturalWidth > 0)).length,
      charts: [...page.querySelectorAll("svg")].map((one) => {
        const box = one.getBoundingClientRect();
        return Math.min(box.width, box.height, one.querySelectorAll("path").length * 100);
      }),
      smallest: Math.min(...[...page.querySelectorAll("svg text")].map((one) => {
        return one.getBoundingClientRect().height;
      })),
      requests: frame.contentWindow.performance.getEntriesByType("resource")
        .map((one) => one.name).filter((name) => !name.startsWith("data:")),
      ink: getComputedStyle(page.querySelector("svg text") || page.body).fill,
      title: page.title,
      sorted: [0, 3, 3].map((column) => {
        const table = page.querySelector("table.images");
        if (!table) return null;
        const head = table.tHead.rows[0].cells[column];
        head.querySelector("button").click();
        return [
          head.getAttribute("aria-sort"),
          [...table.tBodies[0].rows].map((row) => row.cells[column].textContent),
        ];
      }),
    };
  });
  document.getElementById("seen").textContent = JSON.stringify(seen);
});
</script>
"""


def look(folder, page: str, *options: str) -> tuple[list[dict], str]:
    """What the browser sees of a page in each of :data:`WIDTHS`, and what it complains of."""
    frames = "".join(
        f'<iframe width="{width}" height="900" style="border:0" srcdoc="{html.escape(page)}">'
        "</iframe>"
        for width in WIDTHS
    )
    wrapper = folder / "wrapper.html"
    wrapper.write_text(PROBE % frames, encoding="utf-8")
    done = run_browser(
        folder, "--virtual-time-budget=10000", *options, "--dump-dom", wrapper.as_uri()
    )
    seen = re.search(r'<pre id="seen">(.+?)</pre>', done.stdout, re.DOTALL)
    assert seen, f"the browser printed no result: {done.stderr[-2000:]}"
    complaints = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return json.loads(html.unescape(seen[1])), "\n".join(complaints)


def run_browser(folder, *options: str) -> subprocess.CompletedProcess[str]:
    command = [
        *(BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
        *("--disable-dev-shm-usage", "--disable-background-networking", "--disable-extensions"),
        *(f"--user-data-dir={folder / 'profile'}", "--enable-logging=stderr", "--v=0"),
        *options,
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


RUNS = {
    "ordinary": (ReportRun(warnings=("w" * 300,)), 7),
    "many classes": (
        ReportRun(
            known=[f"{'long' * 12}-{i}" for i in range(200)],
            unknown=("x",),
            images=804,
            steps=2000,
            options={"data": "/a/path/" + "x" * 200, "prompt_template": "{} " * 60},
        ),
        7,
    ),
    "unlabelled": (ReportRun(labelled=False, unknown=()), 5),
    "unfinished": (ReportRun(finished=False), 4),
}


@pytest.mark.parametrize("name", RUNS)
def test_page_is_drawn_whole_at_every_width_and_loads_nothing(tmp_path, name):
    run, charts = RUNS[name]
    finished = run.finished
    page = write_report(make_run(tmp_path, run)).read_text(encoding="utf-8")
    seen, complaints = look(tmp_path, page)
    assert complaints == ""
    assert [view["width"] for view in seen] == list(WIDTHS)
    for view in seen:
        assert view["sections"] == [
            *("unknown", "metrics", "scores", "classes", "images", "training", "run"),
        ]
        assert (view["images"], view["broken"]) == (page.count("<img "), 0)
        assert (view["images"] > 12) == finished
        assert len(view["charts"]) == charts
        assert min(view["charts"]) > 150
        assert view["overflow"] == 0
        assert view["wide"] == []
        assert view["smallest"] > 8
        assert view["requests"] == []
        assert view["title"].startswith("UEO: ")


def test_the_tables_can_be_sorted(tmp_path):
    run = make_run(tmp_path)
    seen, complaints = look(tmp_path, write_report(run).read_text(encoding="utf-8"))
    assert complaints == ""
    for view in seen:
        names, upwards, downwards = view["sorted"]
        assert names[0] == upwards[0] == "ascending"
        assert downwards[0] == "descending"
        photos = [name for name in names[1] if name.startswith("photo")]
        assert photos == sorted(photos)
        assert len(photos) == 57
        scores = [float(score) for score in upwards[1]]
        assert scores == sorted(scores)
        assert downwards[1] == sorted(upwards[1], key=float, reverse=True)
    # Without the script the table is there, lowest scores first.
    rows = parse((run / "report.html").read_text(encoding="utf-8")).one(
        "table", **{"class": "images sortable"}
    )
    assert not rows.find("button")


def test_the_probe_sees_what_is_wrong(tmp_path):
    page = (
        '<!DOCTYPE html><title>x</title><main><section id="a"></section></main>'
        '<img src="data:image/png;base64,AAAA"><div class="big" style="width:3000px">x</div>'
        '<img src="http://127.0.0.1:9/none.png"><script>nothing()</script>'
    )
    seen, complaints = look(tmp_path, page)
    assert "nothing is not defined" in complaints
    for view in seen:
        assert view["broken"] == 2
        assert view["overflow"] > 0
        assert "DIV.big" in view["wide"]
        assert view["requests"] == ["http://127.0.0.1:9/none.png"]
        assert view["sections"] == []


def test_the_page_itself_forbids_what_it_does_not_bring(tmp_path):
    page = write_report(make_run(tmp_path)).read_text(encoding="utf-8")
    added = '<img id="spy" src="http://127.0.0.1:9/spy.png"><script>document.title = "run"</script>'
    seen, complaints = look(tmp_path, page.replace("<header>", f"{added}<header>"))
    assert "Content Security Policy" in complaints
    for view in seen:
        assert view["title"].startswith("UEO: ")
        assert view["broken"] == 1


def test_charts_follow_the_page_into_the_dark(tmp_path):
    page = write_report(make_run(tmp_path)).read_text(encoding="utf-8")
    light, _ = look(tmp_path, page)
    dark, _ = look(tmp_path, page, "--blink-settings=preferredColorScheme=0")
    assert light[0]["ink"] == "rgb(27, 31, 36)"
    assert dark[0]["ink"] == "rgb(230, 233, 237)"


def test_page_opens_from_disk(tmp_path):
    path = write_report(make_run(tmp_path, ReportRun(warnings=(SCRIPT,))))
    done = run_browser(tmp_path, "--window-size=400,800", "--dump-dom", path.as_uri())
    assert "CONSOLE" not in done.stderr
    page = parse(re.sub(r"<!--.*?-->", "", done.stdout))
    assert page.one("main").find("section")
    assert page.one("script").text.startswith("for (const table of")
    assert SCRIPT in page.one("aside", **{"aria-label": "Warnings"}).text
    picture = tmp_path / "page.png"
    run_browser(tmp_path, "--window-size=400,800", f"--screenshot={picture}", path.as_uri())
    assert picture.read_bytes().startswith(b"\x89PNG")
