"""A matplotlib figure as SVG that stands in a page: its text is text, its colours are the page's.

matplotlib's own SVG is a document: it brings a DOCTYPE, links in its metadata, ids that repeat from
figure to figure, and fixed colours and fonts. Here it becomes an element that can stand beside
others and follows the page from light to dark.
"""

from __future__ import annotations

import io
import re
from contextlib import AbstractContextManager
from typing import Any
from xml.etree import ElementTree

from matplotlib import rc_context
from matplotlib.figure import Figure

# What a chart draws in, and what the page says it looks like. The left side is what matplotlib
# draws, colours that are told apart; the page's style sheet gives the right side its colours.
INK = "#010203"
QUIET = "#040506"
KNOWN = (
    "#0072b2"  # blue and vermilion of Okabe and Ito's palette: distinct for colour-blind readers
)
UNKNOWN = "#d55e00"
THIRD = "#009e73"
_PAGE_COLOURS = {
    INK: "var(--ink)",
    QUIET: "var(--rule)",
    KNOWN: "var(--known)",
    UNKNOWN: "var(--unknown)",
    THIRD: "var(--third)",
}
_COLOUR = re.compile("|".join(_PAGE_COLOURS), re.IGNORECASE)
_FONT = re.compile(r"\bfont:\s*(?:(\d+)\s+)?([\d.]+)px[^;]*")
_REFERENCE = re.compile(r"url\(#([^)]+)\)")

# Text as text, found by the browser's search and set in the page's own font; nothing of the user's
# own matplotlibrc, and nothing random.
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "ueo_fast",
    "font.family": "sans-serif",
    "font.size": 11.0,
    "text.color": INK,
    "text.usetex": False,
    "axes.labelcolor": INK,
    "axes.edgecolor": QUIET,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "axes.formatter.useoffset": False,
    "axes.titlesize": 11.0,
    "axes.labelsize": 11.0,
    "figure.facecolor": "none",
    "figure.constrained_layout.use": True,
    "grid.color": QUIET,
    "grid.linewidth": 0.5,
    "legend.frameon": False,
    "legend.fontsize": 11.0,
    "lines.linewidth": 1.6,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 10.0,
    "ytick.labelsize": 10.0,
}


def chart_style() -> AbstractContextManager[None]:
    """The context in which charts are drawn: ``with chart_style(): figure = Figure(...)``."""
    return rc_context(_STYLE)


def inline_svg(figure: Figure, name: str, *, title: str, description: str) -> str:
    """An ``<svg>`` element for a page.

    Args:
        figure: drawn within :func:`chart_style`, in the colours of this module.
        name: of the chart, once per page; ids begin with it.
        title: what it is, in a few words.
        description: what it shows, for who cannot see it.

    Returns:
        The element, its width that of its place. It holds no link and no id but its own. ``title``
        and ``description`` are escaped.
    """
    file = io.StringIO()
    with chart_style():
        figure.savefig(
            file, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))
        )
    root = ElementTree.fromstring(file.getvalue())
    _remove_metadata(root)
    for element in root.iter():
        _strip_namespaces(element)
    _own_ids(root, name)
    for attribute in ("width", "height", "version"):
        root.attrib.pop(attribute, None)
    root.set("role", "img")
    root.set("aria-labelledby", f"{name}-title {name}-description")
    for position, (tag, text) in enumerate((("title", title), ("desc", description))):
        element = ElementTree.Element(
            tag, id=f"{name}-{'title' if tag == 'title' else 'description'}"
        )
        element.text = text
        root.insert(position, element)
    return ElementTree.tostring(root, encoding="unicode")


def _remove_metadata(root: ElementTree.Element) -> None:
    for child in list(root):
        if child.tag.endswith("}metadata"):
            root.remove(child)


def _strip_namespaces(element: ElementTree.Element) -> None:
    """A page knows what an ``<svg>`` and its parts are; ``xlink:href`` is ``href`` by now."""
    element.tag = element.tag.rpartition("}")[2]
    for attribute in list(element.attrib):
        value = element.attrib.pop(attribute)
        value = _COLOUR.sub(lambda match: _PAGE_COLOURS[match[0].lower()], value)
        name = attribute.rpartition("}")[2]
        if name == "style":
            value = _FONT.sub(_page_font, value)
        element.set(name, value)
    # Line breaks between elements are most of what is left of a small chart.
    if element.text is not None and not element.text.strip():
        element.text = None
    if element.tail is not None and not element.tail.strip():
        element.tail = None


def _page_font(match: re.Match[str]) -> str:
    """Size and weight; the family is the page's."""
    weight = f"font-weight: {match[1]}; " if match[1] else ""
    return f"{weight}font-size: {match[2]}px"


def _own_ids(root: ElementTree.Element, name: str) -> None:
    """Ids that nothing refers to go; the others begin with ``name``."""
    used: set[str] = set()
    for element in root.iter():
        for attribute, value in element.attrib.items():
            used.update(_REFERENCE.findall(value))
            if attribute == "href":
                used.add(value.removeprefix("#"))
    for element in root.iter():
        for attribute, value in list(element.attrib.items()):
            if attribute == "id":
                if value in used:
                    element.set("id", f"{name}-{value}")
                else:
                    del element.attrib["id"]
            elif attribute == "href":
                element.set("href", f"#{name}-{value.removeprefix('#')}")
            else:
                element.set(attribute, _REFERENCE.sub(rf"url(#{name}-\1)", value))
