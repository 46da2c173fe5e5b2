"""The images and classes of a run, and how its folder remembers them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ueo_fast.finetune.commands.finetune_config import FinetuneConfig
from ueo_fast.finetune.data.benchmarks import load_benchmark
from ueo_fast.finetune.data.image_list import ImageList, check_root, read_class_names, read_images
from ueo_fast.finetune.data.labels import match_labels
from ueo_fast.finetune.data.names import counted
from ueo_fast.finetune.files.records import as_record
from ueo_fast.finetune.files.run_folder import RunFolder

IMAGES = "images.json"


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


def read_problem(config: FinetuneConfig) -> Problem:
    """The images and classes that the options name.

    Raises:
        OSError, ValueError: something is missing or cannot be understood.
    """
    if config.dataset is not None:
        assert config.domain is not None
        assert config.root is not None
        found = load_benchmark(
            config.dataset,
            config.domain,
            config.scenario,
            config.root,
            check_counts=config.check_counts,
        )
        return Problem(
            found.known,
            Labelled(found.train, found.train_labels),
            Labelled(found.test, found.test_labels),
        )
    assert config.classes is not None
    assert config.data is not None
    known = read_class_names(config.classes)
    check_root(config.data_root, config.data, config.test_data)
    train = _read(config, config.data, known)
    if config.method == "oracle" and train.labels is None:  # before anything is computed
        raise ValueError(
            f"method='oracle' reads the labels of the images, but data={config.data!r} has none: "
            f"{train.note or 'give class folders, or a list or CSV with labels'}"
        )
    if config.test_data is None:
        return Problem(known, train, None)
    test = _read(config, config.test_data, known)
    if test.labels is None:
        raise ValueError(
            f"test_data={config.test_data!r} has no labels to measure by: "
            f"{test.note or 'give class folders, or a list or CSV with labels'}"
        )
    return Problem(known, train, test)


def _read(config: FinetuneConfig, source: str, known: tuple[str, ...]) -> Labelled:
    images = read_images(source, root=config.data_root, follow_links=config.follow_links)
    return Labelled.of(images, known)


def write_problem(folder: RunFolder, problem: Problem) -> None:
    """Keep the lists in the run folder: a resumed run sees the same images, whatever was added to
    the user's folder since."""
    lists = {"train": problem.train, "test": problem.test}
    folder.write_json(
        IMAGES,
        {
            "known": list(problem.known),
            **{name: None if part is None else _to_json(part) for name, part in lists.items()},
        },
    )


def reread_problem(folder: RunFolder) -> Problem:
    """What :func:`write_problem` kept."""
    return folder.read_json(IMAGES, lambda value: as_record(_Lists)(value).problem())


@dataclass(frozen=True)
class _List:
    """One list of images in the file, as :func:`_to_json` writes it."""

    names: tuple[str, ...]
    paths: tuple[str, ...]
    labels: tuple[str | int | None, ...] | None
    positions: tuple[int, ...] | None
    note: str

    def labelled(self, classes: int) -> Labelled:
        images = ImageList(self.paths, self.names, self.labels)
        if not images.paths:
            raise ValueError("a list has no images")
        if self.positions is None:
            return Labelled(images, None, self.note)
        if len(self.positions) != len(images):
            raise ValueError(f"{len(self.positions)} positions are of {len(images)} images")
        if not all(-1 <= position < classes for position in self.positions):
            raise ValueError(f"a position is not in -1..{classes - 1}")
        return Labelled(
            images, torch.tensor(self.positions, dtype=torch.int64, device="cpu"), self.note
        )


@dataclass(frozen=True)
class _Lists:
    known: tuple[str, ...]
    train: _List
    test: _List | None

    def problem(self) -> Problem:
        if not self.known:
            raise ValueError("known has no class")
        train, test = self.train, self.test
        classes = len(self.known)
        return Problem(
            self.known, train.labelled(classes), None if test is None else test.labelled(classes)
        )


def _to_json(part: Labelled) -> dict[str, Any]:
    return {
        "names": list(part.images.names),
        "paths": [os.path.abspath(path) for path in part.images.paths],
        "labels": None if part.images.labels is None else list(part.images.labels),
        "positions": None if part.labels is None else part.labels.tolist(),
        "note": part.note,
    }
