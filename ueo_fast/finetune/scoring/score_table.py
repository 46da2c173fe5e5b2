"""The table of scores and the list of unreadable images, as files."""

from __future__ import annotations

import csv
import io
import itertools
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ueo_fast.finetune.data.image_list import ImageList
from ueo_fast.finetune.data.names import printable
from ueo_fast.finetune.files.atomic import atomic_file, failed_write

FORMATS = (".csv", ".parquet")

ROWS = 1 << 16
"""Rows of a Parquet row group, and of a block of CSV lines."""


class Scales(NamedTuple):
    """The inverse temperatures of the two kinds of probability: what multiplied the cosines in the
    softmax. They are in every row of the table because the two kinds cannot be compared.

    Attributes:
        probability_scale: of ``probability_1``, ...; the model's own.
        mcm_scale: of ``mcm``.
    """

    probability_scale: float
    mcm_scale: float


@dataclass(frozen=True)
class ScoreTable:
    """The scores of N images, in memory, of which M could be read.

    Attributes:
        images: N images.
        class_names: of the C known classes.
        rows: (M,) of :func:`row_type`: one row per image that has a score.
        failures: position and reason of each other image.
        known: (M,) bool; ``None`` if there is no threshold.
        labels: (N,) int64 position in ``class_names``, -1 for unknown; ``None``: no labels.
        scales: of the two kinds of probability.
    """

    images: ImageList
    class_names: tuple[str, ...]
    rows: NDArray[Any]
    failures: Sequence[tuple[int, str]]
    known: NDArray[np.bool_] | None
    labels: NDArray[np.int64] | None
    scales: Scales

    @property
    def column_names(self) -> list[str]:
        """``image, path, class_1, probability_1, ..., mcm, known, label``, and the scales."""
        top_k = self.rows["classes"].shape[1]
        pairs = [f"{what}_{i + 1}" for i in range(top_k) for what in ("class", "probability")]
        return ["image", "path", *pairs, "mcm", "known", "label", *Scales._fields]

    def blocks(self) -> Iterator[list[Any]]:
        """The columns of at most :data:`ROWS` rows at a time, as lists or arrays."""
        names = np.array(self.class_names, dtype=object)
        for start in range(0, len(self.rows), ROWS):
            rows = self.rows[start : start + ROWS]
            positions, count = rows["position"].tolist(), len(rows)
            classes, probabilities = names[rows["classes"]].T, rows["probabilities"].T.copy()
            yield [
                [self.images.names[position] for position in positions],
                [printable(self.images.paths[position]) for position in positions],
                *itertools.chain(*zip(classes, probabilities, strict=True)),
                rows["score"].copy(),
                [None] * count if self.known is None else self.known[start : start + ROWS],
                [self._label(position) for position in positions],
                *([scale] * count for scale in self.scales),
            ]

    def _label(self, position: int) -> str | None:
        if self.labels is None:
            return None
        if self.labels[position] >= 0:
            return self.class_names[self.labels[position]]
        label = None if self.images.labels is None else self.images.labels[position]
        return None if label is None else str(label)


def row_type(top_k: int) -> np.dtype[Any]:
    """What is kept of an image: 16 + 8 k bytes, with k = ``top_k``, the most probable class first.

    A structured type with the fields ``position`` int64, ``score`` float64, ``classes`` (k,) int32
    and ``probabilities`` (k,) float32.
    """
    return np.dtype(
        [
            ("position", np.int64),
            ("score", np.float64),
            ("classes", np.int32, (top_k,)),
            ("probabilities", np.float32, (top_k,)),
        ]
    )


def check_output(out: Path, *, overwrite: bool) -> None:
    """Check whether a table can be written to ``out``, before the images are scored.

    Raises:
        ValueError: another extension than ``.csv`` and ``.parquet``.
        FileExistsError: the file exists and ``overwrite`` is false, or it is a folder.
        ImportError: Parquet without pyarrow.
    """
    if out.suffix.lower() not in FORMATS:
        raise ValueError(f"out={str(out)!r} must end in .csv or .parquet, which says the format")
    if out.is_dir():
        raise FileExistsError(f"{out} is a folder; give a file that ends in .csv or .parquet")
    for path in (out, unreadable_path(out)):
        if path.exists() and not overwrite:
            raise FileExistsError(
                f"{path} exists, and nothing is overwritten: choose another name, or --overwrite "
                "(overwrite=True)"
            )
    if out.suffix.lower() == ".parquet":
        _require_pyarrow()


def unreadable_path(out: Path) -> Path:
    """The list of images that could not be read: ``scores.csv.unreadable.csv``, so that
    ``scores.parquet`` next to it has a list of its own."""
    return out.with_name(f"{out.name}.unreadable.csv")


def prepare_folder(folder: Path) -> None:
    """Make ``folder``, and check that files can be written there, before the images are scored.

    Raises:
        OSError: it cannot be made, or is read-only; with its name.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise failed_write(folder, error) from error


def write_table(out: Path, table: ScoreTable) -> Path | None:
    """Write the table, and the list of images that could not be read; each atomically.

    Text is UTF-8 in both formats. Bytes of a path that are not UTF-8 are written as ``\\xNN``,
    because neither format can hold them.

    CSV is RFC 4180: a header, commas, CRLF, quotes around what needs them. Every number has as many
    digits as it takes to read the same number again; ``known`` is ``true`` or ``false``; a missing
    value is empty. A name such as ``=1+1.jpg`` is written as it is, so that it stays the name of a
    file. A spreadsheet program may take it for a formula, so import its column there as text.
    Parquet has the same columns with types: strings, float32 probabilities, float64 ``mcm``,
    boolean ``known``; a missing value is null.

    Args:
        out: a path that :func:`check_output` accepts. An existing file is replaced.
        table: what to write.

    Returns:
        :func:`unreadable_path`, or ``None`` if all images could be read. An older list is then
        removed, because it is about other images.

    Raises:
        OSError: a file cannot be written; an older table is kept.
    """
    unreadable = unreadable_path(out)
    with atomic_file(out) as file:
        if out.suffix.lower() == ".csv":
            _write_csv(file, table.column_names, map(_csv_rows, table.blocks()))
        else:
            _write_parquet(file, table)
        file.flush()  # a disk that is full now leaves the old list too
        if table.failures:  # before the table appears, so that no table lacks its list
            names, paths = table.images.names, table.images.paths
            rows = ((names[i], printable(paths[i]), reason) for i, reason in table.failures)
            with atomic_file(unreadable) as listed:
                _write_csv(listed, ("image", "path", "reason"), [rows])
    if table.failures:
        return unreadable
    unreadable.unlink(missing_ok=True)
    return None


def _write_csv(
    file: BinaryIO, header: Sequence[str], blocks: Iterable[Iterable[Sequence[object]]]
) -> None:
    text = io.TextIOWrapper(file, encoding="utf-8", newline="")
    try:
        writer = csv.writer(text)
        writer.writerow(header)
        for rows in blocks:
            writer.writerows(rows)
    finally:
        text.detach()  # flushes, and leaves the file open


def _csv_rows(columns: list[Any]) -> Iterator[tuple[object, ...]]:
    return zip(*map(_csv_cells, columns), strict=True)


def _csv_cells(column: Any) -> Any:
    if not isinstance(column, np.ndarray) or column.dtype == object:
        return column
    if column.dtype == np.bool_:
        return np.where(column, "true", "false")
    # The shortest form of a float32; as a Python float it would have 17 digits.
    return column.astype(str) if column.dtype == np.float32 else column.tolist()


def _write_parquet(file: BinaryIO, table: ScoreTable) -> None:
    pa, parquet = _require_pyarrow()
    types = dict.fromkeys(table.column_names, pa.string())
    types |= {name: pa.float32() for name in types if name.startswith("probability_")}
    types |= dict.fromkeys(("mcm", *Scales._fields), pa.float64()) | {"known": pa.bool_()}
    schema = pa.schema(list(types.items()))
    with parquet.ParquetWriter(file, schema, compression="zstd") as writer:
        for columns in table.blocks():
            arrays = [
                pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)
            ]
            block = pa.Table.from_arrays(arrays, schema=schema)
            writer.write_table(block, row_group_size=ROWS)


def _require_pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(
            "a .parquet file needs pyarrow: pip install pyarrow, or choose a name that ends in .csv"
        ) from error
    return pyarrow, pyarrow.parquet
