"""The table of scores and the list of unreadable images, as files."""

from __future__ import annotations

import csv
import dataclasses
import os
import resource
import sys
from collections.abc import Iterator

import numpy as np
import pytest

from ueo_fast.finetune.data.image_list import ImageList
from ueo_fast.finetune.scoring import score_table
from ueo_fast.finetune.scoring.score_table import (
    Scales,
    ScoreTable,
    check_output,
    prepare_folder,
    row_type,
    unreadable_path,
    write_table,
)

SCALES = Scales(probability_scale=100.00000762939453, mcm_scale=1.0)
CLASSES = ("Käse", 'quote " and, comma', "猫")
NAMES = ("a,b.png", "line\nbreak", "carriage\rreturn", "=HYPERLINK(1)", "é\u2028", " lead", "")
LABELS = ("Käse", "mauve", None, "猫", 7, None, "Käse", None)


def table_of(names: tuple[str, ...], paths: tuple[str, ...] | None = None) -> ScoreTable:
    """All images have a score; of :data:`LABELS` those count that are a class."""
    count = len(names)
    generator = np.random.default_rng(count)
    rows = np.empty(count, row_type(2))
    rows["position"] = np.arange(count)
    rows["score"] = 1 / 3 + generator.random(count) * 1e-9
    rows["classes"] = [generator.permutation(3)[:2] for _ in names]
    rows["probabilities"] = generator.random((count, 2), dtype=np.float32)
    labels = tuple(LABELS[i % len(LABELS)] for i in range(count))
    return ScoreTable(
        images=ImageList(names if paths is None else paths, names, labels),
        class_names=CLASSES,
        rows=rows,
        failures=[],
        known=np.arange(count) % 2 == 0,
        labels=np.array([CLASSES.index(x) if x in CLASSES else -1 for x in labels]),
        scales=SCALES,
    )


def read_csv(path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_csv_gives_back_every_name_and_every_digit(tmp_path, monkeypatch):
    monkeypatch.setattr(score_table, "ROWS", 3)
    out, table = tmp_path / "s.csv", table_of(NAMES)
    assert write_table(out, table) is None
    rows = read_csv(out)
    assert [row["image"] for row in rows] == [*NAMES]
    assert [float(row["mcm"]) for row in rows] == table.rows["score"].tolist()
    for column in (0, 1):
        read = [np.float32(row[f"probability_{column + 1}"]) for row in rows]
        assert read == table.rows["probabilities"][:, column].tolist()
        names = [CLASSES[position] for position in table.rows["classes"][:, column]]
        assert [row[f"class_{column + 1}"] for row in rows] == names
    assert [row["known"] for row in rows] == ["true", "false"] * 3 + ["true"]
    assert [row["label"] for row in rows] == ["Käse", "mauve", "", "猫", "7", "", "Käse"]
    scales = {(float(row["probability_scale"]), float(row["mcm_scale"])) for row in rows}
    assert scales == {SCALES}
    assert out.read_bytes().startswith(b"image,path,class_1,probability_1,class_2")
    assert list(tmp_path.iterdir()) == [out]


def test_parquet_gives_back_every_name_in_row_groups(tmp_path, monkeypatch):
    parquet = pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr(score_table, "ROWS", 5)
    out, expected = tmp_path / "s.PARQUET", table_of(NAMES)
    write_table(out, expected)
    file = parquet.ParquetFile(out)
    assert [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)] == [5, 2]
    table = file.read()
    assert table.column("image").to_pylist() == [*NAMES]
    assert table.column("mcm").to_pylist() == expected.rows["score"].tolist()
    assert table.column("known").to_pylist()[-2:] == [False, True]
    assert table.column("label").to_pylist()[:5] == ["Käse", "mauve", None, "猫", "7"]
    for name, scale in SCALES._asdict().items():
        assert set(table.column(name).to_pylist()) == {scale}
    chosen = [CLASSES[position] for position in expected.rows["classes"][:, 1]]
    assert table.column("class_2").to_pylist() == chosen


@pytest.mark.parametrize("extension", ["csv", "parquet"])
def test_without_threshold_and_labels_the_columns_are_empty(tmp_path, extension):
    out = tmp_path / f"s.{extension}"
    table = dataclasses.replace(table_of(NAMES), known=None, labels=None)
    if extension == "csv":
        write_table(out, table)
        assert {(row["known"], row["label"]) for row in read_csv(out)} == {("", "")}
    else:
        parquet = pytest.importorskip("pyarrow.parquet")
        write_table(out, table)
        read = parquet.read_table(out)
        for name in ("known", "label"):
            assert read.column(name).to_pylist() == [None] * len(NAMES)


@pytest.mark.parametrize("extension", ["csv", "parquet"])
def test_a_path_that_is_no_utf8_is_shown_by_its_bytes(tmp_path, extension):
    table = table_of(("a",), (os.fsdecode(b"folder/caf\xe9.png"),))
    out = tmp_path / f"s.{extension}"
    if extension == "csv":
        write_table(out, table)
        assert read_csv(out)[0]["path"] == "folder/caf\\xe9.png"
    else:
        parquet = pytest.importorskip("pyarrow.parquet")
        write_table(out, table)
        assert parquet.read_table(out).column("path").to_pylist() == ["folder/caf\\xe9.png"]


def test_every_unreadable_image_is_listed(tmp_path):
    out = tmp_path / "s.csv"
    table = table_of(NAMES, ("folder/caf\udce9", *NAMES[1:]))
    failures = [(i, f'reason "{i}"') for i in range(6)]
    some = dataclasses.replace(table, rows=table.rows[6:], known=None, failures=failures)
    assert write_table(out, some) == unreadable_path(out)
    assert [row["image"] for row in read_csv(out)] == [NAMES[6]]
    listed = read_csv(unreadable_path(out))
    assert [(row["image"], row["reason"]) for row in listed] == [
        (NAMES[i], reason) for i, reason in failures
    ]
    assert listed[0]["path"] == "folder/caf\\xe9"
    # A table of images that can all be read has no list, nor that of an earlier table.
    assert write_table(out, table) is None
    assert list(tmp_path.iterdir()) == [out]


def test_two_tables_have_a_list_of_unreadable_images_each(tmp_path):
    assert unreadable_path(tmp_path / "scores.csv").name == "scores.csv.unreadable.csv"
    assert unreadable_path(tmp_path / "scores.parquet").name == "scores.parquet.unreadable.csv"


@pytest.mark.parametrize("extension", ["csv", "parquet"])
def test_an_error_on_the_way_leaves_the_old_files(tmp_path, monkeypatch, extension):
    if extension == "parquet":
        pytest.importorskip("pyarrow")
    out = tmp_path / f"s.{extension}"
    table = table_of(NAMES)
    write_table(out, dataclasses.replace(table, failures=[(0, "truncated")]))
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert len(before) == 2

    class HalfWay(tuple):
        def __getitem__(self, position):
            if position == 5:
                raise RuntimeError("half way")
            return super().__getitem__(position)

    images = ImageList(NAMES, HalfWay(NAMES), None)
    monkeypatch.setattr(score_table, "ROWS", 2)
    with pytest.raises(RuntimeError, match="half way"):
        write_table(out, dataclasses.replace(table, images=images, labels=None))
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.fixture
def small_files() -> Iterator[None]:
    """The system refuses to let any file grow beyond 4096 bytes, like a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(("images", "reason"), [(100, 10), (10, 5000)])
def test_a_full_disk_is_named_and_leaves_the_old_files(tmp_path, small_files, images, reason):
    out = tmp_path / "s.csv"
    write_table(out, dataclasses.replace(table_of(NAMES), failures=[(0, "truncated")]))
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    table = table_of(tuple(f"{i}.png" for i in range(images)))
    with pytest.raises(OSError, match=r"File too large.*what was there before is kept") as caught:
        write_table(out, dataclasses.replace(table, failures=[(1, "x" * reason)]))
    full = out if images == 100 else unreadable_path(out)
    assert caught.value.filename == str(full)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_folder_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    prepare_folder(tmp_path / "new" / "folder")
    assert list((tmp_path / "new" / "folder").iterdir()) == []

    def refused(*, dir):  # root may write anywhere
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(score_table.tempfile, "TemporaryFile", refused)
    with pytest.raises(PermissionError, match=r"could not be written \(Permission denied\)") as e:
        prepare_folder(tmp_path)
    assert e.value.filename == str(tmp_path)


def test_parquet_without_pyarrow_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"pip install pyarrow, or choose .*\.csv"):
        check_output(tmp_path / "s.parquet", overwrite=False)
    check_output(tmp_path / "s.csv", overwrite=False)
