"""The paper's data sets as adaptation problems: which images, which classes, which labels."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ueo_fast.finetune.data.image_list import ImageList, read_images
from ueo_fast.finetune.data.names import counted, plural, whole_number
from ueo_fast.finetune.data.shifts import SHIFTS, CategorySplit, split_classes
from ueo_fast.ranges import check_one_of

if TYPE_CHECKING:
    from torch import Tensor


class ClassCounts(NamedTuple):
    """Class counts of a data set in the paper: known, total, and those seen in training."""

    known: int
    total: int
    pda: int  # known classes in training under PDA
    opda: int  # known classes in training under OPDA
    train_unknown: int  # unknown classes in training under ODA and OPDA


@dataclass(frozen=True)
class DataSet:
    """A data set of several domains.

    Attributes:
        title: as it is written.
        counts: images by domain, (all, all), or (train, test) where ``split``. The domains are
            called, and ordered, as in the authors' code.
        classes: how many the paper uses.
        split: training and test images are different ones, told apart by two lists.
        source: where to get it.
        aliases: other names of domains and their folders, without spaces and capitals.
    """

    title: str
    counts: Mapping[str, tuple[int, int]]
    classes: ClassCounts
    split: bool
    source: str
    aliases: Mapping[str, str]

    def list_names(self, domain: str) -> tuple[tuple[str, str], ...]:
        """List files of ``domain``, for training and test, as the authors call them; Office-31's
        are ``amazon/images_list.txt`` in their code and ``amazon_list.txt`` elsewhere."""
        if self.split:
            return ((f"{domain}_train.txt", f"{domain}_test.txt"),)
        names = (f"{domain}_list.txt", f"{domain}/images_list.txt")
        return tuple((name, name) for name in names)


DATA_SETS: dict[str, DataSet] = {
    "office31": DataSet(
        title="Office-31",
        counts={"amazon": (2817, 2817), "dslr": (498, 498), "webcam": (795, 795)},
        classes=ClassCounts(known=25, total=31, pda=20, opda=15, train_unknown=3),
        split=False,
        source="https://faculty.cc.gatech.edu/~judy/domainadapt/",
        aliases={},
    ),
    "officehome": DataSet(
        title="Office-Home",
        counts={
            "Art": (2427, 2427),
            "Clipart": (4365, 4365),
            "Product": (4439, 4439),
            "RealWorld": (4357, 4357),
        },
        classes=ClassCounts(known=50, total=65, pda=35, opda=35, train_unknown=10),
        split=False,
        source="https://www.hemanthdv.org/officeHomeDataset.html",
        aliases={"real": "RealWorld"},
    ),
    "visdac": DataSet(
        title="VisDA-C",
        counts={"train": (152397, 152397), "validation": (55388, 55388)},
        classes=ClassCounts(known=8, total=12, pda=6, opda=6, train_unknown=2),
        split=False,
        source="https://github.com/VisionLearningGroup/taskcv-2017-public/tree/master/classification",
        aliases={"val": "validation"},
    ),
    "domainnet": DataSet(
        title="DomainNet (cleaned version)",
        counts={
            "clipart": (33525, 14604),
            "infograph": (36023, 15582),
            "painting": (50416, 21850),
            "quickdraw": (120750, 51750),
            "real": (120906, 52041),
            "sketch": (48212, 20916),
        },
        classes=ClassCounts(known=300, total=345, pda=250, opda=250, train_unknown=30),
        split=True,
        source="http://ai.bu.edu/M3SDA/",
        aliases={},
    ),
}
"""The four data sets of the paper.

Sources: numbers of classes from Liang et al., 2024, section 4.1, as in the authors' ``demo.py``;
numbers of images from the publishers' pages, for DomainNet's lists as in the TensorFlow Datasets
catalogue.
"""


@cache
def class_names(dataset: str) -> tuple[str, ...]:
    """All classes of a key of :data:`DATA_SETS`, in the authors' order (their ``demo.py``)."""
    path = files("ueo_fast.finetune.data") / "classes" / f"{dataset}.txt"
    lines = path.read_text(encoding="utf-8").splitlines()
    return tuple(line for line in lines if not line.startswith("#"))


def benchmark_split(dataset: str, shift: str, class_names: Sequence[str]) -> CategorySplit:
    """The split that the paper uses on one of its data sets.

    Args:
        dataset: a key of :data:`DATA_SETS`.
        shift: one of :data:`~ueo_fast.finetune.data.shifts.SHIFTS`; under CSDA all classes are
            known, as in the authors' code.
        class_names: all classes in the *authors'* order, which decides what is known. It is not
            ImageFolder's order: ASCII sorting puts capitals first and would move most of
            DomainNet's classes.

    Raises:
        ValueError: unknown ``dataset`` or ``shift``, or a number of names other than the data
            set's.
    """
    check_one_of("dataset", dataset, DATA_SETS)
    counts = DATA_SETS[dataset].classes
    if len(class_names) != counts.total:
        raise ValueError(
            f"class_names has {len(class_names)} names, but {dataset} has {counts.total} classes; "
            "pass all of them in the authors' order"
        )
    return split_classes(
        shift,
        class_names if shift == "CSDA" else class_names[: counts.known],
        class_names,
        train_known={"PDA": counts.pda, "OPDA": counts.opda}.get(shift),
        train_unknown=counts.train_unknown if shift in ("ODA", "OPDA") else None,
    )


@dataclass(frozen=True)
class BenchmarkProblem:
    """One adaptation problem of the paper.

    Attributes:
        known: the classes on the user's list.
        train: N unlabelled images for the adaptation.
        train_labels: (N,) int64, position in ``known``, -1 for unknown. For measuring only.
        test: M test images. In Office-31, Office-Home and VisDA-C the training images are among
            them: the setting is transductive.
        test_labels: (M,) int64, likewise.
        split: the classes of training and test.
    """

    known: tuple[str, ...]
    train: ImageList
    train_labels: Tensor
    test: ImageList
    test_labels: Tensor
    split: CategorySplit


def load_benchmark(
    dataset: str,
    domain: str,
    scenario: str,
    root: str | os.PathLike[str],
    *,
    check_counts: bool = True,
) -> BenchmarkProblem:
    """Find the images of a domain and split its classes as the paper does.

    Where ``root`` has the authors' list files, these are read: ``<domain>_list.txt`` (for Office-31
    also ``<domain>/images_list.txt``), or ``<domain>_train.txt`` and ``<domain>_test.txt`` for
    DomainNet, whose lists are part of it; each line is ``path label``, with the path relative to
    ``root`` and the label an index into the authors' class list. Otherwise, the folders as they
    were published: ``<domain>/<class>/...`` or ``<domain>/images/<class>/...``. Capitals,
    underscores, hyphens and spaces in folder names do not matter.

    Args:
        dataset: ``office31``, ``officehome``, ``visdac`` or ``domainnet``.
        domain: of the data set, such as ``art``; capitals do not matter.
        scenario: one of :data:`ueo_fast.finetune.data.shifts.SHIFTS`.
        root: folder with the lists or with the domains' folders.
        check_counts: insist on the published number of images.

    Raises:
        OSError: files or folders are missing.
        ValueError: an unknown name, labels that contradict the folders, or other numbers of images
            than published.
    """
    dataset, domain, scenario = check_names(dataset, domain, scenario, root)
    facts = DATA_SETS[dataset]
    classes = class_names(dataset)
    split = benchmark_split(dataset, scenario, classes)
    train, test = _find(facts, domain, classes, Path(root))
    if check_counts:
        for part, images, count in zip(
            ("train", "test"), (train, test), facts.counts[domain], strict=True
        ):
            which = f"{domain} ({part})" if facts.split else domain
            _check_count(facts, which, images, classes, count)
    train = _of_classes(train, split.train)
    if not len(train):
        raise ValueError(
            f"{facts.title}, {domain}: no image of the classes that {scenario} trains on, "
            f"{counted(split.train)}; their images are missing"
        )
    return BenchmarkProblem(
        split.known, train, _labels(train, split), test, _labels(test, split), split
    )


def check_names(
    dataset: str, domain: str, scenario: str, root: str | os.PathLike[str]
) -> tuple[str, str, str]:
    """Data set, domain and scenario as this package spells them; arguments and errors as of
    :func:`load_benchmark`."""
    dataset = _choose("dataset", dataset, {_simple(key): key for key in DATA_SETS})
    facts = DATA_SETS[dataset]
    domains = {**{_simple(name): name for name in facts.counts}, **facts.aliases}
    domain = _choose("domain", domain, domains)
    scenario = _choose("scenario", scenario, {_simple(shift): shift for shift in SHIFTS})
    if not os.path.isdir(root):
        raise FileNotFoundError(f"root={os.fspath(root)!r} is not a folder")
    return dataset, domain, scenario


def _choose(argument: str, value: str, choices: dict[str, str]) -> str:
    chosen = choices.get(_simple(value), value)
    check_one_of(argument, chosen, dict.fromkeys(choices.values()))
    return chosen


def _simple(name: str) -> str:
    """Letters and digits only: ``Real World``, ``RealWorld`` and ``real_world`` are one."""
    return re.sub(r"[\W_]+", "", name).casefold()


def _find(
    facts: DataSet, domain: str, classes: Sequence[str], root: Path
) -> tuple[ImageList, ImageList]:
    """Training and test images of a domain; their labels are names of classes."""
    lists = facts.list_names(domain)
    for names in lists:
        if all((root / name).is_file() for name in names):
            train, test = (_read_list(facts, root / name, root, classes) for name in names)
            return train, test
    folders = [entry for entry in sorted(root.iterdir()) if entry.is_dir()]
    wanted = {_simple(domain), *(key for key, name in facts.aliases.items() if name == domain)}
    found = [folder for folder in folders if _simple(folder.name) in wanted]
    if facts.split or not found:
        wanted_lists = " and ".join(dict.fromkeys(lists[0]))
        tree = "" if facts.split else f", nor a folder {domain}/ with one folder per class"
        raise FileNotFoundError(
            f"{root} does not have {wanted_lists}{tree}. What it has: "
            f"{', '.join(sorted(os.listdir(root))[:8]) or 'nothing'}. {_where(facts)}"
        )
    images = _read_tree(facts, found[0], root, classes)
    return images, images


def _read_tree(facts: DataSet, folder: Path, root: Path, classes: Sequence[str]) -> ImageList:
    if (folder / "images").is_dir():  # Office-31
        folder = folder / "images"
    images = read_images(folder, follow_links=True)  # their numbers are checked
    by_folder = {_simple(name): name for name in classes}
    labels = [
        by_folder.get(_simple(str(label))) for label in images.labels or (None,) * len(images)
    ]
    missing = [name for name in classes if name not in labels]
    if missing:
        raise FileNotFoundError(
            f"{folder}: {counted(missing)} of {len(classes)} classes have no folder with images. "
            f"{_where(facts)}"
        )
    rows = [row for row, label in enumerate(labels) if label is not None]
    prefix = folder.relative_to(root).as_posix()
    return replace(
        images.subset(rows),
        names=tuple(f"{prefix}/{images.names[row]}" for row in rows),
        labels=tuple(labels[row] for row in rows),
    )


def _read_list(facts: DataSet, path: Path, root: Path, classes: Sequence[str]) -> ImageList:
    try:
        images = read_images(path, root=root)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}. {_where(facts)}") from error
    by_folder = {_simple(name): index for index, name in enumerate(classes)}
    labels: list[str] = []
    for name, written in zip(images.names, images.labels or (None,) * len(images), strict=True):
        label = None if written is None else whole_number(str(written))
        if label is None or not 0 <= label < len(classes):
            raise ValueError(
                f"{path}: {name!r} has the label {written!r}; a number from 0 to "
                f"{len(classes) - 1} is needed, the class's place in the authors' order"
            )
        # Lists in another order of classes (ImageFolder's) exist, and numbers alone do not show it.
        own = by_folder.get(_simple(os.path.basename(os.path.dirname(name))), label)
        if own != label:
            raise ValueError(
                f"{path}: {name!r} lies in the folder of {classes[own]!r} ({own}), but its label "
                f"is {label}, {classes[label]!r}: the list has another order of classes than the "
                "authors. Take a list in their order"
                + ("" if facts.split else ", or move it away: then the folders are read")
            )
        labels.append(classes[label])
    return ImageList(images.paths, images.names, tuple(labels))


def _check_count(
    facts: DataSet, which: str, images: ImageList, classes: Sequence[str], count: int
) -> None:
    if len(images) == count:
        return
    per_class = Counter(images.labels or ())
    empty = [name for name in classes if not per_class[name]]
    raise ValueError(
        f"{facts.title}, {which}: found {plural(len(images), 'image')}, but {count:,} were "
        f"published{f'; no image of {counted(empty)} classes' if empty else ''}. "
        f"{_where(facts)}, or use what is there with --check-counts false (check_counts=False)"
    )


def _where(facts: DataSet) -> str:
    return f"Get {facts.title} at {facts.source}"


def _of_classes(images: ImageList, names: Sequence[str]) -> ImageList:
    wanted = set(names)
    return images.subset(
        [row for row, label in enumerate(images.labels or ()) if str(label) in wanted]
    )


def _labels(images: ImageList, split: CategorySplit) -> Tensor:
    import torch

    positions = {name: split.label(name) for name in split.test}
    labels = [positions[str(label)] for label in images.labels or ()]
    return torch.tensor(labels, dtype=torch.int64, device="cpu")
