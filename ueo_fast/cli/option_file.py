"""Files of options, JSON or YAML: each value as the text that was written, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

Written = str | list[str | None] | None
"""The text of a value; ``None`` where it is null; or a list of these."""

MOST_BYTES = 100_000
"""Far more than all options take, and little enough to be parsed in a moment."""

_PLAIN_TAGS = {
    f"tag:yaml.org,2002:{name}"
    for name in ("str", "int", "float", "bool", "null", "timestamp", "value", "merge")
}
_NULL = "tag:yaml.org,2002:null"


def read_options(path: Path) -> dict[str, Written]:
    """Read a file.

    YAML's types are not asked: ``2024-01-01``, ``010`` and ``yes`` are these texts, quoted or not,
    and mean what they would mean on the command line. Only an unquoted ``null``, ``~`` or nothing
    at all is null.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is too long, not UTF-8, neither JSON nor YAML, or not a table of options.
    """
    with path.open("rb") as file:
        content = file.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise ValueError(f"it has more than {MOST_BYTES} bytes, so it is not a file of options")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 text: {error.reason} at byte {error.start}") from error
    try:
        try:
            found = _json(text)
        except json.JSONDecodeError:
            found = _yaml(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply to be a file of options") from error
    return found


def dumped(values: Mapping[str, Any]) -> str:
    """YAML that :func:`read_options` reads back."""
    import yaml

    plain = {key: list(v) if isinstance(v, tuple) else v for key, v in values.items()}
    return str(yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=10_000))


def _json(text: str) -> dict[str, Written]:
    value = json.loads(
        text, parse_int=str, parse_float=str, parse_constant=str, object_pairs_hook=_Pairs
    )
    if not isinstance(value, _Pairs):
        raise ValueError(_NOT_A_TABLE)
    return _table((key, _json_value(key, item)) for key, item in value)


class _Pairs(list[tuple[str, Any]]):
    """An object of JSON, before it is looked at whether a key is there twice."""


def _json_value(key: str, value: Any) -> Written:
    if isinstance(value, _Pairs):
        raise ValueError(f"{key}: {_NESTED}")
    if isinstance(value, list):
        if any(isinstance(item, list) for item in value):
            raise ValueError(f"{key}: {_NESTED}")
        return [_json_leaf(item) for item in value]
    return _json_leaf(value)


def _json_leaf(value: Any) -> str | None:
    return str(value).lower() if isinstance(value, bool) else value


def _yaml(text: str) -> dict[str, Written]:
    import yaml

    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None) or str(error).partition("\n")[0]
        mark = getattr(error, "problem_mark", None)
        place = "" if mark is None else f" in line {mark.line + 1}"
        raise ValueError(f"it is neither JSON nor YAML: {problem}{place}") from error
    if node is None:
        return {}
    if not isinstance(node, yaml.MappingNode):
        raise ValueError(_NOT_A_TABLE)
    return _table((_yaml_leaf("", key) or "null", _yaml_value(key, v)) for key, v in node.value)


def _yaml_value(key: Any, node: Any) -> Written:
    if node.id == "sequence":
        return [_yaml_leaf(key.value, item) for item in node.value]
    return _yaml_leaf(key.value, node)


def _yaml_leaf(key: str, node: Any) -> str | None:
    if node.id != "scalar":
        raise ValueError(f"{key or 'a name'}: {_NESTED}")
    if node.tag not in _PLAIN_TAGS:
        raise ValueError(f"{key or node.value}: the tag {node.tag} is not allowed: remove it")
    return None if node.tag == _NULL and node.style is None else str(node.value)


def _table(pairs: Iterable[tuple[str, Written]]) -> dict[str, Written]:
    found: dict[str, Written] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"{key} is there twice: remove one")
        found[key] = value
    return found


_NOT_A_TABLE = "it is not a table of options, e.g. 'epochs: 10' on a line"
_NESTED = "an option has one value or a list of values, not a table or a list of lists"
