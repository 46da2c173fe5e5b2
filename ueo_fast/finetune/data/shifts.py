"""Category shifts: which classes are on the user's list, in the unlabelled images, and in the test.

Of the classes of a target domain some are *known* (on the user's list, each has a prompt) and the
others *unknown*. The shifts differ in which of them occur among the unlabelled training images:

    CSDA   closed set, also in the test: every class is known
    CDA    all known classes
    PDA    some of the known classes                              (partial)
    ODA    all known classes and some unknown ones                (open)
    OPDA   some of the known classes and some unknown ones        (open-partial)

The test always contains all classes of the domain, so except under CSDA there are unknown classes
to detect, some of which no training image showed.

Source: Liang et al., 2024, arXiv 2308.12919, section 4.1; class counts and the rule "the first
ones of the list" from the authors' demo.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ueo_fast.ranges import check_one_of

SHIFTS = ("CSDA", "CDA", "PDA", "ODA", "OPDA")

UNKNOWN = -1
"""The label of an image whose class is not on the user's list."""


@dataclass(frozen=True)
class CategorySplit:
    """The classes of one adaptation problem. Orders are kept; ``known`` gives the label indices.

    Attributes:
        known: the classes on the user's list, one prompt each.
        train: the classes whose unlabelled images are seen in adaptation.
        test: the classes of the test images.

    Raises:
        ValueError: a list is empty or names a class twice, or ``train`` or ``known`` has a class
            that is not in ``test``.
    """

    known: tuple[str, ...]
    train: tuple[str, ...]
    test: tuple[str, ...]

    def __post_init__(self) -> None:
        for field in ("known", "train", "test"):
            _check_names(field, getattr(self, field))
        for field in ("known", "train"):
            _check_subset(field, getattr(self, field), "test", self.test)

    @property
    def unknown(self) -> tuple[str, ...]:
        """Test classes that are not on the user's list."""
        return _without(self.test, self.known)

    @property
    def train_known(self) -> tuple[str, ...]:
        """Known classes that occur among the training images."""
        return _without(self.train, self.unknown)

    @property
    def train_unknown(self) -> tuple[str, ...]:
        """Unknown classes that occur among the training images."""
        return _without(self.train, self.known)

    def label(self, name: str) -> int:
        """Index of a test class in ``known``, or :data:`UNKNOWN` (-1).

        Raises:
            ValueError: ``name`` is not a test class.
        """
        _check_subset("name", (name,), "test", self.test)
        return self.known.index(name) if name in self.known else UNKNOWN


def split_classes(
    shift: str,
    known: Sequence[str],
    target_classes: Sequence[str],
    *,
    train_known: int | None = None,
    train_unknown: int | None = None,
) -> CategorySplit:
    """The split of a target domain's classes under a category shift.

    Args:
        shift: one of :data:`SHIFTS`.
        known: the classes on the user's list, all of them among ``target_classes``. Under CSDA the
            list has to name every target class.
        target_classes: all classes of the target domain; the test uses all of them.
        train_known: PDA and OPDA: how many known classes occur in training, the first ones of
            ``known``. Default: three quarters, rounded down, at least one.
        train_unknown: ODA and OPDA: how many unknown classes occur in training, the first ones of
            ``target_classes`` that are not known. Default: half, rounded up.

    Returns:
        The split; its ``train`` lists the known classes first.

    Raises:
        ValueError: unknown ``shift``, a class list that does not fit, a count that is out of range
            or given to a shift that does not use it, or a shift that needs unknown classes where
            there are none.
    """
    check_one_of("shift", shift, SHIFTS)
    _check_names("known", known)
    _check_names("target_classes", target_classes)
    _check_subset("known", known, "target_classes", target_classes)
    unknown = _without(target_classes, known)
    if shift == "CSDA" and unknown:
        raise ValueError(
            f"shift='CSDA' is closed-set, but known leaves out {_some(unknown)}; pass "
            "known=target_classes, or choose CDA to keep these classes unknown"
        )
    if shift != "CSDA" and not unknown:
        raise ValueError(
            f"shift={shift!r} needs target classes that are not in known, but known names all "
            f"{len(known)} of them; take some off the list, or choose CSDA"
        )
    partial = shift in ("PDA", "OPDA")
    opened = shift in ("ODA", "OPDA")
    n_known = _count("train_known", train_known, partial, len(known), len(known) * 3 // 4, shift)
    n_unknown = _count(
        "train_unknown", train_unknown, opened, len(unknown), (len(unknown) + 1) // 2, shift
    )
    return CategorySplit(
        known=tuple(known),
        train=(
            *(known[:n_known] if partial else known),
            *(unknown[:n_unknown] if opened else ()),
        ),
        test=tuple(target_classes),
    )


def _count(
    argument: str, value: int | None, used: bool, available: int, default: int, shift: str
) -> int:
    if value is None:
        return max(1, default)
    if not used:
        raise ValueError(
            f"{argument}={value} has no meaning under shift={shift!r}, which fixes that number; "
            "leave it out"
        )
    if not 1 <= value <= available:
        raise ValueError(
            f"{argument}={value} is out of range: shift={shift!r} here has 1 to {available} such "
            "classes to choose from"
        )
    return value


def _check_names(argument: str, names: Sequence[str]) -> None:
    if isinstance(names, str):
        raise ValueError(f"{argument} is the string {names!r}; give a list of class names")
    if not names:
        raise ValueError(f"{argument} is empty; give at least one class name")
    twice = [name for i, name in enumerate(names) if name in names[:i]]
    if twice:
        raise ValueError(f"{argument} names {_some(twice)} twice; list each class once")


def _check_subset(argument: str, names: Iterable[str], of: str, allowed: Sequence[str]) -> None:
    extra = _without(names, allowed)
    if extra:
        raise ValueError(
            f"{argument} has {_some(extra)}, which {of} ({len(allowed)} classes) does not list; "
            "check the spelling"
        )


def _without(names: Iterable[str], removed: Iterable[str]) -> tuple[str, ...]:
    dropped = set(removed)
    return tuple(name for name in names if name not in dropped)


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(map(repr, names[:3]))
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
