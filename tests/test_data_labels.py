"""Class names of a file, and labels that are matched with them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ueo_fast.finetune.data.image_list import ImageList, match_labels, read_class_names


def labelled(*labels: str | int | None) -> ImageList:
    names = tuple(f"{i}.jpg" for i in range(len(labels)))
    return ImageList(names, names, labels)


def test_labels_are_matched_as_prompts_see_them() -> None:
    classes = ["Alarm_Clock", "t-shirt", "Café"]
    images = labelled("alarm  clock", "ALARM_CLOCK", "T-Shirt", "cafe\u0301", "mug")
    found = match_labels(images, classes)
    assert found is not None
    assert found.dtype == torch.int64
    assert found.tolist() == [0, 0, 1, 2, -1]


def test_numbers_are_indices() -> None:
    found = match_labels(labelled(1, 0, 2, 345, -1), ["a", "b"])
    assert found is not None
    assert found.tolist() == [1, 0, -1, -1, -1]


def test_folders_that_are_no_classes_are_no_labels() -> None:
    assert match_labels(labelled("2023", "holiday"), ["cat", "dog"]) is None
    assert match_labels(labelled("2023", None), ["cat", "dog"]) is None
    assert match_labels(labelled(5, 6), ["cat", "dog"]) is None
    assert match_labels(ImageList(("a",), ("a",)), ["cat"]) is None


def test_half_labelled_images_are_refused() -> None:
    with pytest.raises(ValueError, match=r"1 \(1.jpg\) of 3 images have no label.*move the images"):
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


def test_a_missing_file_of_class_names_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"gone\.txt"):
        read_class_names(tmp_path / "gone.txt")
