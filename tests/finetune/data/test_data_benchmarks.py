"""The paper's data sets in small copies of their folders: layouts, orders, labels, refusals."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

from ueo_fast.finetune.data.benchmarks import (
    DATA_SETS,
    BenchmarkProblem,
    benchmark_split,
    class_names,
    load_benchmark,
)
from ueo_fast.finetune.data.shifts import SHIFTS

# As the folders of the archive are called; ASCII order puts TV before Table.
OFFICEHOME_FOLDERS = (  # noqa: SIM905
    "Alarm_Clock Backpack Batteries Bed Bike Bottle Bucket Calculator Calendar Candles Chair "
    "Clipboards Computer Couch Curtains Desk_Lamp Drill Eraser Exit_Sign Fan File_Cabinet "
    "Flipflops Flowers Folder Fork Glasses Hammer Helmet Kettle Keyboard Knives Lamp_Shade Laptop "
    "Marker Monitor Mop Mouse Mug Notebook Oven Pan Paper_Clip Pen Pencil Postit_Notes Printer "
    "Push_Pin Radio Refrigerator Ruler Scissors Screwdriver Shelf Sink Sneakers Soda Speaker Spoon "
    "TV Table Telephone ToothBrush Toys Trash_Can Webcam"
).split()


def touch(root: Path, names: Iterable[str]) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    return root


@pytest.fixture
def officehome(tmp_path: Path) -> Path:
    """Two images in each class of two domains, as published."""
    return touch(
        tmp_path,
        (
            f"{domain}/{folder}/0000{number}.jpg"
            for domain in ("Art", "Real World")
            for folder in OFFICEHOME_FOLDERS
            for number in (1, 2)
        ),
    )


def load(root: Path, dataset: str, domain: str, scenario: str = "OPDA") -> BenchmarkProblem:
    return load_benchmark(dataset, domain, scenario, root, check_counts=False)


@pytest.mark.parametrize("dataset", DATA_SETS)
def test_class_lists_are_whole(dataset: str) -> None:
    names = class_names(dataset)
    assert len(names) == len(set(names)) == DATA_SETS[dataset].classes.total
    assert all(name == name.strip() and name for name in names)


def test_class_lists_are_in_the_authors_order() -> None:
    assert class_names("office31")[:3] == ("back_pack", "bike", "bike_helmet")
    assert class_names("office31")[24:26] == ("ring_binder", "ruler")
    officehome = class_names("officehome")
    assert officehome[57:] == (
        *("spoon", "table", "telephone", "toothbrush"),
        *("toys", "trash_can", "tv", "webcam"),
    )
    assert class_names("visdac")[7:9] == ("person", "plant")
    domainnet = class_names("domainnet")
    assert domainnet.index("t-shirt") == 327
    assert domainnet[307:310] == ("tent", "The_Eiffel_Tower", "The_Great_Wall_of_China")
    assert domainnet[-1] == "zigzag"
    # ImageFolder's ASCII order would move 328 classes.
    assert sum(a != b for a, b in zip(domainnet, sorted(domainnet), strict=True)) == 328


def test_the_data_sets_are_those_of_the_paper() -> None:
    assert sum(len(facts.counts) for facts in DATA_SETS.values()) == 15
    domainnet = DATA_SETS["domainnet"].counts.values()
    assert sum(train + test for train, test in domainnet) == 586575
    assert sum(count for count, _ in DATA_SETS["office31"].counts.values()) == 4110
    assert sum(count for count, _ in DATA_SETS["officehome"].counts.values()) == 15588


@pytest.mark.parametrize("scenario", SHIFTS)
def test_folders_as_published(officehome: Path, scenario: str) -> None:
    problem = load(officehome, "officehome", "art", scenario)
    split = benchmark_split("officehome", scenario, class_names("officehome"))
    assert problem.split == split
    assert problem.known == split.known
    assert len(problem.test) == 2 * 65
    assert len(problem.train) == 2 * len(split.train)
    assert set(problem.train.labels) == set(split.train)
    assert problem.train.names[0] == "Art/Alarm_Clock/00001.jpg"
    assert problem.train.paths[0] == str(officehome / "Art/Alarm_Clock/00001.jpg")
    for images, labels in (
        (problem.train, problem.train_labels),
        (problem.test, problem.test_labels),
    ):
        assert labels.dtype == torch.int64
        assert labels.tolist() == [split.label(name) for name in images.labels]
        for name, label in zip(images.names, images.labels, strict=True):
            assert name.split("/")[1].casefold() == label
    unknown = int((problem.test_labels == -1).sum())
    assert unknown == (0 if scenario == "CSDA" else 2 * 15)


def test_tv_is_behind_table(officehome: Path) -> None:
    problem = load(officehome, "officehome", "Art", "CSDA")
    row = problem.test.names.index("Art/TV/00001.jpg")
    assert problem.test.labels[row] == "tv"
    assert problem.known[int(problem.test_labels[row])] == "tv"
    assert int(problem.test_labels[row]) == 63


@pytest.mark.parametrize("domain", ["RealWorld", "real world", "real_world", "real", "REAL"])
@pytest.mark.parametrize("folder", ["Real World", "RealWorld", "Real_World", "Real"])
def test_the_real_world_has_many_names(officehome: Path, domain: str, folder: str) -> None:
    (officehome / "Real World").rename(officehome / folder)
    problem = load(officehome, "Office-Home", domain, "opda")
    assert problem.test.names[0] == f"{folder}/Alarm_Clock/00001.jpg"


def test_office31_has_a_folder_images(tmp_path: Path) -> None:
    classes = class_names("office31")
    touch(tmp_path, (f"dslr/images/{name}/frame_0001.jpg" for name in classes))
    for root in (tmp_path, shutil.copytree(tmp_path / "dslr/images", tmp_path / "x/dslr").parent):
        problem = load(root, "office31", "dslr", "OPDA")
        assert len(problem.train) == 18
        assert problem.test_labels.tolist() == [*range(25), *[-1] * 6]
    assert load(tmp_path, "office31", "DSLR").test.names[0] == (
        "dslr/images/back_pack/frame_0001.jpg"
    )


def test_visda_ships_a_list_of_its_own_inside(tmp_path: Path) -> None:
    classes = class_names("visdac")
    touch(tmp_path, (f"validation/{name}/{i}.jpg" for name in classes for i in range(2)))
    (tmp_path / "validation/image_list.txt").write_text("aeroplane/0.jpg 0\n")
    problem = load(tmp_path, "visdac", "validation", "CDA")
    assert (len(problem.train), len(problem.test)) == (16, 24)
    with pytest.raises(
        FileNotFoundError, match=r"does not have train_list.txt, nor a folder train/"
    ):
        load(tmp_path, "visdac", "train")


def domainnet(root: Path, train: int, test: int) -> Path:
    """Lists of ``clipart`` with so many lines; they name one file per class again and again."""
    classes = class_names("domainnet")
    touch(root, (f"clipart/{name}/1.jpg" for name in classes))
    for part, count in (("train", train), ("test", test)):
        numbers = [i % 345 for i in range(count)]
        lines = "".join(f"clipart/{classes[i]}/1.jpg {i}\n" for i in numbers)
        (root / f"clipart_{part}.txt").write_text(lines)
    return root


def test_domainnet_has_lists_for_training_and_test(tmp_path: Path) -> None:
    problem = load(domainnet(tmp_path, 700, 345), "domainnet", "clipart", "ODA")
    assert (len(problem.known), len(problem.test)) == (300, 345)
    assert len(problem.train) == 330 * 2 + 10
    assert set(problem.train.labels) == set(class_names("domainnet")[:330])
    assert problem.test_labels.tolist() == [*range(300), *[-1] * 45]
    assert problem.test.labels[327] == "t-shirt"
    with pytest.raises(
        FileNotFoundError, match=r"sketch_train\.txt and sketch_test.txt.*clipart_te"
    ):
        load(tmp_path, "domainnet", "sketch")


def test_domainnet_needs_its_lists(tmp_path: Path) -> None:
    (domainnet(tmp_path, 345, 345) / "clipart_test.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"clipart_test.txt\. .*http://ai\.bu\.edu/M3SDA/"):
        load(tmp_path, "domainnet", "clipart")


def test_published_counts_of_domainnet(tmp_path: Path) -> None:
    root = domainnet(tmp_path, 33525, 14604)
    assert len(load_benchmark("domainnet", "clipart", "CSDA", root).train) == 33525
    domainnet(tmp_path, 33525, 14603)
    with pytest.raises(ValueError, match=r"clipart \(test\): found 14,603 images, but 14,604 were"):
        load_benchmark("domainnet", "clipart", "CSDA", root)


def test_published_counts_of_folders(tmp_path: Path) -> None:
    classes = class_names("office31")
    touch(tmp_path, (f"dslr/images/{classes[i % 31]}/{i}.jpg" for i in range(498)))
    assert len(load_benchmark("office31", "dslr", "CDA", tmp_path).test) == 498
    (tmp_path / "dslr/images/mug/17.jpg").unlink()
    with pytest.raises(
        ValueError, match="Office-31, dslr: found 497 images, but 498 were"
    ) as raised:
        load_benchmark("office31", "dslr", "CDA", tmp_path)
    assert "faculty.cc.gatech.edu" in str(raised.value)
    assert "--check-counts false" in str(raised.value)
    assert len(load(tmp_path, "office31", "dslr", "CDA").test) == 497


@pytest.mark.parametrize("text", ["Get Office-Home at https://www.hemanthdv", "2 (mug, tv) of 65"])
def test_missing_classes_are_named(officehome: Path, text: str) -> None:
    shutil.rmtree(officehome / "Art/TV")
    for image in (officehome / "Art/Mug").iterdir():
        image.unlink()
    with pytest.raises(FileNotFoundError) as raised:
        load(officehome, "officehome", "art")
    assert text in str(raised.value)


def officehome_list(root: Path, order: Iterable[str]) -> None:
    lines = [
        f"Art/{folder}/0000{number}.jpg {label}"
        for label, folder in enumerate(order)
        for number in (1, 2)
    ]
    (root / "Art_list.txt").write_text("\n".join(lines))


def test_the_authors_lists_come_first(officehome: Path) -> None:
    order = sorted(OFFICEHOME_FOLDERS, key=str.casefold)
    officehome_list(officehome, order)
    touch(officehome, ["Art/Bed/not in the list.jpg"])
    problem = load(officehome, "officehome", "art", "PDA")
    assert len(problem.test) == 130
    assert problem.test.names[0] == "Art/Alarm_Clock/00001.jpg"
    assert len(problem.train) == 70
    assert load(officehome, "officehome", "real").test.names[0].startswith("Real World/")


def test_office31s_lists_may_lie_where_the_authors_have_them(tmp_path: Path) -> None:
    paths = [f"amazon/images/{name}/1.jpg" for name in class_names("office31")]
    touch(tmp_path, paths)
    lines = [f"{path} {label}\n" for label, path in enumerate(paths)]
    (tmp_path / "amazon" / "images_list.txt").write_text("".join(reversed(lines)))
    problem = load(tmp_path, "office31", "amazon")
    assert problem.test.names == tuple(reversed(paths))


def test_a_list_in_another_order_of_classes_is_refused(officehome: Path) -> None:
    officehome_list(officehome, OFFICEHOME_FOLDERS)  # ASCII: TV is 58
    with pytest.raises(ValueError, match=r"lies in the folder of 'tv' \(63\), but its label is 58"):
        load(officehome, "officehome", "art")


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("Art/Bed/00001.jpg 65\n", ValueError, "has the label '65'; a number from 0 to 64"),
        ("Art/Bed/00001.jpg bed\n", ValueError, "has the label 'bed'; a number"),
        ("Art/Bed/00001.jpg\n", ValueError, "has the label None; a number"),
        ("Art/Bed/9.jpg 3\n", FileNotFoundError, r"1 \(.*9.jpg\) of 1 file does not.*hemanthdv"),
        ("Art/Webcam/00001.jpg 64\n", ValueError, "no image of the classes that OPDA trains on"),
    ],
)
def test_lists_are_checked(officehome: Path, text: str, error: type, message: str) -> None:
    (officehome / "Art_list.txt").write_text(text)
    with pytest.raises(error, match=message):
        load(officehome, "officehome", "art")


def test_a_short_list_names_the_classes_that_it_lacks(officehome: Path) -> None:
    officehome_list(officehome, sorted(OFFICEHOME_FOLDERS, key=str.casefold)[:60])
    with pytest.raises(ValueError, match=r"found 120 images, but 2,427 .*; no image of 5 \(tooth"):
        load_benchmark("officehome", "art", "CDA", officehome)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("office", "art", "CDA"),
            "dataset='office' is unknown: .*office31, officehome, visdac, d",
        ),
        (("officehome", "photo", "CDA"), "'photo' is unknown: .*Art, Clipart, Product, RealWorld$"),
        (("visdac", "test", "CDA"), "domain='test' is unknown: choose one of train, validation$"),
        (("officehome", "art", "UDA"), "scenario='UDA' is unknown: .*CSDA, CDA, PDA, ODA, OPDA$"),
    ],
)
def test_names_are_checked(tmp_path: Path, arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_benchmark(*arguments, tmp_path)


def test_the_root_is_checked(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"root='.*nowhere' is not a folder"):
        load(tmp_path / "nowhere", "officehome", "art")
    (tmp_path / "OfficeHomeDataset_10072016").mkdir()
    with pytest.raises(FileNotFoundError, match=r"nor a folder Art/.*has: OfficeHomeDataset_1007"):
        load(tmp_path, "officehome", "art")
