"""The table of scores as a file: CSV or Parquet, by its extension."""

from __future__ import annotations

import contextlib
import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from ueo_fast.finetune.data.names import printable
from ueo_fast.finetune.files.atomic import atomic_file

FORMATS = (".csv", ".parquet")

ROWS = 1 << 16
"""Rows of a Parquet row group, and of a block of CSV lines."""


@dataclass(frozen=True)
class ScoreRows:
    """B rows of the table.

    Attributes:
        images: names of the images as the user knows them, valid Unicode.
        paths: where the images lie.
        classes: (B, k) integer, position in the list of classes, the most probable first.
        probabilities: (B, k) float32.
        scores: (B,) float64, MCM.
        known: (B,) bool; ``None`` where there is no threshold.
        labels: what the data says about the image, or ``None``.
    """

    images: Sequence[str]
    paths: Sequence[str]
    classes: NDArray[np.int32]
    probabilities: NDArray[np.float32]
    scores: NDArray[np.float64]
    known: NDArray[np.bool_] | None
    labels: Sequence[str | None]


class Scales(NamedTuple):
    """What multiplied the cosines in the softmax of each kind of probability: the inverse of its
    temperature. It stands in every row, as the two kinds cannot be compared.

    Attributes:
        probability_scale: of ``probability_1``, ...; the model's own.
        mcm_scale: of ``mcm``.
    """

    probability_scale: float
    mcm_scale: float


class ScoreWriter(Protocol):
    """Takes the table block by block."""

    def write(self, rows: ScoreRows) -> None:
        """Add rows."""


def column_names(top_k: int) -> list[str]:
    """``image, path, class_1, probability_1, ..., mcm, known, label``, and the scales of
    :class:`Scales`."""
    pairs = [f"{what}_{i + 1}" for i in range(top_k) for what in ("class", "probability")]
    return ["image", "path", *pairs, "mcm", "known", "label", *Scales._fields]


def check_output(out: Path, *, overwrite: bool) -> None:
    """Whether a table can be written to ``out``, before hours are spent on it.

    Raises:
        ValueError: another extension than ``.csv`` and ``.parquet``.
        FileExistsError: there is such a file and ``overwrite`` is false, or it is a folder.
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
    """Where the images are listed that could not be read: ``scores.csv.unreadable.csv``, so that
    ``scores.parquet`` beside it has a list of its own."""
    return out.with_name(f"{out.name}.unreadable.csv")


@contextlib.contextmanager
def score_writer(
    out: Path, class_names: Sequence[str], top_k: int, scales: Scales
) -> Iterator[ScoreWriter]:
    """A writer whose file takes the place of ``out`` when the block ends without an error.

    Text is UTF-8 in both formats. A path whose bytes are no UTF-8 is written with these bytes as
    ``\\xNN``, because neither format can hold them.

    CSV is RFC 4180: a header, commas, CRLF, quotes around what needs them. Every number is written
    with as many digits as it takes to read the same number again; ``known`` is ``true`` or
    ``false``; what is missing is empty. A name such as ``=1+1.jpg`` is written as it is, so that it
    stays the name of a file: a spreadsheet program may take it for a formula, so import the file
    there with its columns as text. Parquet has the same columns with types: strings, float32
    probabilities, float64 ``mcm``, boolean ``known``; missing is null.

    Args:
        out: as checked by :func:`check_output`.
        class_names: of the known classes.
        top_k: k, the number of classes per row.
        scales: the same in each row.

    Raises:
        OSError: the file cannot be written; what was there before is kept.
    """
    names = np.array(list(class_names), dtype=object)
    with atomic_file(out) as file:
        if out.suffix.lower() == ".csv":
            with csv_file(file) as table:
                yield _CsvWriter(table, names, top_k, scales)
        else:
            with contextlib.closing(_ParquetWriter(file, names, top_k, scales)) as writer:
                yield writer


@contextlib.contextmanager
def csv_file(file: IO[bytes]) -> Iterator[io.TextIOWrapper]:
    """``file`` as the csv module wants it; still open afterwards, unlike with TextIOWrapper."""
    table = io.TextIOWrapper(file, encoding="utf-8", newline="")
    try:
        yield table
    finally:
        table.detach()  # flushes


class _CsvWriter:
    def __init__(
        self,
        table: io.TextIOWrapper,
        class_names: NDArray[np.object_],
        k: int,
        scales: Scales,
    ) -> None:
        self._writer = csv.writer(table)
        self._scales = scales
        self._class_names = class_names
        self._writer.writerow(column_names(k))

    def write(self, rows: ScoreRows) -> None:
        """Add rows."""
        names = self._class_names[rows.classes].T
        # str of a float32 is its shortest form; the float of it would have 17 digits.
        probabilities = rows.probabilities.astype(str).T
        pairs = [column for pair in zip(names, probabilities, strict=True) for column in pair]
        known = [""] * len(rows.images)
        if rows.known is not None:
            known = ["true" if value else "false" for value in rows.known]
        self._writer.writerows(
            zip(
                rows.images,
                map(printable, rows.paths),
                *pairs,
                rows.scores.tolist(),
                known,
                ["" if label is None else label for label in rows.labels],
                *([scale] * len(rows.images) for scale in self._scales),
                strict=True,
            )
        )


class _ParquetWriter:
    def __init__(
        self, file: BinaryIO, class_names: NDArray[np.object_], k: int, scales: Scales
    ) -> None:
        self._scales = scales
        self._pa, parquet = _require_pyarrow()
        self._class_names = class_names
        pa = self._pa
        types = {
            **{f"probability_{i + 1}": pa.float32() for i in range(k)},
            **dict.fromkeys(("mcm", *Scales._fields), pa.float64()),
            "known": pa.bool_(),
        }
        self._schema = pa.schema([(name, types.get(name, pa.string())) for name in column_names(k)])
        self._table = parquet.ParquetWriter(file, self._schema, compression="zstd")

    def write(self, rows: ScoreRows) -> None:
        """Add rows."""
        names = self._class_names[rows.classes].T
        probabilities = np.ascontiguousarray(rows.probabilities.T)
        columns = [
            rows.images,
            list(map(printable, rows.paths)),
            *(column for pair in zip(names, probabilities, strict=True) for column in pair),
            np.ascontiguousarray(rows.scores),
            [None] * len(rows.images) if rows.known is None else rows.known,
            rows.labels,
            *([scale] * len(rows.images) for scale in self._scales),
        ]
        arrays = [
            self._pa.array(column, field.type)
            for column, field in zip(columns, self._schema, strict=True)
        ]
        table = self._pa.Table.from_arrays(arrays, schema=self._schema)
        self._table.write_table(table, row_group_size=ROWS)

    def close(self) -> None:
        """Write the footer; the file stays open."""
        self._table.close()


def _require_pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(
            "a .parquet file needs pyarrow: pip install pyarrow, or choose a name that ends in .csv"
        ) from error
    return pyarrow, pyarrow.parquet
