"""JSON of a run folder, read as something that anybody may have changed or damaged.

A file is a regular file of bounded size, holds an object (or one per line), and each value has the
type that a dataclass gives to its key; what does not is an error that names file, line and key.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, BinaryIO, Literal, NoReturn, TypeVar, Union, cast, get_args, get_origin
from typing import get_type_hints as type_hints

T = TypeVar("T")

MOST_BYTES = 2**30
"""Of a JSON file; the lists of some million images have some hundred MB."""
LONGEST_LINE = 2**24
"""Bytes; an epoch with a histogram of 20,000 classes has a hundredth of that."""
_MOST_INT = 2**63 - 1


class BrokenFileError(ValueError):
    """A file of a run that is not what it should be; the message names it, the line and the key."""

    def __init__(self, path: Path, what: str, line: int | None = None) -> None:
        where = path if line is None else f"{path}, line {line}"
        super().__init__(f"{where}: {what}; the file was changed or damaged: restore it")


def open_regular(path: Path) -> BinaryIO:
    """Open a file to read, and nothing else: a pipe would wait, and a device may have no end.

    Raises:
        BrokenFileError: it is a folder, a pipe, a socket or a device.
        OSError: it cannot be opened.
    """
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | _BINARY)
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return open(descriptor, "rb")
    os.close(descriptor)
    kind = "a folder" if stat.S_ISDIR(mode) else "a pipe, a socket or a device"
    raise BrokenFileError(path, f"it is {kind}, expected a file")


_BINARY = getattr(os, "O_BINARY", 0)


def bounded_lines(path: Path, file: BinaryIO) -> Iterator[bytes]:
    """The lines of a file, with their line breaks.

    Raises:
        BrokenFileError: one is longer than :data:`LONGEST_LINE`.
    """
    number = 0
    while line := file.readline(LONGEST_LINE + 1):
        number += 1
        if len(line) > LONGEST_LINE:
            raise BrokenFileError(path, f"it has more than {LONGEST_LINE:,} bytes", number)
        yield line


def read_object(path: Path, convert: Callable[[dict[str, Any]], T]) -> T:
    """A file that holds one JSON object.

    Args:
        path: of the file.
        convert: from the object; what it raises as KeyError, TypeError or ValueError becomes part
            of the message.

    Raises:
        BrokenFileError: it holds something else, or ``convert`` refuses it.
        OSError: it cannot be read; ``FileNotFoundError`` where there is none.
    """
    with open_regular(path) as file:
        data = file.read(MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        raise BrokenFileError(path, f"it has more than {MOST_BYTES:,} bytes")
    return _converted(path, data, convert)


def read_lines(path: Path, convert: Callable[[dict[str, Any]], T]) -> list[T]:
    """A file that holds one JSON object per line; arguments and errors as :func:`read_object`.

    A last line without its line break was cut off by a crash and is left out.
    """
    with open_regular(path) as file:
        return [
            _converted(path, line, convert, number)
            for number, line in enumerate(bounded_lines(path, file), start=1)
            if line.endswith(b"\n")
        ]


def _converted(
    path: Path, data: bytes, convert: Callable[[dict[str, Any]], T], line: int | None = None
) -> T:
    try:
        value = json.loads(data.decode("utf-8"), parse_constant=_no_number)
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


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a JSON number")


def as_record(kind: type[T], *, all_of: Iterable[str] | None = None) -> Callable[[Any], T]:
    """A converter for :func:`read_object`: to a dataclass, each field of the type that it has.

    Known are str, bool, int (of 64 bits), float (finite; an int will do), ``None``, ``Literal``,
    unions, tuples, lists and dicts of these, dataclasses, and ``Any``. A field that has a default
    may be absent, and what the object has besides the fields is left out.

    Args:
        kind: the dataclass.
        all_of: names of fields; the object must have all of these and nothing else.
    """
    wanted = None if all_of is None else set(all_of)

    def convert(value: Any) -> T:
        if wanted is not None and (unknown := sorted(value.keys() - wanted)):
            raise ValueError(
                f"{unknown[0]!r} is not an option of this version of ueo_fast (environment.json "
                "next to it says which version wrote it)"
            )
        if wanted is not None and (missing := sorted(wanted - value.keys())):
            raise KeyError(missing[0])
        return _record(kind, value, "")

    return convert


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
    hints = type_hints(kind)
    missing = dataclasses.MISSING
    return [
        (field.name, hints[field.name], field.default is field.default_factory is missing)
        for field in dataclasses.fields(kind)
    ]


def fitting(hint: Any, value: Any, key: str) -> Any:
    """``value`` as the type ``hint``, as :func:`as_record` knows it.

    Raises:
        TypeError, ValueError: it is of another type, or out of range; the message names ``key``.
    """
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if dataclasses.is_dataclass(hint):
        return _record(hint, value, key)  # type: ignore[arg-type]
    if origin in (Union, UnionType):
        return _one_of(arguments, value, key)
    if origin is Literal:
        if value not in arguments:
            raise ValueError(f"{key} is {_brief(value)}, expected one of {_listed(arguments)}")
        return value
    if origin in (tuple, list):
        if not isinstance(value, list):
            raise _unfit(value, key)
        return origin(fitting(arguments[0], one, key) for one in value)
    if origin in (dict, Mapping):
        if not isinstance(value, dict):
            raise _unfit(value, key)
        return {name: fitting(arguments[1], one, key) for name, one in value.items()}
    if hint is float and type(value) in (int, float):
        if not abs(value) < math.inf or abs(value) > 1e308:
            raise ValueError(f"{key} is {_brief(value)}, not a finite number")
        return float(value)
    if type(value) is not hint:  # a bool is no int
        raise _unfit(value, key)
    if hint is int and not -_MOST_INT <= value <= _MOST_INT:
        raise ValueError(f"{key} is {_brief(value)}, which is out of range")
    return value


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


def _listed(values: Iterable[Any]) -> str:
    return ", ".join(map(str, values))


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."
