"""Category shifts: the paper's class counts, digits, and every refusal."""

from __future__ import annotations

import dataclasses

import pytest

from ueo_fast.finetune.data.benchmarks import DATA_SETS, benchmark_split
from ueo_fast.finetune.data.shifts import SHIFTS, UNKNOWN, CategorySplit, split_classes

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def names(n: int) -> list[str]:
    return [f"class {i}" for i in range(n)]


# design.md section 4: known and unknown classes in training, and classes in the test.
TABLE = [
    ("office31", 25, 31, {"CDA": (25, 0), "PDA": (20, 0), "ODA": (25, 3), "OPDA": (15, 3)}),
    ("officehome", 50, 65, {"CDA": (50, 0), "PDA": (35, 0), "ODA": (50, 10), "OPDA": (35, 10)}),
    ("visdac", 8, 12, {"CDA": (8, 0), "PDA": (6, 0), "ODA": (8, 2), "OPDA": (6, 2)}),
    (
        "domainnet",
        300,
        345,
        {"CDA": (300, 0), "PDA": (250, 0), "ODA": (300, 30), "OPDA": (250, 30)},
    ),
]


@pytest.mark.parametrize(
    ("dataset", "known", "total", "shift", "train"),
    [
        (dataset, known, total, shift, train)
        for dataset, known, total, shifts in TABLE
        for shift, train in shifts.items()
    ],
)
def test_the_papers_table(
    dataset: str, known: int, total: int, shift: str, train: tuple[int, int]
) -> None:
    split = benchmark_split(dataset, shift, names(total))
    assert split.known == tuple(names(total)[:known])
    assert split.test == tuple(names(total))
    # The first known classes, then the first unknown ones, as the ranges of the authors' demo.py.
    first_unknown = names(total)[known : known + train[1]]
    assert split.train == tuple(names(total)[: train[0]] + first_unknown)
    assert (len(split.train_known), len(split.train_unknown)) == train
    assert len(split.unknown) == total - known


@pytest.mark.parametrize("dataset", DATA_SETS)
def test_csda_of_the_benchmarks_has_no_unknown_class(dataset: str) -> None:
    classes = names(DATA_SETS[dataset].classes.total)
    split = benchmark_split(dataset, "CSDA", classes)
    assert split.known == split.train == split.test == tuple(classes)
    assert split.unknown == split.train_unknown == ()


def test_the_table_above_covers_every_benchmark_and_shift() -> None:
    assert {row[0] for row in TABLE} == set(DATA_SETS)
    assert all({"CSDA", *row[3]} == set(SHIFTS) for row in TABLE)


DIGIT_TRAIN = {
    "CDA": DIGITS[:6],
    "PDA": DIGITS[:4],
    "ODA": DIGITS[:8],
    "OPDA": (*DIGITS[:4], *DIGITS[6:8]),
}


@pytest.mark.parametrize("shift", DIGIT_TRAIN)
def test_digits_with_the_default_counts(shift: str) -> None:
    split = split_classes(shift, DIGITS[:6], DIGITS)
    assert split == CategorySplit(DIGITS[:6], DIGIT_TRAIN[shift], DIGITS)


def test_default_counts_round_known_down_and_unknown_up() -> None:
    split = split_classes("OPDA", names(7), names(10))
    assert (len(split.train_known), len(split.train_unknown)) == (5, 2)


def test_digits_closed_set() -> None:
    assert split_classes("CSDA", DIGITS, DIGITS) == CategorySplit(DIGITS, DIGITS, DIGITS)


def test_known_need_not_come_first_and_keeps_its_order() -> None:
    split = split_classes("OPDA", ["nine", "two", "five"], DIGITS, train_known=2, train_unknown=3)
    assert split.known == ("nine", "two", "five")
    assert split.train == ("nine", "two", "zero", "one", "three")
    assert split.train_known == ("nine", "two")
    assert split.train_unknown == ("zero", "one", "three")
    assert split.unknown == ("zero", "one", "three", "four", "six", "seven", "eight")
    assert split.test == DIGITS
    assert [split.label(name) for name in ("nine", "five", "zero")] == [0, 2, UNKNOWN]


def test_one_known_and_one_unknown_class_are_enough() -> None:
    for shift in SHIFTS[1:]:
        split = split_classes(shift, ["a"], ["a", "b"])
        assert split.train == (("a", "b") if shift in ("ODA", "OPDA") else ("a",))


def test_splits_are_frozen_and_hashable() -> None:
    split = split_classes("CDA", DIGITS[:6], DIGITS)
    assert hash(split) == hash(split_classes("CDA", list(DIGITS[:6]), list(DIGITS)))
    with pytest.raises(dataclasses.FrozenInstanceError):
        split.known = ()  # type: ignore[misc]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("UDA", ["a"], ["a", "b"]), r"shift='UDA' is unknown: choose one of CSDA, CDA, PDA, ODA"),
        (("CDA", [], ["a"]), "known is empty; give at least one class name"),
        (("CDA", ["a"], []), "target_classes is empty"),
        (("CDA", "ab", ["a", "b"]), "known is the string 'ab'; give a list"),
        (("CDA", ["a", "a"], ["a", "b"]), "known names 'a' twice"),
        (("CDA", ["a"], ["a", "b", "b"]), "target_classes names 'b' twice"),
        (("CDA", ["a", "c"], ["a", "b"]), r"known has 'c', which target_classes \(2 classes\)"),
        (("CSDA", ["a"], ["a", "b"]), "'CSDA' is closed-set, but known leaves out 'b'.*choose CDA"),
        (
            ("OPDA", ["a", "b"], ["a", "b"]),
            "'OPDA' needs target classes that are not in known.*all 2",
        ),
        (("CDA", ["a", "b"], ["a", "b"]), "shift='CDA' needs target classes.*or choose CSDA"),
    ],
)
def test_class_lists_are_checked(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        split_classes(*arguments)


@pytest.mark.parametrize(
    ("shift", "counts", "message"),
    [
        ("PDA", {"train_known": 7}, r"train_known=7 is out of range: shift='PDA' here has 1 to 6"),
        ("OPDA", {"train_known": 0}, "train_known=0 is out of range"),
        (
            "ODA",
            {"train_unknown": 5},
            "train_unknown=5 is out of range: shift='ODA' here has 1 to 4",
        ),
        ("OPDA", {"train_unknown": -1}, "train_unknown=-1 is out of range"),
        ("ODA", {"train_known": 3}, "train_known=3 has no meaning under shift='ODA'"),
        ("PDA", {"train_unknown": 3}, "train_unknown=3 has no meaning under shift='PDA'"),
        ("CDA", {"train_unknown": 0}, "train_unknown=0 has no meaning under shift='CDA'.*leave it"),
    ],
)
def test_counts_are_checked(shift: str, counts: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        split_classes(shift, DIGITS[:6], DIGITS, **counts)


def test_long_lists_are_shortened_in_messages() -> None:
    with pytest.raises(ValueError, match="leaves out 'class 1', 'class 2', 'class 3' and 96 more;"):
        split_classes("CSDA", names(1), names(100))


def test_benchmark_arguments_are_checked() -> None:
    with pytest.raises(ValueError, match="dataset='mnist' is unknown: choose one of office31, off"):
        benchmark_split("mnist", "CDA", names(10))
    with pytest.raises(ValueError, match="class_names has 30 names, but office31 has 31 classes"):
        benchmark_split("office31", "CDA", names(30))
    with pytest.raises(ValueError, match="shift='UDA' is unknown"):
        benchmark_split("office31", "UDA", names(31))


def test_a_hand_made_split_is_checked_too() -> None:
    with pytest.raises(ValueError, match=r"train has 'c', which test \(2 classes\) does not list"):
        CategorySplit(known=("a",), train=("a", "c"), test=("a", "b"))
    with pytest.raises(ValueError, match="train is empty"):
        CategorySplit(known=("a",), train=(), test=("a", "b"))
    split = CategorySplit(known=("a",), train=("b",), test=("a", "b"))
    with pytest.raises(ValueError, match="name has 'z', which test"):
        split.label("z")
