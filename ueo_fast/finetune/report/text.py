"""How a report writes numbers and the user's words."""

from __future__ import annotations

import json
import unicodedata
from typing import Any

from markupsafe import Markup, escape

UNDEFINED = "-"
_MINUS = "\N{MINUS SIGN}"


def percent(value: float | None) -> str:
    """``0.614`` as ``"61.4"``; ``"-"`` for what is not defined."""
    return UNDEFINED if value is None else f"{100 * value:.1f}"


def points(before: float | None, after: float | None) -> str:
    """Difference of two fractions in points of a hundred, with its sign."""
    if before is None or after is None:
        return UNDEFINED
    text = f"{100 * (after - before):+.1f}"
    return text[1:] if float(text) == 0 else text.replace("-", _MINUS)


def count(value: int) -> str:
    """``12,345``."""
    return f"{value:,}"


def score(value: float) -> str:
    """An MCM score; at scale 1 they differ in late digits."""
    return f"{value:#.5g}"


def duration(seconds: float) -> str:
    """``"1 h 02 min"``, ``"3 min 20 s"``, ``"12.5 s"``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def value_text(value: Any) -> str:
    """A value of a JSON file, as a flag would be written."""
    if isinstance(value, str):
        return value if value.strip() else repr(value)
    return "none" if value is None else json.dumps(value, ensure_ascii=False)


def shown(text: str, limit: int = 300) -> str:
    """The user's words as a page can hold them.

    What is no character (controls, and bytes of a file name that are not UTF-8) becomes its escape
    sequence; of what is longer than ``limit``, the middle is left out.
    """
    if len(text) > limit:
        text = f"{text[: limit - limit // 3]} … {text[-limit // 3 :]}"
    return "".join(
        one
        if unicodedata.category(one) not in ("Cc", "Cs")
        else one.encode("unicode_escape").decode()
        for one in text
    )


def name(text: str, limit: int = 300) -> Markup:
    """The same as an element that keeps the direction of its letters to itself."""
    return Markup("<bdi>{}</bdi>").format(escape(shown(text, limit)))
