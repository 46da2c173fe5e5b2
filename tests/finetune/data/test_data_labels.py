"""Class names of a file, and labels that are matched with them."""

from __future__ import annotations

import contextlib
import csv
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ueo_fast.finetune.commands.problem import Labelled
from ueo_fast.finetune.data import names as module
from ueo_fast.finetune.data.image_list import ImageList, read_images
from ueo_fast.finetune.data.labels import match_labels, read_class_names


def labelled(*labels: str | int | None) -> ImageList:
    names = tuple(f"{i}.jpg" for i in range(len(labels)))
    return ImageList(names, names, labels)


def read(*labels: str, known: str) -> list[int] | None:
    """What the labels become for the classes ``known``, which are separated by commas."""
    found = match_labels(labelled(*labels), known.split(","))
    return None if found is None else found.tolist()


def test_labels_are_matched_as_prompts_see_them() -> None:
    classes = ["Alarm_Clock", "t-shirt", "Café"]
    images = labelled("alarm  clock", "ALARM_CLOCK", "T-Shirt", "cafe\u0301", "mug")
    found = match_labels(images, classes)
    assert found is not None
    assert found.dtype == torch.int64
    assert found.tolist() == [0, 0, 1, 2, -1]


@pytest.mark.parametrize(
    ("label", "known"),
    [
        ("alarm-clock", "alarm clock"),
        ("AlarmClock", "alarm_clock"),
        ("T-Shirt", "t shirt"),
        ("tshirt", "t-shirt"),
        ("t\u2011shirt", "t-shirt"),  # a hyphen that does not break
        ("Ice-cream", "ice  cream"),
        ("1-2", "1_2"),
        ("01", "1"),
        ("1.0", "1"),
        ("+7", "7"),
    ],
)
def test_names_agree_whatever_separates_their_words(label: str, known: str) -> None:
    assert read(label, known=f"x,{known}") == [1]


@pytest.mark.parametrize(
    ("label", "known"),
    [("1-2", "12"), ("1 2", "12"), ("-1", "1"), ("1.5", "15"), ("a.b", "ab"), ("-", "y")],
)
def test_names_that_differ_in_more_are_different(label: str, known: str) -> None:
    assert read(label, "x", known=f"x,{known}") == [-1, 0]


def test_classes_that_only_a_hyphen_tells_apart() -> None:
    known = "t-shirt,t shirt,cat"
    assert read("t-shirt", "t shirt", "T_Shirt", "cat", known=known) == [0, 1, 1, 2]
    with pytest.raises(ValueError, match="label 'tshirt' can be read as 't-shirt' or 't shirt'; w"):
        read("cat", "tshirt", known=known)
    with pytest.raises(ValueError, match=r"label '1\.0' can be read as '1' or '01'"):
        read("1.0", known="1,01")


def test_numbers_are_places_from_0() -> None:
    found = match_labels(labelled(1, 0, 2, 345, -1), ["a", "b"])
    assert found is not None
    assert found.tolist() == [1, 0, -1, -1, -1]
    assert read("1", "0", "2", "345", "-1", known="a,b") == [1, 0, -1, -1, -1]
    assert read("0.0", "1.", "2.00", "007", known="a,b") == [0, 1, -1, -1]
    assert read("0", "1", "unknown", known="a,b") == [0, 1, -1]
    assert read("0", "1", known="10,20") == [0, 1]  # no class is called so
    assert read("1.5", "nan", "1e0", known="a,b") is None
    assert read(f"{'9' * 5000}", "1", known="a,b") == [-1, 1]


def test_numbers_that_are_names_are_no_places() -> None:
    assert read("1", "2", "3", "8", known="1,2,3") == [0, 1, 2, -1]
    assert read("3.0", "8.0", known="1,2,3") == [2, -1]
    assert read(*"0123456789", known="1,2,3,4,5,6,7,8,9") == [-1, *range(9)]
    assert read("cat", "1", known="cat,dog") == [0, -1]  # beside a name it is none either
    assert read("2", "0", "1", known="0,1,2") == [2, 0, 1]
    assert read("2", "0", "1", known="2,1,0") == [0, 2, 1]


def test_numbers_that_may_be_names_or_places_are_refused() -> None:
    with pytest.raises(ValueError, match="can be read in two ways") as raised:
        read("0", "1", "2", "unknown", known="1,2,3")
    said = str(raised.value)
    assert "names of classes (1 is the class '1', and 0 are of no class" in said
    assert "places in your list, counted from 0 (1 is '2', 0 is '1')" in said


def notes(*labels: str | None, known: str) -> str:
    return Labelled.of(labelled(*labels), tuple(known.split(","))).note


def test_the_note_says_how_labels_were_read() -> None:
    assert notes("cat", "dog", known="cat,dog") == ""
    assert notes("cat", "fox", "fox", "emu", known="cat,dog") == (
        "3 images with a label that is not on your list count as unknown: fox (2), emu (1)"
    )
    assert notes("cat", *"abcdefghij", known="cat,dog").endswith("h (1) and 2 more")
    places = "numbers in the labels are taken as places in your list, counted from 0: "
    assert notes("0", "1", known="cat,dog") == f"{places}0 is 'cat', 1 is 'dog'"
    assert notes("1", "2", known="cat,dog") == (
        f"{places}1 is 'dog' (no label is 0 and the largest is 2, the number of your classes: if "
        "they count from 1, every image is taken for one of the next class; then subtract 1, or "
        "write the names); 1 image with a label that is not on your list counts as unknown: 2 (1)"
    )
    assert "no label is 0: if they count from 1" in notes("1", "5", known="cat,dog")
    assert "none of the labels, 2 (2023, a\\x1b[31m), is the name" in notes(
        "2023", "a\x1b[31m", None, known="cat,dog"
    )
    assert "are not used, so there are no metrics: the labels 0, 1 can" in notes(
        "0", "1", known="1,2"
    )


def test_folders_that_contradict_the_numbers_are_noted() -> None:
    names = ("p/Dog/1.png", "p/cat/2.png", "p/cat/3.png", "p/emu/4.png", "5.png")
    images = ImageList(names, names, ("0", "1", "0", "1", "0"))
    note = Labelled.of(images, ("cat", "dog")).note
    assert note.endswith(
        "1 is 'dog'; but 2 images lie in the folder of another class: Dog has the label 0, 'cat' "
        "(is your list of classes in the order of the labels?)"
    )
    right = ImageList(names, names, ("1", "0", "0", "1", "0"))
    assert "another class" not in Labelled.of(right, ("cat", "dog")).note


_WORDS = st.sampled_from(
    [
        *("0", "1", "2", "3", "8", "01", "1.0", "-1", "12", "1-2", "unknown", "cat", "Cat"),
        *("t-shirt", "t shirt", "T_SHIRT", "tshirt", "alarm clock", "alarm-clock", "AlarmClock"),
        *("café", "a.png"),
    ]
)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(_WORDS, min_size=1, max_size=5, unique=True),
    st.lists(_WORDS, min_size=1, max_size=5, unique=True),
)
def test_a_folder_a_list_and_a_csv_mean_the_same(labels: list[str], known: list[str]) -> None:
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        for label in labels:
            (root / "photos" / label).mkdir(parents=True)
            (root / "photos" / label / "1.png").touch()
        pairs = sorted((f"photos/{label}/1.png", label) for label in labels)
        lines = "".join(f"{path}\t{label}\n" for path, label in pairs)
        (root / "list.txt").write_text(lines, encoding="utf-8")
        with open(root / "table.csv", "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("path", "label"), *pairs])
        seen = []
        for source in ("photos", "list.txt", "table.csv"):
            found: object = "refused"
            with contextlib.suppress(ValueError):
                part = Labelled.of(read_images(root / source), tuple(known))
                found = (None if part.labels is None else part.labels.tolist(), part.note)
            seen.append(found)
        assert seen[0] == seen[1] == seen[2]


def test_folders_that_are_no_classes_are_no_labels() -> None:
    assert match_labels(labelled("2023", "holiday"), ["cat", "dog"]) is None
    assert match_labels(labelled("2023", None), ["cat", "dog"]) is None
    assert match_labels(labelled(5, 6), ["cat", "dog"]) is None
    assert match_labels(ImageList(("a",), ("a",)), ["cat"]) is None


def test_half_labelled_images_are_refused() -> None:
    with pytest.raises(ValueError, match=r"1 \(1.jpg\) of 3 images has no label.*move the images"):
        match_labels(labelled("cat", None, "mug"), ["cat"])
    with pytest.raises(ValueError, match="class_names has both 'TV' and 'tv'"):
        match_labels(labelled("tv"), ["TV", "mug", "tv"])


def test_class_names_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "n.txt"
    text = "\ufeff# mine\r\n\r\n alarm clock \r\nTV\r\nC# book\r\nGröße\r\n"
    path.write_bytes(text.encode())
    assert read_class_names(path) == ("alarm clock", "TV", "C# book", "Größe")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"# nothing\n\n", "names no class; write one class name per line"),
        (b"alarm_clock\n\nAlarm  Clock\n", "line 3: 'Alarm  Clock' is there already, in line 1"),
        (b"cat\n__\n", "line 2: '__' is blank"),
        (b"caf\xe9\n", "is not UTF-8 .*save it as UTF-8"),
        ("cat\n".encode("utf-16-le"), "is not UTF-8 text"),
    ],
)
def test_class_names_are_checked(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "n.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_class_names(path)


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="needs a file without end")
def test_a_list_without_end_is_not_read_into_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_BYTES", 2**20)
    for read in (read_class_names, read_images):
        with pytest.raises(ValueError, match="/dev/zero has more than 1,048,576 bytes"):
            read("/dev/zero")


def test_a_missing_file_of_class_names_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"gone\.txt does not exist; check the name"):
        read_class_names(tmp_path / "gone.txt")
