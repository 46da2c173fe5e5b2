"""Options from a command line and from files: one flag for each option of a dataclass."""

from __future__ import annotations

import argparse
import contextlib
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from ueo_fast.cli.option_file import Written, dumped, read_options
from ueo_fast.finetune.declared_options import GROUPS, Option, build, options_of

_YES, _NO = ("true", "yes", "on", "1"), ("false", "no", "off", "0")
_NONE = ("none", "null", "~")
_LONGEST_NUMBER = 100  # digits beyond that make no number that any option takes


def parse(config: type[Any], words: Sequence[str], *, prog: str, description: str) -> Any:
    """Make an instance of ``config`` from the words of a command line.

    Each option is a flag ``--its-name``, which takes exactly the text that the user typed; one
    whose metadata has ``positional`` may also be given without its flag. Tuples take several words.
    Options without a default are required. ``--config`` names files of options, and where
    ``config`` has presets (``PRESETS``, name to help, and ``preset(name, options)``) ``--preset``
    names one of them. Flags win over a preset, which wins over the file; a preset that the file
    itself names yields to the rest of the file.

    What ``config`` refuses with a ValueError is reported as a wrong option.

    Raises:
        SystemExit: after ``--help``, ``--print_config``, or wrong options (status 2).
    """
    options = options_of(config)
    presets: Mapping[str, str] = getattr(config, "PRESETS", {})
    parser = _parser(options, presets, prog, description)
    given = vars(parser.parse_intermixed_args(_joined(words, options, parser)))
    files, printing = given.pop("config", []), given.pop("print_config", False)
    for name, option in options.items():
        bare = given.pop(_bare(name), None)
        if not bare:
            continue
        flagged = given.get(name, [])
        said = [*bare, *(flagged if option.many else [flagged] if flagged else [])]
        if not option.many and said[1:]:
            parser.error(f"{name} is given twice, as {said[0]!r} and as {said[1]!r}: leave out one")
        given[name] = said if option.many else said[0]
    filed: dict[str, Any] = {}
    for path in files:
        filed |= _from_file(path, options, presets, parser)
    named, filed_preset = given.pop("preset", None), filed.pop("preset", None)
    values = {**filed, **given}
    if named or filed_preset:
        preset = config.preset(named or filed_preset, values)
        values = {**filed, **preset, **given} if named else {**preset, **values}
    if printing:
        defaults = {name: o.default for name, o in options.items() if not o.required}
        print(dumped({**defaults, **values}), end="")
        parser.exit()
    missing = [_flag(name) for name, o in options.items() if o.required and name not in values]
    if missing:
        parser.error(f"the following arguments are required: {', '.join(missing)}")
    try:
        return build(config, values)
    except ValueError as error:
        parser.error(str(error))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        # Alone: the usage would push it out of sight.
        message = message.removeprefix("argument ")
        print(f"{self.prog}: {message}\n({self.prog} --help explains)", file=sys.stderr)
        self.exit(2)


def _parser(
    options: Mapping[str, Option], presets: Mapping[str, str], prog: str, description: str
) -> _Parser:
    """Its namespace has what the user gave, and no defaults."""
    bare = [name.upper() for name, option in options.items() if "positional" in option.metadata]
    parser = _Parser(
        prog=prog,
        usage=" ".join((prog, *bare, "[options]")).replace("%", "%%"),
        description=description,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument(
        "--config",
        action="append",
        metavar="FILE",
        help="file with options (YAML or JSON), e.g. the config.json of another run; flags win",
    )
    parser.add_argument(
        *("--print-config", "--print_config"),
        action="store_true",
        help="print all options as such a file, and exit",
    )
    if presets:
        listed = "; ".join(f"{name}: {text}" for name, text in presets.items())
        parser.add_argument(
            "--preset",
            choices=tuple(presets),
            help=f"options that belong together; flags win over them. {listed}".replace("%", "%%"),
        )
    for heading in (*GROUPS, ""):
        members = [option for option in options.values() if option.group == heading]
        members.sort(key=lambda option: not option.path.startswith(f"{heading}."))
        group = parser.add_argument_group(heading) if heading and members else parser
        for option in members:
            name = option.name
            several: Any = {"nargs": "+", "action": "extend"} if option.many else {}
            group.add_argument(
                *(_flag(name), *option.metadata.get("aliases", ())),
                dest=name,
                type=_reader(option),
                metavar=_metavar(option),
                help=_help(option).replace("%", "%%"),
                **several,
            )
            if "positional" in option.metadata:
                parser.add_argument(
                    _bare(name), nargs="*", type=_reader(option), help=argparse.SUPPRESS
                )
    return parser


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _bare(name: str) -> str:
    return f"{name} without its flag"


def _metavar(option: Option) -> str:
    if isinstance(option.kind, tuple):
        return f"{{{','.join(option.kind)}}}"
    names = {int: "N", float: "X", bool: "[true|false]"}
    return names.get(option.kind, option.name.upper())


def _help(option: Option) -> str:
    text, default, flag = option.help, option.default, _flag(option.name)
    if "methods" in option.metadata:
        text = f"{text} ({', '.join(option.metadata['methods'])})"
    if not option.required and default is not None and "default:" not in text.lower():
        words = " ".join(map(str, default)) if option.many else str(default)
        text = f"{text} (default: {words.lower() if option.kind is bool else words})"
    if default is True:
        text += f"; --no-{flag[2:]} turns it off"
    return f"{text}; also without {flag}" if "positional" in option.metadata else text


def _reader(option: Option) -> Any:
    return lambda text: _read(option, text)


def _read(option: Option, text: str) -> Any:
    """One value from the text that the user wrote.

    Raises:
        ArgumentTypeError: it is not of the option's kind.
    """
    kind = option.kind
    if isinstance(kind, tuple):
        value = text if text in kind else None
    elif kind is str:
        value = text if text and "\0" not in text else None
    else:
        readers: dict[Any, Any] = {int: _whole_number, float: _number, bool: _switch}
        value = readers[kind](text)
    if value is None and not (option.optional and text.lower() in _NONE):
        raise argparse.ArgumentTypeError(f"expected {_wanted(option)}, got {_shown(text)}")
    return value


def _wanted(option: Option) -> str:
    if isinstance(option.kind, tuple):
        return f"one of {', '.join(option.kind)}"
    return {
        str: "a text that is not empty",
        int: "a whole number",
        float: "a finite number",
        bool: "true or false",
    }[option.kind]


def _joined(words: Sequence[str], options: Mapping[str, Option], parser: _Parser) -> list[str]:
    """The words, with ``--flag -1e-3`` as ``--flag=-1e-3``: argparse takes a word that begins with
    a hyphen and is not a plain number for another flag, and cannot tell the value of a switch from
    the word after it."""
    switches = {_flag(name) for name, option in options.items() if option.kind is bool}
    single = {_flag(name) for name, option in options.items() if not option.many}
    single |= {"--config", "--preset"}
    joined: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if word == "--":
            return [*joined, word, *rest]
        if word in switches:
            said = rest[0].lower() if rest else ""
            word += f"={rest.pop(0) if said in (*_YES, *_NO) else 'true'}"
        elif word.startswith("--no-") and f"--{word[5:]}" in switches:
            word = f"--{word[5:]}=false"
        elif word in single and rest and rest[0][:1] == "-" and rest[0][:2] not in ("-", "--"):
            word += f"={rest.pop(0)}"
        if word.partition("=")[2] == "--":  # which argparse drops
            parser.error(f"argument {word[:-3]}: expected a value, got '--'")
        joined.append(word)
    return joined


def _from_file(
    path: str, options: Mapping[str, Option], presets: Mapping[str, str], parser: _Parser
) -> dict[str, Any]:
    """The options in a file, by name."""
    values: dict[str, Any] = {}
    try:
        for key, written in read_options(Path(path)).items():
            name = key.replace("-", "_")
            if name == "preset" and presets:
                if written is not None and (isinstance(written, list) or written not in presets):
                    raise ValueError(f"preset: expected one of {', '.join(presets)}")
                values[name] = written
            elif name not in options:
                raise ValueError(
                    f"unknown option {_shown(key)}: it is misspelt, or of another command or "
                    "version; remove it"
                )
            else:
                try:
                    values[name] = _value(options[name], written)
                except argparse.ArgumentTypeError as error:
                    raise ValueError(f"{key}: {error}") from error
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        parser.error(f"config={path!r}: {reason}")
    return values


def _value(option: Option, written: Written) -> Any:
    """The value that a file of options has."""
    if isinstance(written, list) and option.many:
        if written and None not in written:
            return [_read(option, item) for item in written if item is not None]
    elif written is None and option.optional:
        return None
    elif isinstance(written, str):
        value = _read(option, written)
        return [value] if option.many else value
    said = "a list" if isinstance(written, list) else "nothing"
    wanted = f"a list, each {_wanted(option)}" if option.many else _wanted(option)
    raise argparse.ArgumentTypeError(f"expected {wanted}, got {said}")


def _number(text: str) -> float | None:
    value = math.nan
    if len(text) <= _LONGEST_NUMBER:
        with contextlib.suppress(ValueError):
            value = float(int(text, 0))  # 0x10
        with contextlib.suppress(ValueError):
            value = float(text)
    return value if math.isfinite(value) else None


def _whole_number(text: str) -> int | None:
    if len(text) <= _LONGEST_NUMBER:
        for base in (10, 0):  # 020, 0x10
            with contextlib.suppress(ValueError):
                return int(text, base)
    value = _number(text)  # 1e3
    return int(value) if value is not None and value.is_integer() else None


def _switch(text: str) -> bool | None:
    return {**dict.fromkeys(_YES, True), **dict.fromkeys(_NO, False)}.get(text.lower())


def _shown(text: str) -> str:
    return repr(text) if len(text) <= 80 else f"{text[:40]!r}... ({len(text)} characters)"
