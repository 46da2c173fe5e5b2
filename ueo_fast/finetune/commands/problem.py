"""The images and classes of a run, and how its folder remembers them."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from torch import Tensor

from ueo_fast.finetune.commands.finetune_config import DataOptions
from ueo_fast.finetune.data.benchmarks import load_benchmark
from ueo_fast.finetune.data.image_list import ImageList, check_root, read_images
from ueo_fast.finetune.data.labels import match_labels, read_class_names
from ueo_fast.finetune.data.names import counted
from ueo_fast.finetune.files.records import as_record
from ueo_fast.finetune.files.run_files import IMAGES, ImageLists, ListedImages
from ueo_fast.finetune.files.run_folder import RunFolder


@dataclass(frozen=True)
class Labelled:
    """Images, and labels to measure by where there are some.

    Attributes:
        images: N of them.
        labels: (N,) int64, position among the known classes, -1 for unknown, or ``None``.
        note: what the user should know of the labels: how they were read, which are unknown, or why
            there are none where one may have expected some; else empty.
    """

    images: ImageList
    labels: Tensor | None
    note: str = ""

    @classmethod
    def of(cls, images: ImageList, known: tuple[str, ...]) -> Labelled:
        """With the labels that ``images`` has; without any where they cannot be used."""
        notes: list[str] = []
        try:
            labels = match_labels(images, known, on_note=notes.append)
        except ValueError as error:  # labels serve metrics only: the run can do without
            return cls(images, None, f"the labels are not used, so there are no metrics: {error}")
        if labels is None and images.labels is not None:
            some = [str(label) for label in dict.fromkeys(images.labels) if label is not None]
            notes.append(
                f"none of the labels, {counted(some)}, is the name of a class on your list or a "
                f"place in it (0 to {len(known) - 1}), so they are not used and there are no "
                "metrics"
            )
        return cls(images, labels, "; ".join(notes))

    def remarks(self) -> list[str]:
        """What the user should know of the images and their labels, a sentence each."""
        return [*self.images.remarks(), *([self.note] if self.note else [])]

    def subset(self, positions: Tensor) -> Labelled:
        """The images at ``positions``."""
        labels = None if self.labels is None else self.labels[positions]
        return Labelled(self.images.subset(positions), labels, self.note)


@dataclass(frozen=True)
class Problem:
    """What a run is about.

    Attributes:
        known: the user's classes.
        train: the images to adapt to.
        test: those that metrics and predictions are about; ``None``: the training images.
    """

    known: tuple[str, ...]
    train: Labelled
    test: Labelled | None

    @property
    def tested(self) -> Labelled:
        """``test``, or the training images."""
        return self.train if self.test is None else self.test

    def unknown(self) -> list[str]:
        """Names of the labelled classes that are not known, in order of appearance."""
        if self.tested.labels is None or self.tested.images.labels is None:
            return []
        pairs = zip(self.tested.images.labels, self.tested.labels.tolist(), strict=True)
        return list(dict.fromkeys(str(name) for name, position in pairs if position < 0))


def read_problem(options: DataOptions, *, needs_labels: bool = False) -> Problem:
    """The images and classes that the options name.

    Args:
        options: of the data.
        needs_labels: the method reads the labels of the images.

    Raises:
        OSError, ValueError: something is missing or cannot be understood.
    """
    if options.dataset is not None:
        assert options.domain is not None
        assert options.root is not None
        found = load_benchmark(
            options.dataset,
            options.domain,
            options.scenario,
            options.root,
            check_counts=options.check_counts,
        )
        return Problem(
            found.known,
            Labelled(found.train, found.train_labels),
            Labelled(found.test, found.test_labels),
        )
    assert options.classes is not None
    assert options.data is not None
    known = read_class_names(options.classes)
    check_root(options.data_root, options.data, options.test_data)
    train = _read(options, options.data, known)
    if needs_labels and train.labels is None:  # before anything is computed
        raise ValueError(
            f"method='oracle' reads the labels of the images, but data={options.data!r} has none: "
            f"{train.note or 'give class folders, or a list or CSV with labels'}"
        )
    if options.test_data is None:
        return Problem(known, train, None)
    test = _read(options, options.test_data, known)
    if test.labels is None:
        raise ValueError(
            f"test_data={options.test_data!r} has no labels to measure by: "
            f"{test.note or 'give class folders, or a list or CSV with labels'}"
        )
    return Problem(known, train, test)


def _read(options: DataOptions, source: str, known: tuple[str, ...]) -> Labelled:
    images = read_images(source, root=options.data_root, follow_links=options.follow_links)
    return Labelled.of(images, known)


def write_problem(folder: RunFolder, problem: Problem) -> None:
    """Keep the lists in the run folder: a resumed run sees the same images, whatever was added to
    the user's folder since."""
    test = None if problem.test is None else _listed(problem.test)
    folder.write_json(IMAGES, ImageLists(problem.known, _listed(problem.train), test))


def _listed(part: Labelled) -> ListedImages:
    return ListedImages(
        part.images.names,
        tuple(os.path.abspath(path) for path in part.images.paths),
        part.images.labels,
        None if part.labels is None else tuple(part.labels.tolist()),
        part.note,
    )


def reread_problem(folder: RunFolder) -> Problem:
    """What :func:`write_problem` kept."""
    return folder.read_json(IMAGES, lambda value: _problem(as_record(ImageLists)(value)))


def _problem(lists: ImageLists) -> Problem:
    if not lists.known:
        raise ValueError("known has no class")
    classes = len(lists.known)
    test = None if lists.test is None else _labelled(lists.test, classes)
    return Problem(lists.known, _labelled(lists.train, classes), test)


def _labelled(listed: ListedImages, classes: int) -> Labelled:
    images = ImageList(listed.paths, listed.names, listed.labels)
    if not images.paths:
        raise ValueError("a list has no images")
    if listed.positions is None:
        return Labelled(images, None, listed.note)
    if len(listed.positions) != len(images):
        raise ValueError(f"{len(listed.positions)} positions are of {len(images)} images")
    if not all(-1 <= position < classes for position in listed.positions):
        raise ValueError(f"a position is not in -1..{classes - 1}")
    labels = torch.tensor(listed.positions, dtype=torch.int64, device="cpu")
    return Labelled(images, labels, listed.note)
