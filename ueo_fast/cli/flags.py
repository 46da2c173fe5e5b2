"""Flags from a dataclass: one per field, whose metadata has the help."""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, get_type_hints

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser


def parser_of(config: type[Any], *, prog: str, description: str) -> ArgumentParser:
    """A parser with ``--config`` and ``--print_config`` and the fields of ``config``.

    A field is a flag ``--field-name``; a field whose metadata has ``positional`` is a word of its
    own. Tuples take several words. Fields without a default are required.
    """
    from jsonargparse import ActionYesNo, ArgumentParser

    class Parser(ArgumentParser):
        def error(self, message: str, ex: Exception | None = None) -> NoReturn:
            # Alone: the usage, which lists every flag, would push it out of sight.
            print(f"{prog}: {_plain(message, flags)}\n({prog} --help explains)", file=sys.stderr)
            self.exit(2)
            raise AssertionError from ex  # exit() has left

    flags: dict[str, str] = {}
    parser = Parser(prog=prog, description=description)
    parser.add_argument(
        "--config",
        action="config",
        help="file with options (YAML or JSON), e.g. the config.json of another run; flags after "
        "it win",
    )
    hints = get_type_hints(config)
    for field in dataclasses.fields(config):
        kind: dict[str, Any] = {"type": hints[field.name]}
        if _is_tuple(hints[field.name]):  # several words: --seeds 0 1 2
            (kind["type"],) = {item for item in hints[field.name].__args__ if item is not Ellipsis}
            kind["nargs"] = "+"
        if hints[field.name] is bool:  # --strict, --no-strict, --strict false
            kind = {"action": ActionYesNo(no_prefix="no-"), "nargs": "?"}
        required = field.default is dataclasses.MISSING
        if not required:
            default = field.default
            kind["default"] = list(default) if isinstance(default, tuple) else default
        if field.metadata.get("positional"):
            parser.add_argument(field.name, help=field.metadata["help"], **kind)
        else:
            flag = flags[field.name] = "--" + field.name.replace("_", "-")
            parser.add_argument(flag, help=field.metadata["help"], required=required, **kind)
    return parser


def parse(config: type[Any], words: Sequence[str], *, prog: str, description: str) -> Any:
    """An instance of ``config`` from the words of a command line.

    What ``config`` refuses with a ValueError is reported as a wrong option.

    Raises:
        SystemExit: after ``--help``, ``--print_config``, or wrong options (status 2).
    """
    parser = parser_of(config, prog=prog, description=description)
    options = vars(parser.parse_args(list(words)))
    del options["config"]
    try:
        return config(**options)
    except ValueError as error:
        parser.error(str(error))


def _plain(message: str, flags: Mapping[str, str]) -> str:
    """What jsonargparse says of a value, in the words of a command line."""
    start, colon, names = message.partition("arguments are required: ")
    if colon:  # it names the fields
        return start + colon + ", ".join(flags.get(name, name) for name in names.split(", "))
    text = re.sub(
        r'^Parser key "([^".]+)":\s*', lambda found: f"--{found[1].replace('_', '-')}: ", message
    )
    text = re.sub(  # --early-stop soon: an int, or nothing
        r"Does not validate .*?\n  Errors:\n    - (.*?)\n.*Given value: ",
        r"\1. Got value: ",
        text,
        flags=re.DOTALL,
    )
    text = re.sub(
        r"a typing\.Literal\[([^\]]*)\]",
        lambda found: f"one of {found[1].replace(chr(39), '')}",
        text,
    )
    for kind, words in (("int", "whole number"), ("float", "finite number")):
        text = text.replace(f"<class '{kind}'>", words)
    return text.replace("Expected", "expected").strip()


def _is_tuple(hint: Any) -> bool:
    return getattr(hint, "__origin__", None) is tuple
