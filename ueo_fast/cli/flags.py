"""Options from a command line and from files: one flag per field of a dataclass."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import math
import sys
import types
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, Union, cast, get_args, get_origin, get_type_hints

from ueo_fast.cli.option_file import Written, dumped, read_options

_YES, _NO = ("true", "yes", "on", "1"), ("false", "no", "off", "0")
_NONE = ("none", "null", "~")
_LONGEST_NUMBER = 100  # digits beyond that make no number that any option takes


@dataclasses.dataclass(frozen=True)
class _Option:
    """A field of the dataclass, and how its values are written.

    Attributes:
        field: of the dataclass.
        kind: ``str``, ``int``, ``float``, ``bool``, or the words to choose from.
        optional: ``None`` is a value as well.
        many: takes several values, as a tuple.
    """

    field: dataclasses.Field[Any]
    kind: type | tuple[str, ...]
    optional: bool
    many: bool

    @classmethod
    def of(cls, field: dataclasses.Field[Any], hint: Any) -> _Option:
        many = get_origin(hint) is tuple
        optional = get_origin(hint) in (Union, types.UnionType)
        kinds = get_args(hint) if many or optional else (hint,)
        (kind,) = {kind for kind in kinds if kind not in (type(None), Ellipsis)}
        words = get_args(kind) if get_origin(kind) is Literal else None
        return cls(field, words or kind, optional, many)

    @property
    def name(self) -> str:
        return self.field.name

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def flags(self) -> tuple[str, ...]:
        return (self.flag, *self.field.metadata.get("aliases", ()))

    @property
    def positional(self) -> bool:
        """May be given without its flag as well."""
        return bool(self.field.metadata.get("positional"))

    @property
    def required(self) -> bool:
        return self.field.default is dataclasses.MISSING

    @property
    def help(self) -> str:
        text, default = self.field.metadata["help"], cast("Any", self.field.default)
        if not self.required and default is not None and "default:" not in text:
            words = " ".join(map(str, default)) if self.many else str(default)
            text = f"{text} (default: {words.lower() if self.kind is bool else words})"
        if default is True:
            text += f"; --no-{self.flag[2:]} turns it off"
        return text.replace("%", "%%")

    @property
    def metavar(self) -> str:
        if isinstance(self.kind, tuple):
            return f"{{{','.join(self.kind)}}}"
        names = {int: "N", float: "X", bool: "[true|false]"}
        return names.get(self.kind, self.name.upper())

    def read(self, text: str) -> Any:
        """One value from the text that the user wrote.

        Raises:
            ArgumentTypeError: it is not of the option's kind.
        """
        if isinstance(self.kind, tuple):
            value = text if text in self.kind else None
        elif self.kind is str:
            value = text if text and "\0" not in text else None
        else:
            readers: dict[Any, Any] = {int: _whole_number, float: _number, bool: _switch}
            value = readers[self.kind](text)
        if value is not None:
            return value
        if self.optional and text.lower() in _NONE:
            return None
        raise argparse.ArgumentTypeError(f"expected {self._wanted()}, got {_shown(text)}")

    def from_file(self, written: Written) -> Any:
        """The value that a file of options has.

        Raises:
            ArgumentTypeError: it is not of the option's kind.
        """
        if isinstance(written, list) and self.many:
            if written and None not in written:
                return [self.read(item) for item in written if item is not None]
        elif written is None and self.optional:
            return None
        elif isinstance(written, str):
            value = self.read(written)
            return [value] if self.many else value
        said = "a list" if isinstance(written, list) else "nothing"
        wanted = f"a list, each {self._wanted()}" if self.many else self._wanted()
        raise argparse.ArgumentTypeError(f"expected {wanted}, got {said}")

    def _wanted(self) -> str:
        if isinstance(self.kind, tuple):
            return f"one of {', '.join(self.kind)}"
        return {
            str: "a text that is not empty",
            int: "a whole number",
            float: "a finite number",
            bool: "true or false",
        }[self.kind]


def parse(config: type[Any], words: Sequence[str], *, prog: str, description: str) -> Any:
    """Make an instance of ``config`` from the words of a command line.

    Each field is a flag ``--field-name``, which takes exactly the text that the user typed; a field
    whose metadata has ``positional`` may also be given as words of its own. Tuples take several
    words. Fields without a default are required. ``--config`` names files of options, and where
    ``config`` has presets (``PRESETS``, name to help, and ``preset(name, options)``) ``--preset``
    names one of them. Flags win over a preset, which wins over the file; a preset that the file
    itself names yields to the rest of the file.

    What ``config`` refuses with a ValueError is reported as a wrong option.

    Raises:
        SystemExit: after ``--help``, ``--print_config``, or wrong options (status 2).
    """
    hints = get_type_hints(config)
    options = {
        field.name: _Option.of(field, hints[field.name]) for field in dataclasses.fields(config)
    }
    presets: Mapping[str, str] = getattr(config, "PRESETS", {})
    parser = _parser(options.values(), presets, prog, description)
    given = vars(parser.parse_intermixed_args(_joined(words, options.values(), parser)))
    files, printing = given.pop("config", []), given.pop("print_config", False)
    for option in options.values():
        bare = given.pop(_bare(option), None)
        if bare and option.name in given and not option.many:
            parser.error(f"{option.name} is given twice, with {option.flag} and without: leave one")
        if bare and not option.many:
            (given[option.name],) = bare
        elif bare:
            given[option.name] = [*bare, *given.get(option.name, [])]
    filed: dict[str, Any] = {}
    for path in files:
        filed |= _from_file(path, options, presets, parser)
    named, filed_preset = given.pop("preset", None), filed.pop("preset", None)
    values = {**filed, **given}
    if named or filed_preset:
        preset = config.preset(named or filed_preset, values)
        values = {**filed, **preset, **given} if named else {**preset, **values}
    if printing:
        defaults = {name: o.field.default for name, o in options.items() if not o.required}
        print(dumped({**defaults, **values}), end="")
        parser.exit()
    missing = [o.flag for o in options.values() if o.required and o.name not in values]
    if missing:
        parser.error(f"the following arguments are required: {', '.join(missing)}")
    try:
        return config(**values)
    except ValueError as error:
        parser.error(str(error))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        # Alone: the usage, which lists every flag, would push it out of sight.
        message = message.removeprefix("argument ")
        print(f"{self.prog}: {message}\n({self.prog} --help explains)", file=sys.stderr)
        self.exit(2)


def _parser(
    options: Collection[_Option], presets: Mapping[str, str], prog: str, description: str
) -> _Parser:
    """Its namespace has what the user gave, and no defaults."""
    parser = _Parser(
        prog=prog, description=description, allow_abbrev=False, argument_default=argparse.SUPPRESS
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
    for option in options:
        several = {"nargs": "+"} if option.many else {}
        if option.positional:
            parser.add_argument(
                _bare(option),
                nargs="*" if option.many else "?",
                action=_Bare,
                type=option.read,
                metavar=option.metavar,
                help=option.help,
            )
            several |= {"action": "extend"} if option.many else {}
        parser.add_argument(
            *option.flags,
            dest=option.name,
            type=option.read,
            metavar=option.metavar,
            help=f"the same as {option.metavar} alone" if option.positional else option.help,
            **several,  # type: ignore[arg-type]
        )
    return parser


class _Bare(argparse.Action):
    """A list in any case; nothing where no word was given."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        if values:
            setattr(namespace, self.dest, values if isinstance(values, list) else [values])


def _bare(option: _Option) -> str:
    return f"{option.name} without its flag"


def _joined(words: Sequence[str], options: Collection[_Option], parser: _Parser) -> list[str]:
    """The words, with ``--flag -1e-3`` as ``--flag=-1e-3``: argparse takes a word that begins with
    a hyphen and is no plain number for another flag, and cannot tell the value of a switch from the
    word after it."""
    switches = {option.flag: option for option in options if option.kind is bool}
    single = {flag for option in options if not option.many for flag in option.flags}
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
    path: str, options: Mapping[str, _Option], presets: Mapping[str, str], parser: _Parser
) -> dict[str, Any]:
    """The options in a file, by the name of their field."""
    values: dict[str, Any] = {}
    try:
        for key, written in read_options(Path(path)).items():
            name = key.replace("-", "_")
            if name == "preset" and presets:
                if written is not None and (isinstance(written, list) or written not in presets):
                    raise ValueError(f"preset: expected one of {', '.join(presets)}")
                values[name] = written
                continue
            if name not in options:
                raise ValueError(
                    f"there is no option {_shown(key)}: it is misspelt, or of another command or "
                    "version; remove it"
                )
            try:
                values[name] = options[name].from_file(written)
            except argparse.ArgumentTypeError as error:
                raise ValueError(f"{key}: {error}") from error
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        parser.error(f"config={path!r}: {reason}")
    return values


def _number(text: str) -> float | None:
    if len(text) > _LONGEST_NUMBER:
        return None
    value = math.nan
    with contextlib.suppress(ValueError):
        value = float(int(text, 0))  # 0x10
    with contextlib.suppress(ValueError):
        value = float(text)
    return value if math.isfinite(value) else None


def _whole_number(text: str) -> int | None:
    if len(text) > _LONGEST_NUMBER:
        return None
    with contextlib.suppress(ValueError):
        return int(text)
    with contextlib.suppress(ValueError):
        return int(text, 0)  # 0x10
    value = _number(text)  # 1e3
    return int(value) if value is not None and value.is_integer() else None


def _switch(text: str) -> bool | None:
    return {**dict.fromkeys(_YES, True), **dict.fromkeys(_NO, False)}.get(text.lower())


def _shown(text: str) -> str:
    return repr(text) if len(text) <= 80 else f"{text[:40]!r}... ({len(text)} characters)"
