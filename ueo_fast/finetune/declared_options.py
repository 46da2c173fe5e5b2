"""Options declared as dataclasses: flat names, however the fields are grouped into parts.

The ``Attributes`` section of a dataclass's docstring says what each option is for, once for the
code and for ``--help``. A field whose type is a dataclass is a part: its fields are options like
the others, so flags and ``config.json`` stay flat while each function receives the part it needs.

The metadata of a field may have ``flag`` (an option name that differs from the field's), ``group``
(its heading in ``--help``, by default the name of its part), ``methods`` (the only ones that use
it), ``positional`` and ``aliases``. A part may have ``without``: fields that are not options.
"""

from __future__ import annotations

import inspect
import re
import shlex
import types
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from operator import attrgetter
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from ueo_fast.finetune.files.records import fitting

Config = TypeVar("Config")

GROUPS = ("data", "model", "method", "training", "speed", "output")
"""The headings of ``--help``, in this order."""


@dataclass(frozen=True)
class Option:
    """Something that a user can set.

    Attributes:
        name: in files of options; the flag is the same with hyphens.
        path: where the value is in the dataclass, e.g. ``training.epochs``.
        hint: its type, as declared.
        kind: ``str``, ``int``, ``float``, ``bool``, or the words to choose from.
        optional: ``None`` is a value as well.
        many: takes several values, as a tuple.
        default: its value when not given; ``dataclasses.MISSING`` if it is required.
        help: what it is for.
        group: its heading in ``--help``.
        metadata: of the field.
    """

    name: str
    path: str
    hint: Any
    kind: type | tuple[str, ...]
    optional: bool
    many: bool
    default: Any
    help: str
    group: str
    metadata: Mapping[str, Any]

    @property
    def required(self) -> bool:
        return self.default is MISSING


def options_of(config: type[Any]) -> dict[str, Option]:
    """The options of a dataclass and its parts, by name."""
    hints, texts = get_type_hints(config), _documented(config)
    found: dict[str, Option] = {}
    for item in fields(config):
        hint = hints[item.name]
        if is_dataclass(hint):
            for inner in options_of(cast("type[Any]", hint)).values():
                if inner.path not in item.metadata.get("without", ()):
                    path, default = f"{item.name}.{inner.path}", getattr(item.default, inner.path)
                    group = inner.group or item.name
                    found[inner.name] = replace(inner, path=path, default=default, group=group)
            continue
        many, optional = get_origin(hint) is tuple, get_origin(hint) in (Union, types.UnionType)
        kinds = get_args(hint) if many or optional else (hint,)
        (kind,) = {kind for kind in kinds if kind not in (type(None), Ellipsis)}
        name = item.metadata.get("flag", item.name)
        found[name] = Option(
            name,
            item.name,
            hint,
            get_args(kind) if get_origin(kind) is Literal else kind,
            optional,
            many,
            item.default,
            texts.get(item.name, ""),  # without docstrings (python -OO) there is none
            item.metadata.get("group", ""),
            item.metadata,
        )
    return found


def _documented(kind: type[Any]) -> dict[str, str]:
    """The entries of the ``Attributes`` sections of a class and its bases."""
    found = {}
    for base in reversed(kind.__mro__):
        section = inspect.cleandoc(base.__doc__ or "").partition("Attributes:\n")[2]
        (section, *_) = re.split(r"\n(?=\S)", section, maxsplit=1)
        for name, text in re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", section, re.MULTILINE):
            found[name] = " ".join(text.replace("``", "").split()).removesuffix(".")
    return found


def flat(config: Any, *, without: tuple[str, ...] = ()) -> dict[str, Any]:
    """The values of all options by name, as ``config.json`` has them; tuples become lists."""
    values = {
        option.name: attrgetter(option.path)(config)
        for option in options_of(type(config)).values()
        if option.name not in without
    }
    return {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}


def build(config: type[Config], values: Mapping[str, Any]) -> Config:
    """The inverse of :func:`flat`; an option that is not there has its default.

    Raises:
        TypeError, ValueError: what the dataclass or one of its parts refuses.
    """
    options = options_of(config)
    given: dict[str, Any] = {}
    parts: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        part, _, inner = options[name].path.rpartition(".")
        (parts.setdefault(part, {}) if part else given)[inner] = value
    try:
        for item in fields(cast("Any", config)):
            if item.name in parts:
                given[item.name] = replace(cast("Any", item.default), **parts[item.name])
        return config(**given)
    except ValueError as error:  # which begins with the name of a field
        names = {option.path.rpartition(".")[2]: option.name for option in options.values()}
        text = re.sub(r"^\w+", lambda word: names.get(word[0], word[0]), str(error))
        raise ValueError(text) from error


def rebuild(
    config: type[Config], *, without: tuple[str, ...] = ()
) -> Callable[[dict[str, Any]], Config]:
    """A converter of a JSON object that :func:`flat` made, e.g. for ``RunFolder.read_json``.

    It raises ``KeyError``, ``TypeError`` or ``ValueError`` for an option that is missing, unknown,
    or has a value that it cannot have.
    """

    def convert(values: dict[str, Any]) -> Config:
        options = {n: o for n, o in options_of(config).items() if n not in without}
        for name in sorted(values.keys() - options.keys()):
            raise ValueError(
                f"{name!r} is not an option of this version of ueo_fast (environment.json "
                "next to it says which version wrote it)"
            )
        for name in sorted(options.keys() - values.keys()):
            raise KeyError(name)
        return build(config, {n: fitting(o.hint, values[n], n) for n, o in options.items()})

    return convert


def shortest_command(command: str, config: Any, *, without: tuple[str, ...]) -> str:
    """The command line ``ueo-fast COMMAND`` with the options that differ from their defaults."""
    words = ["ueo-fast", command]
    for option in options_of(type(config)).values():
        value = attrgetter(option.path)(config)
        if option.name not in without and value != option.default:
            values = value if option.many else (value,)
            words.append("--" + option.name.replace("_", "-"))
            words += [str(v).lower() if isinstance(v, bool) else str(v) for v in values]
    return shlex.join(words)
