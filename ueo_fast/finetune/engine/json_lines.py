"""JSON-lines files after a crash: what the run will say again is taken out."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ueo_fast.finetune.files.atomic import atomic_file


def truncate_json_lines(path: str | os.PathLike[str], key: str, last: int) -> int:
    """Drop the lines whose ``key`` is above ``last``, and what a crash left of a last line.

    Lines without ``key`` stay. The file is replaced atomically, and only if something is dropped.

    Args:
        path: a JSON-lines file; nothing happens where there is none.
        key: name of a number in the lines (``step``, ``epoch``).
        last: the largest that is kept.

    Returns:
        Number of lines dropped.

    Raises:
        ValueError: a line that is no JSON object, other than an unfinished last one.
        OSError: the file could not be rewritten; it is as it was.
    """
    path = Path(path)
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except FileNotFoundError:
        return 0
    kept = [
        line
        for number, line in enumerate(lines, start=1)
        if line.endswith(b"\n") and not _above(_parse(path, number, line).get(key), last)
    ]
    if len(kept) < len(lines):
        with atomic_file(path) as file:
            file.writelines(kept)
    return len(lines) - len(kept)


def _parse(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ValueError(
            f"{path}, line {number} is no JSON ({error}): mend or remove it"
        ) from error
    if not isinstance(record, dict):
        raise ValueError(f"{path}, line {number} is no JSON object: mend or remove it")
    return record


def _above(value: object, last: int) -> bool:
    return isinstance(value, int | float) and value > last
