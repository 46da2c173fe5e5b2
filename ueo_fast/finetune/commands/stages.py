"""How a run begins: images are read, the zero-shot model speaks, and the folder remembers both."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.utils.data import Dataset, Subset

from ueo_fast.finetune.clip.model import ClipClassifier
from ueo_fast.finetune.commands.finetune_config import DataOptions
from ueo_fast.finetune.commands.problem import Labelled, Problem, write_problem
from ueo_fast.finetune.data.names import plural, shown
from ueo_fast.finetune.data.views import Views, views_of
from ueo_fast.finetune.engine.training_config import ImagePass
from ueo_fast.finetune.evaluation.predict import collect, predict_batches, watched
from ueo_fast.finetune.evaluation.results_table import doubts
from ueo_fast.finetune.files.records import BrokenFileError
from ueo_fast.finetune.files.run_files import IMAGES, PROBLEM, ZERO_SHOT, ProblemSummary, Skipped
from ueo_fast.finetune.files.run_folder import RunFolder
from ueo_fast.finetune.files.tensor_file import read_tensors, write_tensors
from ueo_fast.finetune.target import Target, zero_shot_target

if TYPE_CHECKING:
    from ueo_fast.finetune.data.copies import Copies

_SAME = {"fp32": 2e-3, "fp16": 1e-2, "bf16": 1e-2}
"""Cosines of one model and one image differ by less from device to device, per precision."""


@dataclass(frozen=True)
class Start:
    """Where training begins.

    Attributes:
        classifier: the zero-shot classifier; training changes it.
        target: the readable images to adapt to.
        train: the same images with their names.
        tested: the readable images that metrics and predictions are about.
        test_views: the same, un-augmented.
        test_cosines: (M, C) what the zero-shot classifier says about them.
        separate: whether these are other images than those of ``target``.
        plain: what an evaluation of ``train`` and of ``test`` reads: images, or their features.
        evaluation: how these go through the image tower.
        keep_features: whether an evaluation may keep features, because the tower is not trained.
    """

    classifier: ClipClassifier
    target: Target
    train: Labelled
    tested: Labelled
    test_cosines: Tensor
    separate: bool
    plain: dict[str, Dataset[Any] | Tensor]
    evaluation: ImagePass
    keep_features: bool

    @property
    def known(self) -> tuple[str, ...]:
        """The user's classes, as the prompts have them."""
        return self.classifier.prompt.class_names


def is_begun(folder: RunFolder) -> bool:
    """Whether the folder has all that :func:`continued` needs."""
    return all((folder.path / name).exists() for name in (IMAGES, ZERO_SHOT))


def begin(
    folder: RunFolder,
    classifier: ClipClassifier,
    problem: Problem,
    options: DataOptions,
    copies: Copies | None,
    *,
    evaluation: ImagePass,
    keep_features: bool,
) -> Start:
    """Classify all images by the zero-shot model, leave out what cannot be read, and keep both.

    Args:
        folder: of the run.
        classifier: the zero-shot classifier.
        problem: its images and classes.
        options: how images are decoded, and what happens if one cannot be read.
        copies: keeps small copies of image files.
        evaluation: how images go through the image tower.
        keep_features: keep what the image tower makes of them, because it is not trained.
    """

    def classified(part: Labelled, title: str) -> tuple[Labelled, Target]:
        views = views_of(part.images, classifier.model, part.labels, options.decode, copies)
        target = zero_shot_target(
            classifier,
            views.plain,
            evaluation,
            augmented=views.augmented,
            labels=views.labels,
            names=views.names,
            strict=options.strict,
            keep_features=keep_features,
            watch=watched(title, len(part.images)),
        )
        return part if target.positions is None else part.subset(target.positions), target

    for text in doubts(classes=classifier.prompt.class_names):  # before hours are spent
        print(f"warning: {text}")
    for remark in dict.fromkeys(problem.train.remarks() + problem.tested.remarks()):
        print(f"note: {remark}")
    train, target = classified(problem.train, "zero-shot")
    skipped = target.unreadable
    tested, test_cosines = train, target.zero_shot_cosines()
    plain = {"train": target.evaluation_images, "test": target.evaluation_images}
    if problem.test is not None:
        tested, tests = classified(problem.test, "zero-shot, test")
        test_cosines = tests.zero_shot_cosines()
        plain["test"] = tests.evaluation_images
        skipped += tests.unreadable
    kept = Problem(problem.known, train, None if problem.test is None else tested)
    lists = {"train": train, **({} if problem.test is None else {"test": tested})}
    summary = ProblemSummary(
        # As the prompts and the predictions have them: without underscores.
        known=tuple(classifier.prompt.class_names),
        unknown=tuple(kept.unknown()),
        train_images=len(train.images),
        test_images=len(tested.images),
        labelled=tested.labels is not None,
        skipped=tuple(Skipped(name, reason) for name, reason in skipped),
        left_out={name: dict(part.images.left_out) for name, part in lists.items()},
        followed={name: tuple(part.images.followed) for name, part in lists.items()},
    )
    folder.write_json(PROBLEM, summary)
    if skipped:
        print(f"left out: {plural(len(skipped), 'image')} that cannot be read ({PROBLEM} has all):")
        for name, reason in skipped[:5]:
            print(f"  {shown(name)}: {reason}")
    write_problem(folder, kept)
    tensors = {"train": target.zero_shot_cosines()}
    if problem.test is not None:
        tensors["test"] = test_cosines
    write_tensors(folder.path / ZERO_SHOT, tensors)
    if copies is not None:
        print(f"cache: {copies.text()}")
    return Start(
        classifier,
        target,
        train,
        tested,
        test_cosines,
        problem.test is not None,
        plain,
        evaluation,
        keep_features,
    )


def continued(
    folder: RunFolder,
    classifier: ClipClassifier,
    problem: Problem,
    options: DataOptions,
    copies: Copies | None,
    *,
    evaluation: ImagePass,
    keep_features: bool,
) -> Start:
    """As :func:`begin` left it, looking at the first image only: is the model the same?"""
    tensors = _kept_cosines(folder, problem)
    train, tested = (
        views_of(part.images, classifier.model, part.labels, options.decode, copies)
        for part in (problem.train, problem.tested)
    )
    _check_model(classifier, train, tensors["train"], evaluation)
    return Start(
        classifier,
        Target(train.plain, train.augmented, tensors["train"], train.labels),
        problem.train,
        problem.tested,
        tensors["train" if problem.test is None else "test"],
        problem.test is not None,
        {"train": train.plain, "test": tested.plain},
        evaluation,
        keep_features,
    )


def _check_model(
    classifier: ClipClassifier, views: Views, kept: Tensor, evaluation: ImagePass
) -> None:
    """Refuse a model that sees the first image differently than the run's zero-shot model did.

    The fingerprint does not tell: it covers neither what an adaptation changes (normalisation of
    the image tower) nor preprocessing and tokenizer.
    """
    first = Subset(views.plain, [0]) if isinstance(views.plain, Dataset) else views.plain[:1]
    found = collect(predict_batches(classifier, first, replace(evaluation, batch_size=1)))
    if found.failures:  # it was readable before: the training will say what is wrong
        return
    furthest = float((found.cosines - kept[:1]).abs().max())
    if not furthest <= _SAME[evaluation.precision]:
        raise ValueError(
            f"the model is not the one that the run began with: for {shown(views.names[0])} "
            f"its cosines differ by {furthest:.3f} from those in {ZERO_SHOT}. Restore its "
            "preprocessing, tokenizer, normalisation layers, or that image"
        )


def _kept_cosines(folder: RunFolder, problem: Problem) -> dict[str, Tensor]:
    tensors, _ = read_tensors(folder.path / ZERO_SHOT)
    for name, part in (("train", problem.train), ("test", problem.test)):
        if part is None:
            continue
        shape, found = (len(part.images), len(problem.known)), tensors.get(name)
        if found is None or found.shape != shape or not found.is_floating_point():
            what = None if found is None else f"{tuple(found.shape)} {found.dtype}"
            raise BrokenFileError(
                folder.path / ZERO_SHOT, f"{name} is {what}, expected {shape} of floating point"
            )
        if not (found.abs() <= 1.1).all():  # NaN neither
            raise BrokenFileError(
                folder.path / ZERO_SHOT, f"{name} has values that are not cosines"
            )
    return tensors
