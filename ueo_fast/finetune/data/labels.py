"""Lists of class names, and the labels of images as positions in them."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ueo_fast.finetune.data.image_list import ImageList
from ueo_fast.finetune.data.names import (
    clean_name,
    counted,
    lines,
    listed,
    loose_name,
    plural,
    read_text,
    shown,
    whole_number,
)

if TYPE_CHECKING:
    from torch import Tensor


def read_class_names(path: str | os.PathLike[str]) -> tuple[str, ...]:
    """Read class names from a UTF-8 file, one per line.

    Blank lines and lines that begin with ``#`` are skipped.

    Raises:
        OSError: the file cannot be read.
        ValueError: it names no class, two that are the same to a prompt, or is not UTF-8.
    """
    if os.path.isdir(path):
        raise IsADirectoryError(
            f"classes={os.fspath(path)!r} is a folder; give a text file with one class name per "
            "line"
        )
    names: list[str] = []
    first: dict[str, int] = {}
    for number, name in lines(read_text(Path(path))):
        if name.startswith("#"):
            continue
        cleaned = clean_name(name)
        if not cleaned:
            raise ValueError(f"{path}, line {number}: {name!r} is blank; name the class")
        if cleaned in first:
            raise ValueError(
                f"{path}, line {number}: {name!r} is there already, in line {first[cleaned]} "
                "(case, underscores and spaces do not distinguish classes); list it once"
            )
        first[cleaned] = number
        names.append(name)
    if not names:
        raise ValueError(f"{path} names no class; write one class name per line")
    return tuple(names)


def match_labels(
    images: ImageList,
    class_names: Sequence[str],
    *,
    on_note: Callable[[str], object] | None = None,
) -> Tensor | None:
    """Labels of images as positions in ``class_names``: the same rule wherever they come from.

    1. A label that is a class name is that class; case, underscores and repeated spaces do not
       matter, as they do not to a prompt.
    2. Otherwise, a label that differs from a class name only in hyphens and spaces (``T-shirt``,
       ``tshirt``) or in how a number is written (``1.0``, ``01``) is that class.
    3. If no label is a class name, whole numbers (also ``1.0``) are places in ``class_names``,
       counted from 0; other labels (``unknown``) and other numbers are unknown.

    Every other label is unknown.

    Args:
        images: with or without labels.
        class_names: C of them.
        on_note: called with a sentence on what the user should check: numbers taken as places, and
            unknown labels with their counts.

    Returns:
        (N,) int64 on the CPU, -1 for a label that is not among the classes; ``None`` if no label
        is: then the folders are not classes, and there is nothing to measure by.

    Raises:
        ValueError: two ``class_names`` are the same, a label can be read in two ways, or some
            images have a label that is a class and others have no label at all.
    """
    import torch

    names = _ClassNames(class_names)
    if images.labels is None:
        return None
    # An int is read like a number in a text.
    labels = [None if label is None else str(label) for label in images.labels]
    counts = Counter(label for label in labels if label is not None)
    places = {label: place for label in counts if (place := names.find(label)) is not None}
    numbers = {label: n for label in counts if (n := whole_number(label)) is not None}
    note = ""
    if places:
        _refuse_two_readings(class_names, places, numbers)
    else:
        places = {label: n for label, n in numbers.items() if 0 <= n < len(class_names)}
        if not places:
            return None
        note = _note_on_places(class_names, places, numbers)
        note += _note_on_folders(images.names, labels, class_names, places)
    missing = [name for name, label in zip(images.names, labels, strict=True) if label is None]
    if missing:
        raise ValueError(
            f"{counted(missing)} of {len(images)} images {'has' if len(missing) == 1 else 'have'} "
            "no label, while others have labels that are classes; give every image a label, or "
            "none. In a folder, move the images outside the class folders into one; if its name is "
            "not a class, they are unknown"
        )
    unknown = Counter({label: n for label, n in counts.items() if label not in places})
    notes = [note, _note_on_unknown(unknown)]
    for text in notes:
        if text and on_note is not None:
            on_note(text)
    return torch.tensor(
        [-1 if label is None else places.get(label, -1) for label in labels],
        dtype=torch.int64,
        device="cpu",
    )


class _ClassNames:
    """Finds the class that a label names."""

    def __init__(self, class_names: Sequence[str]) -> None:
        self._names = class_names
        self._exact: dict[str, int] = {}
        self._loose: dict[str, list[int]] = {}
        for index, name in enumerate(class_names):
            first = self._exact.setdefault(clean_name(name), index)
            if first != index:
                raise ValueError(
                    f"class_names has both {class_names[first]!r} and {name!r}; list each class "
                    "once"
                )
            self._loose.setdefault(loose_name(name), []).append(index)

    def find(self, label: str) -> int | None:
        """The class's position; ``None`` where there is none of that name."""
        exact = self._exact.get(clean_name(label))
        if exact is not None:
            return exact
        found = self._loose.get(loose_name(label), [])
        if len(found) > 1:
            readings = " or ".join(repr(self._names[index]) for index in found)
            raise ValueError(
                f"the label {label!r} can be read as {readings}; write the name of the class as it "
                "is in your list"
            )
        return found[0] if found else None


def _refuse_two_readings(
    class_names: Sequence[str], places: dict[str, int], numbers: dict[str, int]
) -> None:
    """Refuse numbers of which only some are names of classes, but all could be places."""
    others = sorted(numbers.keys() - places.keys(), key=numbers.__getitem__)
    could_be_places = all(0 <= number < len(class_names) for number in numbers.values())
    if not others or not could_be_places or not places.keys() <= numbers.keys():
        return
    some = sorted(places, key=numbers.__getitem__)
    first = some[0]
    numerals = sorted(numbers, key=numbers.__getitem__)
    raise ValueError(
        f"the labels {listed(numerals)} can be read in two ways: as "
        f"names of classes ({first} is the class {class_names[places[first]]!r}, and "
        f"{listed(others)} are of no class on your list) or as places in your list, counted from 0 "
        f"({first} is {class_names[numbers[first]]!r}, {others[0]} is "
        f"{class_names[numbers[others[0]]]!r}). If they are names, write a word for those that are "
        "on no list (unknown); if they are places, write the names of the classes instead"
    )


def _note_on_places(
    class_names: Sequence[str], places: dict[str, int], numbers: dict[str, int]
) -> str:
    some = sorted(places, key=places.__getitem__)[:2]
    examples = ", ".join(f"{shown(label)} is {class_names[places[label]]!r}" for label in some)
    note = f"numbers in the labels are taken as places in your list, counted from 0: {examples}"
    if 0 in numbers.values():
        return note
    largest = max(numbers.values())
    last = f" and the largest is {largest}, the number of your classes" * (
        largest == len(class_names)
    )
    return (
        f"{note} (no label is 0{last}: if they count from 1, every image is taken for one of the "
        "next class; then subtract 1, or write the names)"
    )


def _note_on_folders(
    names: Sequence[str],
    labels: Sequence[str | None],
    class_names: Sequence[str],
    places: dict[str, int],
) -> str:
    """Folders reveal numbers that count in another order than the list's classes."""
    folders = {clean_name(name): place for place, name in enumerate(class_names)}
    pairs = Counter(
        (os.path.basename(os.path.dirname(name)), label)
        for name, label in zip(names, labels, strict=True)
    )
    wrong = [
        (folder, label)
        for folder, label in pairs
        if label in places and folders.get(clean_name(folder), places[label]) != places[label]
    ]
    if not wrong:
        return ""
    count = sum(pairs[pair] for pair in wrong)
    folder, label = wrong[0]
    return (
        f"; but {plural(count, 'image')} {'lies' if count == 1 else 'lie'} in the folder of "
        f"another class: {shown(folder)} has the label {label}, {class_names[places[label]]!r} (is "
        "your list of classes in the order of the labels?)"
    )


def _note_on_unknown(unknown: Counter[str]) -> str:
    if not unknown:
        return ""
    total = sum(unknown.values())
    most = sorted(unknown, key=lambda label: (-unknown[label], label))
    counts = listed([f"{label} ({unknown[label]})" for label in most], 8)
    return (
        f"{plural(total, 'image')} with a label that is not on your list "
        f"{'counts' if total == 1 else 'count'} as unknown: {counts}"
    )
