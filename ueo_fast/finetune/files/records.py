"""JSON that anybody may have changed or damaged: read, checked against types, refused by name.

A file is a regular file of bounded size and holds an object, or one per line. Each value must have
the type that a dataclass gives to its key; the error for any other names file, line and key.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import (
    Annotated,
    Any,
    BinaryIO,
    Literal,
    NamedTuple,
    NoReturn,
    TypeVar,
    Union,
    cast,
    get_args,
    get_origin,
)
from typing import get_type_hints as type_hints

T = TypeVar("T")

MOST_BYTES = 2**30
"""Of a JSON file; the lists of some million images have some hundred MB."""
LONGEST_LINE = 2**24
"""Bytes; an epoch with a histogram of 20,000 classes has a hundredth of that."""
_MOST_INT = 2**63 - 1
_BINARY = getattr(os, "O_BINARY", 0)


class BrokenFileError(ValueError):
    """A file of a run has unusable content; the message names the file, the line and the key."""

    def __init__(self, path: Path, what: str, line: int | None = None) -> None:
        where = path if line is None else f"{path}, line {line}"
        super().__init__(f"{where}: {what}; the file was changed or damaged: restore it")


class Range(NamedTuple):
    """Limits of a number, for a dataclass's field: ``Annotated[int, Range(0, 9, "0 to 9")]``."""

    low: float
    high: float
    text: str


def _open_regular(path: Path) -> BinaryIO:
    """Open a regular file; reading a pipe would wait, and a device may have no end."""
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | _BINARY)
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return open(descriptor, "rb")
    os.close(descriptor)
    kind = "a folder" if stat.S_ISDIR(mode) else "a pipe, a socket or a device"
    raise BrokenFileError(path, f"it is {kind}, expected a file")


def read_whole(path: Path) -> bytes:
    """Read a file of at most :data:`MOST_BYTES`.

    Raises:
        BrokenFileError: it is larger, or is not a regular file.
        OSError: it cannot be read; ``FileNotFoundError`` where there is none.
    """
    with _open_regular(path) as file:
        data = file.read(MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        raise BrokenFileError(path, f"it has more than {MOST_BYTES:,} bytes")
    return data


def read_lines(path: Path) -> Iterator[bytes]:
    """Yield the lines of a file with their line breaks; errors as for :func:`read_whole`.

    Raises:
        BrokenFileError: a line is longer than :data:`LONGEST_LINE`.
    """
    number = 0
    with _open_regular(path) as file:
        while line := file.readline(LONGEST_LINE + 1):
            number += 1
            if len(line) > LONGEST_LINE:
                raise BrokenFileError(path, f"it has more than {LONGEST_LINE:,} bytes", number)
            yield line


def parse_object(path: Path, data: bytes, convert: Callable[..., T], line: int | None = None) -> T:
    """Parse one JSON object, the contents of ``path`` or of its ``line``.

    Args:
        path: of the file, for messages.
        data: the JSON.
        convert: a dataclass, which :func:`as_record` makes, or a function of the object; what that
            raises as KeyError, TypeError or ValueError becomes part of the message.
        line: its number, for messages.

    Raises:
        BrokenFileError: ``data`` is something else, or ``convert`` refuses it.
    """
    if dataclasses.is_dataclass(convert):
        convert = as_record(cast(type[T], convert))
    try:
        value = json.loads(data.decode("utf-8"), parse_constant=_refuse_constant)
        if not isinstance(value, dict):
            raise TypeError(f"holds a {type(value).__name__}, expected an object")
        return convert(value)
    except json.JSONDecodeError as error:
        raise BrokenFileError(path, error.msg, line or error.lineno) from None
    except RecursionError:
        raise BrokenFileError(path, "lists or objects are nested too deep", line) from None
    except MemoryError:
        raise BrokenFileError(path, "it does not fit into memory", line) from None
    except KeyError as error:
        raise BrokenFileError(path, f"{error} is missing", line) from None
    except (TypeError, ValueError) as error:
        raise BrokenFileError(path, str(error), line) from None


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a JSON number")


def as_record(kind: type[T]) -> Callable[[Any], T]:
    """Make a converter from an object to a dataclass, which checks the type of each field.

    Known are str, bool, int (of 64 bits), float (finite; an int will do), ``None``, ``Literal``,
    unions, tuples, lists and dicts of these, dataclasses, ``Annotated`` with a :class:`Range`, and
    ``Any``. A field that has a default may be absent; keys that are not fields are ignored.
    """
    return lambda value: _record(kind, value, "")


def _record(kind: type[T], value: Any, key: str) -> T:
    if not isinstance(value, dict):
        raise _unfit(value, key)
    given = {}
    for name, hint, required in _fields(cast(Any, kind)):
        if name in value:
            given[name] = fitting(hint, value[name], f"{key}.{name}" if key else name)
        elif required:
            raise KeyError(f"{key}.{name}" if key else name)
    return kind(**given)


@functools.cache
def _fields(kind: Any) -> list[tuple[str, Any, bool]]:
    hints = type_hints(kind, include_extras=True)
    missing = dataclasses.MISSING
    return [
        (field.name, hints[field.name], field.default is field.default_factory is missing)
        for field in dataclasses.fields(kind)
    ]


def fitting(hint: Any, value: Any, key: str) -> Any:
    """Return ``value`` as the type ``hint``, one of those that :func:`as_record` knows.

    Raises:
        TypeError, ValueError: it is of another type, or out of range; the message names ``key``.
    """
    if hint in (float, int, str, bool):  # most values: none of the tests below
        return _scalar(hint, value, key)
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if dataclasses.is_dataclass(hint):
        return _record(hint, value, key)  # type: ignore[arg-type]
    if origin in (Union, UnionType):
        return _one_of(arguments, value, key)
    if origin is Annotated:
        number, limits = fitting(arguments[0], value, key), arguments[1]
        if not limits.low <= number <= limits.high:
            raise ValueError(f"{key} is {_brief(number)}, expected {limits.text}")
        return number
    if origin is Literal:
        if value not in arguments:
            raise ValueError(
                f"{key} is {_brief(value)}, expected one of {', '.join(map(str, arguments))}"
            )
        return value
    if origin in (tuple, list):
        if not isinstance(value, list):
            raise _unfit(value, key)
        if set(map(type, value)) <= _plain(arguments[0]):  # a million paths
            return origin(value)
        return origin(fitting(arguments[0], one, key) for one in value)
    if origin in (dict, Mapping):
        if not isinstance(value, dict):
            raise _unfit(value, key)
        return {name: fitting(arguments[1], one, key) for name, one in value.items()}
    return _scalar(hint, value, key)


def _scalar(hint: Any, value: Any, key: str) -> Any:
    if hint is float and type(value) in (int, float):
        if not abs(value) < math.inf or abs(value) > 1e308:
            raise ValueError(f"{key} is {_brief(value)}, not a finite number")
        return float(value)
    if type(value) is not hint:  # a bool is not an int
        raise _unfit(value, key)
    if hint is int and not -_MOST_INT <= value <= _MOST_INT:
        raise ValueError(f"{key} is {_brief(value)}, which is out of range")
    return value


def _plain(hint: Any) -> set[Any]:
    """The types that ``hint`` allows whatever their value."""
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    return {str, bool, NoneType}.intersection(kinds)


def _one_of(kinds: tuple[Any, ...], value: Any, key: str) -> Any:
    if value is None and NoneType in kinds:
        return None
    others = [kind for kind in kinds if kind is not NoneType]
    for kind in others[:-1]:
        with contextlib.suppress(TypeError, ValueError):
            return fitting(kind, value, key)
    return fitting(others[-1], value, key)


def _unfit(value: Any, key: str) -> TypeError:
    return TypeError(f"{key} is {_brief(value)}, of the wrong type")


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."
