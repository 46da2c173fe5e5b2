"""What the commands say of the user's images: left out, linked, oddly named, labelled."""

from __future__ import annotations

import json
import shutil

import pytest
from commands_place import finetune, make_place, rows
from photo_folder import CORRUPT, KNOWN

from ueo_fast.cli import main
from ueo_fast.finetune.data import decode

ESCAPE = "zero/\x1b[31mred\x07.png"

pytestmark = pytest.mark.usefixtures("without_charts")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model, photographs, class names and a finished run of two epochs."""
    return make_place(tmp_path_factory.mktemp("place"))


@pytest.fixture
def photos(place, tmp_path):
    """Some of the photographs, to be added to."""
    for name in ("zero", "one", "six"):
        shutil.copytree(place / "photos" / name, tmp_path / "photos" / name)
    return tmp_path / "photos"


def zero_shot(place, out, photos, *more):
    """The exit status of a run that learns nothing."""
    words = ["--method", "zeroshot", "--data", str(photos), "--out", str(out), *more]
    return finetune(place, "", *words)


def test_nothing_is_left_out_without_a_word(place, photos, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(decode, "formats", lambda: ("JPEG", "PNG", "GIF"))  # no pillow-heif
    (photos / "zero" / "IMG_1.HEIC").write_bytes(b"\0\0\0\x18ftypheic")
    (photos / "one" / "IMG_2.CR2").write_bytes(b"II*\0")
    (photos / "one" / "film.MOV").touch()
    (photos / "one" / "@eaDir").mkdir()
    shutil.copy(next(photos.glob("six/*.png")), photos / "one" / "@eaDir" / "thumbnail.png")
    (photos / "linked").symlink_to(place / "photos" / "two")
    assert zero_shot(place, tmp_path / "run", photos) == 0
    printed = capsys.readouterr().out
    problem = json.loads((tmp_path / "run" / "problem.json").read_text())
    assert [one["image"] for one in problem["skipped"]] == ["one/IMG_2.CR2", "zero/IMG_1.HEIC"]
    assert "HEIC needs pillow-heif" in problem["skipped"][1]["reason"]
    outside = "link that leads out of the folder (--follow-links follows it)"
    left_out = {"hidden": 1, ".txt": 1, ".mov": 1, "in @eaDir/": 1, outside: 1}
    assert problem["left_out"] == {"train": left_out}
    assert problem["followed"] == {"train": []}
    assert "left out: 2 images that cannot be read (problem.json has all):" in printed
    assert "  zero/IMG_1.HEIC: HEIC needs pillow-heif: pip install" in printed
    assert "note: files in the folder that are not read: 1 x .mov, 1 x .txt, 1 x hidden" in printed
    assert f"1 x {outside}" in printed
    words = ["--run", place / "run", "--data", photos, "--workers", 0, "--out", tmp_path / "s.csv"]
    assert main(["score", *map(str, words)]) == 0
    printed = capsys.readouterr().out
    assert "1 x in @eaDir/" in printed
    assert "2 images left out, all listed in" in printed
    # Images of kinds that cannot be read are images; the other files are not.
    for command in (["score", *map(str, words), "--overwrite", "--strict"],):
        assert main(command) == 2
        assert "IMG_2.CR2: a camera's raw file" in capsys.readouterr().err
    assert zero_shot(place, tmp_path / "strict", photos, "--strict") == 2
    assert "2 images cannot be read, the first is one/IMG_2.CR2" in capsys.readouterr().err
    for path in (*photos.rglob("IMG_*.CR2"), *photos.rglob("IMG_*.HEIC")):
        path.unlink()
    assert zero_shot(place, tmp_path / "strict again", photos, "--strict") == 0


def test_links_are_followed_when_asked_and_named(place, photos, tmp_path, capsys):
    (photos / "linked").symlink_to(place / "photos" / "three")
    (photos / "again").symlink_to(photos / "one")
    counts = []
    for out, flags, more in (("run", [], 0), ("links", ["--follow-links"], 7)):
        assert zero_shot(place, tmp_path / out, photos, *flags) == 0
        problem = json.loads((tmp_path / out / "problem.json").read_text())
        counts.append(problem["train_images"])
        link = f"linked -> {place}/photos/three"
        assert problem["followed"] == {"train": [link] * bool(more)}
        printed = capsys.readouterr().out
        assert (f"note: links that were followed: {link}\n" in printed) == bool(more)
    assert counts[1] == counts[0] + 7
    saved = json.loads((tmp_path / "links" / "config.json").read_text())
    assert saved["follow_links"] is True


def test_no_name_of_a_file_reaches_the_terminal_raw(place, photos, tmp_path, capsys):
    (photos / ESCAPE).write_bytes(b"broken")
    shutil.copy(next(photos.glob("one/*.png")), photos / "one" / "\x1b[32m\u202egnp.png")
    (photos / "\x1b[33mclass").mkdir()
    shutil.copy(next(photos.glob("six/*.png")), photos / "\x1b[33mclass" / "1.png")
    assert zero_shot(place, tmp_path / "run", photos) == 0
    run = ["--run", str(place / "run"), "--workers", "0", "--data", str(photos)]
    assert main(["evaluate", *run, "--out", str(tmp_path / "e.csv")]) == 0
    assert main(["score", *run, "--out", str(tmp_path / "s.csv")]) == 0
    assert main(["score", *run, "--out", str(tmp_path / "t.csv"), "--strict"]) == 2
    assert zero_shot(place, tmp_path / "strict", photos, "--strict") == 2
    assert main(["evaluate", *run, "--strict"]) == 2
    said = capsys.readouterr()
    for text in (said.out, said.err.replace("\x1b[A", "")):  # tqdm's own
        assert "\x1b" not in text
        assert "\x07" not in text
        assert "\u202e" not in text
    assert said.out.count("zero/\\x1b[31mred\\x07.png: ") == 3
    assert said.out.count("\\x1b[33mclass (1)") == 6
    # In the tables names are as they are.
    assert any(row["image"] == "one/\x1b[32m\u202egnp.png" for row in rows(tmp_path / "s.csv"))
    skipped = json.loads((tmp_path / "run" / "problem.json").read_text())["skipped"]
    assert skipped[0]["image"] == ESCAPE


def test_a_folder_a_list_and_a_csv_have_the_same_metrics(place, photos, tmp_path, capsys):
    numbers = {name: number for number, name in enumerate(KNOWN)}
    paths = sorted(str(path.relative_to(photos)) for path in photos.glob("*/*.png"))
    for kind, label in (
        ("names", lambda name: name),
        ("places", lambda name: str(numbers.get(name, "unknown"))),
        ("floats", lambda name: f"{numbers.get(name, 9)}.0"),
    ):
        pairs = [(path, label(path.split("/")[0])) for path in paths]
        text = "".join(f"{path}\t{written}\n" for path, written in pairs)
        (tmp_path / f"{kind}.txt").write_text(text, encoding="utf-8")
        text = "".join(f'"{path}",{written}\n' for path, written in pairs)
        (tmp_path / f"{kind}.csv").write_text(f"path,label\n{text}", encoding="utf-8")
    for path in photos.glob("*/*"):
        if path.suffix != ".png":
            path.unlink()
    tables = set()
    for source in (photos, *tmp_path.glob("*.txt"), *tmp_path.glob("*.csv")):
        words = ["--run", place / "run", "--data", source, "--workers", 0]
        root = [] if source == photos else ["--data-root", photos]
        assert main(["evaluate", *map(str, words + root)]) == 0
        lines = capsys.readouterr().out.splitlines()
        tables.add("\n".join(line for line in lines if not line.startswith("note: ")))
    assert len(tables) == 1
    assert "of known classes and 7 of others" in tables.pop()


def test_evaluate_and_score_say_how_labels_were_read(place, photos, tmp_path, capsys):
    for number, name in enumerate(("zero", "one", "six"), start=4):
        (photos / name).rename(photos / str(number))
    run = ["--run", str(place / "run"), "--workers", "0", "--data", str(photos)]
    for words in (["evaluate", *run], ["score", *run, "--out", str(tmp_path / "s.csv")]):
        assert main(words) == 0
        printed = capsys.readouterr().out
        assert "note: numbers in the labels are taken as places in your list, counted from 0: 4 is"
        assert "'four', 5 is 'five' (no label is 0 and the largest is 6" in printed
    # Folders that are no classes are nothing to speak of where no label is needed.
    for number in (4, 5, 6):
        (photos / str(number)).rename(photos / f"2023-{number}")
    assert main(["score", *run, "--out", str(tmp_path / "t.csv")]) == 0
    assert "label" not in capsys.readouterr().out
    assert main(["evaluate", *run]) == 2
    assert "none of the labels, 3 (2023-4, 2023-5, 2023-6)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--data photos --classes gone.txt", "gone.txt does not exist; check the name"),
        ("--data gone.csv --classes names.txt", "gone.csv does not exist; give a folder of"),
        ("--data gone/x.jpg --classes names.txt", "x.jpg does not exist; give a folder of"),
        ("--data photos --classes names.txt --test-data gone", "gone does not exist; give a fol"),
        ("--data photos --classes names.txt --data-root .", "data_root='.' says where the rel"),
        ("--data list.txt --classes names.txt", "1 (./gone.jpg) of 1 file does not exist; rel"),
    ],
)
def test_a_mistyped_file_is_named(place, monkeypatch, capsys, words, message):
    monkeypatch.chdir(place)
    (place / "list.txt").write_text("gone.jpg 1\n")
    assert main(["finetune", *words.split(), "--out", "none"]) in (1, 2)
    error = capsys.readouterr().err
    assert message in error
    assert "[Errno" not in error


def test_a_lack_of_memory_says_how_to_go_on(place, monkeypatch, tmp_path, capsys):
    def fails(*_, **__):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr("ueo_fast.finetune.data.copies.opened", fails)
        run = ["--run", str(place / "run"), "--workers", "0", "--data", str(place / "photos")]
        for words in (["evaluate", *run], ["score", *run, "--out", str(tmp_path / "s.csv")]):
            assert main(words) == 1
            assert "no memory is left. Use fewer processes (--workers 1" in capsys.readouterr().err
        out = tmp_path / "memory"
        assert finetune(place, str(out), "--epochs", "1") == 1
        error = capsys.readouterr().err
        assert "no memory is left" in error
        assert f"go on: ueo-fast finetune --resume --out {out}" in error
    assert main(["finetune", "--resume", "--out", str(out)]) == 0
    assert CORRUPT in capsys.readouterr().out
