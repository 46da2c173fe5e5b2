"""The table of scores as a file, and the file that predictions wait in."""

from __future__ import annotations

import csv
import os
import sys

import numpy as np
import pytest
import torch

from ueo_fast.finetune.data.image_list import ImageList
from ueo_fast.finetune.evaluation.predict import Failure
from ueo_fast.finetune.scoring.score_spool import ScoreSpool
from ueo_fast.finetune.scoring.score_unreadable import UnreadableList
from ueo_fast.finetune.scoring.score_writer import (
    Scales,
    ScoreRows,
    check_output,
    score_writer,
    unreadable_path,
)

SCALES = Scales(probability_scale=100.00000762939453, mcm_scale=1.0)
CLASSES = ["Käse", 'quote " and, comma', "猫"]
NAMES = ["a,b.png", "line\nbreak", "carriage\rreturn", "=HYPERLINK(1)", "é\u2028", " lead", ""]


def rows_of(names: list[str], paths: list[str] | None = None, known: bool = True) -> ScoreRows:
    count = len(names)
    generator = np.random.default_rng(count)
    return ScoreRows(
        images=names,
        paths=names if paths is None else paths,
        classes=np.stack([generator.permutation(3)[:2] for _ in names]).astype(np.int32),
        probabilities=generator.random((count, 2), dtype=np.float32),
        scores=1 / 3 + generator.random(count) * 1e-9,
        known=np.arange(count) % 2 == 0 if known else None,
        labels=[None if i % 3 else "Käse" for i in range(count)],
    )


def write(out, *blocks: ScoreRows) -> None:
    check_output(out, overwrite=False)
    with score_writer(out, CLASSES, 2, SCALES) as writer:
        for block in blocks:
            writer.write(block)


def read_csv(path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_csv_gives_back_every_name_and_every_digit(tmp_path):
    first, second = rows_of(NAMES), rows_of(["last"], known=False)
    write(tmp_path / "s.csv", first, second)
    rows = read_csv(tmp_path / "s.csv")
    assert [row["image"] for row in rows] == [*NAMES, "last"]
    assert [float(row["mcm"]) for row in rows[:-1]] == first.scores.tolist()
    for column in (0, 1):
        read = [np.float32(row[f"probability_{column + 1}"]) for row in rows[:-1]]
        assert read == first.probabilities[:, column].tolist()
        names = [CLASSES[position] for position in first.classes[:, column]]
        assert [row[f"class_{column + 1}"] for row in rows[:-1]] == names
    assert [row["known"] for row in rows] == ["true", "false"] * 3 + ["true", ""]
    assert [row["label"] for row in rows[:4]] == ["Käse", "", "", "Käse"]
    scales = {(float(row["probability_scale"]), float(row["mcm_scale"])) for row in rows}
    assert scales == {SCALES}
    assert (tmp_path / "s.csv").read_bytes().startswith(b"image,path,class_1,probability_1,class_2")


def test_parquet_gives_back_every_name_in_row_groups(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    blocks = [rows_of(NAMES), rows_of(["last"], known=False)]
    write(tmp_path / "s.PARQUET", *blocks)
    file = parquet.ParquetFile(tmp_path / "s.PARQUET")
    assert [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)] == [7, 1]
    table = file.read()
    assert table.column("image").to_pylist() == [*NAMES, "last"]
    assert table.column("mcm").to_pylist()[:-1] == blocks[0].scores.tolist()
    assert table.column("known").to_pylist()[-2:] == [True, None]
    assert table.column("label").to_pylist()[:4] == ["Käse", None, None, "Käse"]
    for name, scale in SCALES._asdict().items():
        assert set(table.column(name).to_pylist()) == {scale}
    chosen = [CLASSES[position] for position in blocks[0].classes[:, 1]]
    assert table.column("class_2").to_pylist()[:-1] == chosen


@pytest.mark.parametrize("extension", ["csv", "parquet"])
def test_a_path_that_is_no_utf8_is_shown_by_its_bytes(tmp_path, extension):
    path = os.fsdecode(b"folder/caf\xe9.png")
    out = tmp_path / f"s.{extension}"
    if extension == "csv":
        write(out, rows_of(["a"], [path]))
        assert read_csv(out)[0]["path"] == "folder/caf\\xe9.png"
    else:
        parquet = pytest.importorskip("pyarrow.parquet")
        write(out, rows_of(["a"], [path]))
        assert parquet.read_table(out).column("path").to_pylist() == ["folder/caf\\xe9.png"]


@pytest.mark.parametrize("extension", ["csv", "parquet"])
def test_an_error_on_the_way_leaves_the_old_table(tmp_path, extension):
    if extension == "parquet":
        pytest.importorskip("pyarrow")
    out = tmp_path / f"s.{extension}"
    write(out, rows_of(NAMES))
    before = out.read_bytes()
    with (  # noqa: PT012
        pytest.raises(RuntimeError, match="half way"),
        score_writer(out, CLASSES, 2, SCALES) as writer,
    ):
        writer.write(rows_of(["other"]))
        raise RuntimeError("half way")
    assert out.read_bytes() == before
    assert list(tmp_path.iterdir()) == [out]


def test_parquet_without_pyarrow_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"pip install pyarrow, or choose .*\.csv"):
        check_output(tmp_path / "s.parquet", overwrite=False)
    check_output(tmp_path / "s.csv", overwrite=False)


def test_spool_gives_back_rows_in_order_and_scores_sorted(tmp_path):
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(1000, generator=generator, dtype=torch.float64)
    classes = torch.randint(0, 9, (1000, 2), generator=generator)
    probabilities = torch.rand(1000, 2, generator=generator)
    with ScoreSpool(tmp_path, 2) as spool:
        for rows in torch.arange(1000).split(300):
            spool.append(rows * 3, scores[rows], classes[rows], probabilities[rows])
        assert len(spool) == 1000
        blocks = list(spool.blocks(256))
        assert [len(block) for block in blocks] == [256, 256, 256, 232]
        read = np.concatenate(blocks)
        assert (read["position"] == np.arange(1000) * 3).all()
        assert (read["score"] == scores.numpy()).all()
        assert (read["classes"] == classes.numpy()).all()
        assert (read["probabilities"] == probabilities.numpy()).all()
        ordered = spool.ordered_scores()
        assert isinstance(ordered, np.memmap)
        assert (ordered == np.sort(scores.numpy())).all()
        some = spool.ordered_scores(lambda positions: positions % 2 == 0)
        assert (some == np.sort(scores[::2].numpy())).all()
        assert len(spool.ordered_scores(lambda positions: positions < 0)) == 0
        assert (np.concatenate(list(spool.blocks(1000)))["score"] == scores.numpy()).all()
    assert list(tmp_path.iterdir()) == []


def test_spool_names_the_folder_that_is_full(tmp_path, monkeypatch):
    with ScoreSpool(tmp_path, 1) as spool:

        class Full:
            def write(self, data: bytes) -> None:
                raise OSError(28, "No space left on device")

        monkeypatch.setattr(spool, "_file", Full())
        one = torch.zeros(1, 1)
        with pytest.raises(OSError, match="No space left on device") as caught:
            spool.append(torch.zeros(1).long(), one[0].double(), one.long(), one)
    assert caught.value.filename == str(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        ScoreSpool(tmp_path / "nowhere", 1)


def test_two_tables_have_a_list_of_unreadable_images_each(tmp_path):
    csv_list = unreadable_path(tmp_path / "scores.csv")
    csv_list.touch()
    assert csv_list.name == "scores.csv.unreadable.csv"
    assert unreadable_path(tmp_path / "scores.parquet") != csv_list


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
def test_a_full_disk_is_told_with_the_folder(tmp_path, monkeypatch):
    images = ImageList(("a.jpg",), ("a",))
    with UnreadableList(images, tmp_path, strict=False) as unreadable:
        monkeypatch.setattr(unreadable, "_file", open("/dev/full", "wb", buffering=0))  # noqa: SIM115
        with pytest.raises(OSError, match="No space left") as caught:
            unreadable.add([Failure(0, "broken")])
        assert caught.value.filename == str(tmp_path)
