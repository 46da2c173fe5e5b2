"""A report's page, parsed: what its tests ask of it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from report_run import ReportRun, make_run

from ueo_fast.finetune.report import write_report

SECTIONS = ("unknown", "metrics", "scores", "classes", "images", "training", "run")
HEADINGS = {
    "per_class_accuracy": "Per-class accuracy",
    "accuracy": "Accuracy",
    "hm": "HM",
    "auroc": "AUROC",
    "aupr": "AUPR",
    "fpr95": "FPR95 (low is good)",
}
VOID = {"meta", "img", "br", "link", "input", "hr"}


@dataclass
class Node:
    """An element; text stands among its children as strings."""

    tag: str
    attributes: dict[str, str] = field(default_factory=dict)
    children: list[Node | str] = field(default_factory=list)

    @property
    def classes(self) -> list[str]:
        """Of its ``class`` attribute."""
        return self.attributes.get("class", "").split()

    def find(self, tag: str, **attributes: str) -> list[Node]:
        """All descendants of a tag with these attributes; ``tag="*"`` is any."""
        found = []
        for child in self.children:
            if isinstance(child, Node):
                wanted = (
                    attributes.items()
                    <= {key: child.attributes.get(key) for key in attributes}.items()
                )
                if tag in ("*", child.tag) and wanted:
                    found.append(child)
                found += child.find(tag, **attributes)
        return found

    def one(self, tag: str, **attributes: str) -> Node:
        """The only one there is."""
        (node,) = self.find(tag, **attributes)
        return node

    @property
    def text(self) -> str:
        """Of the element and all within, blanks joined."""
        parts = [c if isinstance(c, str) else c.text for c in self.children]
        return " ".join(" ".join(parts).split())

    def table(self) -> list[list[str]]:
        """Rows of the text of cells."""
        return [
            [cell.text for cell in row.children if isinstance(cell, Node)]
            for row in self.find("tr")
        ]


class _Parser(HTMLParser):
    """Builds the tree; a tag that is closed out of turn is an error."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.root = Node("document")
        self._open = [self.root]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        node = Node(tag, {key: value or "" for key, value in attrs})
        self._open[-1].children.append(node)
        if tag not in VOID:
            self._open.append(node)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._open[-1].children.append(Node(tag, {key: value or "" for key, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self._open[-1].tag == tag, f"</{tag}> closes <{self._open[-1].tag}>"
        self._open.pop()

    def handle_data(self, data: str) -> None:
        self._open[-1].children.append(data)

    def finish(self) -> Node:
        self.close()
        assert self._open == [self.root], f"not closed: {[node.tag for node in self._open[1:]]}"
        return self.root


def parse(html: str) -> Node:
    """The tree of a page whose every element is closed in its turn."""
    parser = _Parser()
    parser.feed(html)
    return parser.finish()


def parse_file(path: Path) -> Node:
    return parse(path.read_text(encoding="utf-8"))


def section(page: Node, name: str) -> Node:
    """The section of that id."""
    return page.one("section", id=name)


def chart(page: Node, name: str) -> Node:
    """The chart whose title has that name."""
    (node,) = [
        svg
        for svg in page.find("svg")
        if svg.attributes["aria-labelledby"].startswith(f"{name}-title ")
    ]
    return node


def report_of(folder: Path, run: ReportRun) -> Node:
    """The page of a run that is made in ``folder``."""
    return parse_file(write_report(make_run(folder, run)))


def metrics_of(run: Path) -> list[dict[str, Any]]:
    """The lines of ``metrics.jsonl``."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]
