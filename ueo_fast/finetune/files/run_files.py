"""The files of a run folder: what each is called, and what is in it.

Every part that writes, reads, compares or shows a run takes its names and records from here.
:class:`~ueo_fast.finetune.files.run_folder.RunFolder` reads and writes them: a record's fields are
the keys of a JSON object, in their order, and their types are checked.
"""

from __future__ import annotations

import base64
import csv
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

from ueo_fast.finetune.files.records import BrokenFileError, Range, read_lines

CONFIG = "config.json"  # the options of the command
ENVIRONMENT = "environment.json"  # RunFolder.write_environment
BASE_MODEL = "base_model.json"  # BaseModel of clip/base_model.py
IMAGES = "images.json"  # ImageLists
PROBLEM = "problem.json"  # ProblemSummary
ZERO_SHOT = "zero_shot.safetensors"  # cosines: "train", and "test" where these are other images
CHECKPOINT = "checkpoint.safetensors"
STEPS = "train.jsonl"  # StepRecord
EPOCHS = "epochs.jsonl"  # EpochRecord
WARNINGS = "warnings.jsonl"  # WarningRecord
MEASURED = "metrics.jsonl"  # MetricsRecord
PREDICTIONS = "predictions.csv"  # PREDICTION_COLUMNS
THUMBNAILS = "thumbnails.json"  # the path in predictions.csv -> Thumbnail
DELTA = "delta.safetensors"
FINISHED = "finished.json"  # Finished
REPORT = "report.html"
WANDB = "wandb.json"  # the id of the run's page at Weights & Biases
TENSORBOARD = "tensorboard"  # a folder, as is the next
CACHE = "cache"

Fraction = Annotated[float, Range(0, 1, "a fraction in 0..1")]


@dataclass(frozen=True)
class ListedImages:
    """The images of one list, N of them.

    Attributes:
        names: what the user sees of each path.
        paths: absolute.
        labels: as the data has them; ``None`` where it has none.
        positions: 0..C-1, the known class; -1 for an unknown one. ``None`` where no labels are
            used.
        note: what the user should know of the labels.
    """

    names: tuple[str, ...]
    paths: tuple[str, ...]
    labels: tuple[str | int | None, ...] | None
    positions: tuple[int, ...] | None
    note: str


@dataclass(frozen=True)
class ImageLists:
    """``images.json``: the images that a resumed run sees again. Without ``test``, metrics and
    predictions are about ``train``."""

    known: tuple[str, ...]
    train: ListedImages
    test: ListedImages | None


@dataclass(frozen=True)
class Skipped:
    """An image that could not be read, and why."""

    image: str
    reason: str


@dataclass(frozen=True)
class ProblemSummary:
    """``problem.json``: classes and images.

    Attributes:
        known: names of the C known classes, in the order of the prompts.
        unknown: names of the labelled classes that are not known.
        train_images: how many images are adapted to.
        test_images: how many the metrics are about.
        labelled: whether the test images have labels.
        skipped: images that could not be read.
        left_out: for ``train`` and ``test``, kinds of other files and how many of each.
        followed: for the same, links that led to images.
    """

    known: tuple[str, ...]
    unknown: tuple[str, ...]
    train_images: int
    test_images: int
    labelled: bool
    skipped: tuple[Skipped, ...] = ()
    left_out: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    followed: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class StepRecord:
    """One gradient step, a line of ``train.jsonl``.

    Attributes:
        step: steps done, from 1.
        total: steps in all.
        epoch: from 1.
        loss: value of the method's loss.
        conditional_entropy: mean entropy of the batch's predictions, nats; every image weighs the
            same, so that methods can be compared.
        marginal_entropy: entropy of the batch's mean prediction, nats, at most log C.
        largest_share: share of the batch that is put into the most frequent class.
        learning_rates: by group, ``prompt`` and ``affine``, those of this step.
        seconds: that the step took, loading included.
    """

    step: int
    total: int
    epoch: int
    loss: float
    conditional_entropy: float
    marginal_entropy: float
    largest_share: float
    learning_rates: dict[str, float]
    seconds: float


@dataclass(frozen=True)
class EpochRecord:
    """One pass over the images as training saw them, a line of ``epochs.jsonl``.

    Attributes:
        epoch: from 1.
        loss: mean over steps.
        conditional_entropy: mean over the epoch's images, nats.
        marginal_entropy: entropy of the epoch's mean prediction, nats.
        histogram: images per predicted class, C numbers.
    """

    epoch: int
    loss: float
    conditional_entropy: float
    marginal_entropy: float
    histogram: tuple[int, ...]

    @property
    def mutual_information(self) -> float:
        """Marginal minus conditional entropy, nats: high where predictions are sure and spread."""
        return self.marginal_entropy - self.conditional_entropy


@dataclass(frozen=True)
class WarningRecord:
    """Something that looked wrong, a line of ``warnings.jsonl``; ``step`` is 0 before the first."""

    step: int | None
    text: str


class Metric(NamedTuple):
    """How a metric is shown, in percent.

    Attributes:
        title: its name.
        of_scores: whether it is of the MCM score, with known images as the positive class.
        low_is_good: whether a lower value is better.
    """

    title: str
    of_scores: bool = False
    low_is_good: bool = False

    @property
    def heading(self) -> str:
        """The title, with what a reader may not expect."""
        return f"{self.title} (low is good)" if self.low_is_good else self.title


@dataclass(frozen=True, kw_only=True)
class MetricsRecord:
    """Metrics of one classifier on one set of images, a line of ``metrics.jsonl``.

    Attributes:
        method: name of the method; ``zeroshot`` for the model that the run started with.
        title: how tables write it.
        epoch: 0 before training.
        stage: of the run.
        seed: of the run.
        split: ``test`` or ``train`` images; ``online`` are the training images, each predicted as
            it was met.
        class_accuracies: of each known class; ``None`` for a class without images. The six metrics
            before it are those of :class:`~ueo_fast.finetune.evaluation.metrics.Metrics`, as are
            the other fields.
    """

    method: str
    title: str
    epoch: int
    stage: Literal["before", "during", "after"]
    seed: int
    split: Literal["test", "train", "online"]
    per_class_accuracy: Fraction | None = field(metadata={"metric": Metric("per-class accuracy")})
    accuracy: Fraction | None = field(metadata={"metric": Metric("accuracy")})
    auroc: Fraction | None = field(metadata={"metric": Metric("AUROC", of_scores=True)})
    aupr: Fraction | None = field(metadata={"metric": Metric("AUPR", of_scores=True)})
    fpr95: Fraction | None = field(metadata={"metric": Metric("FPR95", True, low_is_good=True)})
    hm: Fraction | None = field(metadata={"metric": Metric("HM")})
    class_accuracies: tuple[Fraction | None, ...]
    missing_classes: tuple[int, ...] = ()
    known_images: int
    unknown_images: int
    positive_class: str = "known"

    @property
    def values(self) -> dict[str, float | None]:
        """The metrics, by the names of :data:`METRICS`; ``None`` where not defined."""
        return {name: getattr(self, name) for name in METRICS}


METRICS: Mapping[str, Metric] = {
    one.name: one.metadata["metric"] for one in fields(MetricsRecord) if one.metadata
}
"""Every metric, in the order of tables. To add one, add a field above and compute it in
``evaluation/metrics.py``."""

HEADLINE = ("per_class_accuracy", "auroc", "hm")
"""Those that say most, where there is room for few."""


@dataclass(frozen=True)
class Threshold:
    """From which MCM score on an image counts as known; ``value`` is ``None`` where the scores
    allow no threshold."""

    rule: str
    value: Fraction | None


@dataclass(frozen=True)
class Finished:
    """``finished.json``, written when all results are there.

    Attributes:
        stopped: why training ended early; ``None`` where it did not.
        seconds: that the run took, or its last part if it was resumed.
        threshold: of ``known`` in ``predictions.csv``.
    """

    stopped: str | None = None
    seconds: float | None = None
    threshold: Threshold | None = None


LONGEST_SIDE = 160
"""Pixels of a thumbnail; at some 6 kB each, two dozen leave a page small."""
_MOST_JPEG = 100_000  # bytes: more than any that a run makes
_Pixels = Annotated[int, Range(0, LONGEST_SIDE, f"0 to {LONGEST_SIDE}")]


@dataclass(frozen=True)
class Thumbnail:
    """An image as a report shows it.

    Attributes:
        jpeg: the file, base64; empty where the image cannot be shown.
        width: pixels; 0 without ``jpeg``.
        height: the same.
        reason: why it cannot be shown; else empty.
    """

    jpeg: str
    width: _Pixels
    height: _Pixels
    reason: str

    def __post_init__(self) -> None:
        if len(base64.b64decode(self.jpeg, validate=True)) > _MOST_JPEG:
            raise ValueError(f"a thumbnail has more than {_MOST_JPEG} bytes")


@dataclass(frozen=True, slots=True)
class Prediction:
    """One test image, a line of ``predictions.csv``.

    Attributes:
        image: its name, as the user sees it.
        path: where it was read from.
        label: name of its class; ``None`` where it has none.
        zeroshot_class: the class that the zero-shot model puts it into.
        zeroshot_mcm: that model's MCM score.
        adapted_class: the same of the adapted model.
        adapted_mcm: the same of the adapted model.
        known: whether that score reaches the run's threshold; ``None`` where it has none.
    """

    image: str
    path: str
    label: str | None
    zeroshot_class: str
    zeroshot_mcm: float
    adapted_class: str
    adapted_mcm: float
    known: bool | None


_READ = tuple(one.name for one in fields(Prediction))
PREDICTION_COLUMNS = (*_READ[:-1], "mcm_scale", _READ[-1])
_VERDICTS = {"true": True, "false": False, "": None}


def read_predictions(path: Path) -> Iterator[Prediction]:
    """Yield the lines of a ``predictions.csv``, holding one at a time.

    Raises:
        BrokenFileError: a column is missing, a line is short, a score is not a finite number, or
            ``known`` is not true, false or empty; the message names the line.
        OSError: the file cannot be read.
    """
    # A file name need not be UTF-8; other bytes are kept as they are, so that the file is found.
    rows = csv.reader(
        line.decode("utf-8" if number else "utf-8-sig", "surrogateescape")
        for number, line in enumerate(read_lines(path))
    )
    try:
        parse = _row_parser(next(rows, []))
        for cells in rows:
            if cells:
                yield parse(cells)
    except BrokenFileError:
        raise
    except (csv.Error, ValueError) as error:
        raise BrokenFileError(path, str(error), rows.line_num) from None


def _row_parser(head: list[str]) -> Callable[[list[str]], Prediction]:
    missing = [column for column in _READ if column not in head]
    if missing:
        raise ValueError(f"no column {', '.join(missing)} among {', '.join(head) or 'none'}")
    places = [head.index(column) for column in _READ]
    least = max(places) + 1

    def parse(cells: list[str]) -> Prediction:
        if len(cells) < least:
            raise ValueError(f"{len(cells)} cells, expected {least}")
        image, path, label, before, before_mcm, after, after_mcm, known = (
            cells[place] for place in places
        )
        if known not in _VERDICTS:
            raise ValueError(f"known is {known!r}, expected true, false or nothing")
        scores = _score("zeroshot_mcm", before_mcm), _score("adapted_mcm", after_mcm)
        return Prediction(
            image, path, label or None, before, scores[0], after, scores[1], _VERDICTS[known]
        )

    return parse


def _score(column: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise ValueError(f"{column} is {text!r}, not a number") from None
    if not math.isfinite(value):
        raise ValueError(f"{column} is {text!r}, not a finite number")
    return value
