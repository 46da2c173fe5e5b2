"""What a run reports: its metrics before, during and after training, and its training curves."""

from __future__ import annotations

import contextlib
import importlib
import shlex
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal

from torch import Tensor

from ueo_fast.finetune.commands.finetune_config import MethodOptions, OutputOptions
from ueo_fast.finetune.commands.results import brief, measure
from ueo_fast.finetune.commands.stages import Start
from ueo_fast.finetune.data.names import printable, shown
from ueo_fast.finetune.engine.hooks import (
    CheckpointStore,
    Hooks,
    StartRecord,
    bar_hooks,
    combine,
    training_bar,
)
from ueo_fast.finetune.engine.tracking import (
    JsonLinesTracker,
    TensorBoardTracker,
    Tracker,
    WandbTracker,
)
from ueo_fast.finetune.engine.trainer import History, TrainerConfig
from ueo_fast.finetune.evaluation.predict import collect, predict_batches, watched
from ueo_fast.finetune.files.run_files import MEASURED, TENSORBOARD, EpochRecord, MetricsRecord
from ueo_fast.finetune.files.run_folder import RunFolder


class Recorder:
    """One record per method, epoch, stage and split; writing one again replaces it.

    So a run that was killed after an evaluation, and repeats it, has it once.

    Args:
        folder: where the records are kept; those that are there already are read.
        start: the images and the classifier, which is measured as it is at each call.
        method: of the run, with the scale of its scores.
        trainer: its seed and number of epochs are used.
        eval_every: epochs between two evaluations; 0: only at the end.
    """

    def __init__(
        self,
        folder: RunFolder,
        start: Start,
        *,
        method: MethodOptions,
        trainer: TrainerConfig,
        eval_every: int,
    ) -> None:
        self._folder = folder
        self._start = start
        self._method = method
        self._trainer = trainer
        self._every = eval_every
        self._epoch = 0
        self._records: dict[tuple[Any, ...], MetricsRecord] = {}
        with contextlib.suppress(FileNotFoundError):
            for record in folder.read_json_lines(MEASURED, MetricsRecord):
                self._records[_key(record)] = record

    def before(self) -> MetricsRecord | None:
        """Measure the zero-shot classifier by its known cosines; ``None`` without labels."""
        start = self._start
        record = self._add("before", "test", start.test_cosines, start.tested.labels)
        if start.separate:
            cosines = start.target.zero_shot_cosines()
            self._add("before", "train", cosines, start.train.labels)
        return record

    def goes_on(self, epoch: int) -> None:
        """Note how many epochs the run that is resumed had done."""
        self._epoch = epoch

    def during(self, epoch: int) -> MetricsRecord | None:
        """Note that an epoch is over, and measure the classifier every so many of them.

        Returns:
            The record; ``None`` where nothing was measured.
        """
        self._epoch = epoch
        last = epoch == self._trainer.epochs  # is measured at the end
        due = self._every and epoch % self._every == 0 and not last
        if self._start.tested.labels is None or not due:
            return None
        return self._add("during", "test", self._predict("test"), self._start.tested.labels)

    def after(self, history: History) -> Tensor:
        """Measure the adapted classifier; returns its cosines (M, C) on the test images."""
        start = self._start
        cosines = self._predict("test")
        if self._method.method == "zeroshot":  # it was measured before
            return cosines
        if history.kept_epoch is not None:
            self._epoch = history.kept_epoch
        self._add("after", "test", cosines, start.tested.labels)
        if start.separate and start.train.labels is not None:
            self._add("after", "train", self._predict("train"), start.train.labels)
        if history.online is not None:
            self._add("after", "online", history.online, start.train.labels)
        return cosines

    def first_and_last(self) -> list[MetricsRecord]:
        """What a table of before and after shows."""
        return [
            replace(record, title=f"{record.title}, online") if record.split == "online" else record
            for record in self._records.values()
            if record.stage != "during" and record.split != "train"
        ]

    def _predict(self, split: str) -> Tensor:
        start = self._start
        part = start.tested if split == "test" else start.train
        # A resumed run has no features until its first evaluation.
        batches = predict_batches(
            start.classifier,
            start.plain[split],
            start.evaluation,
            keep_features=start.keep_features,
        )
        found = collect(watched(f"evaluation, {split}", len(part.images))(batches))
        if found.failures:
            position, reason = found.failures[0]
            raise OSError(
                f"{shown(printable(part.images.paths[position]))} can no longer be read "
                f"({reason}), as it could when the run started: put it back, then go on with "
                "--resume"
            )
        if found.features is not None:
            start.plain[split] = found.features
        return found.cosines

    def _add(
        self,
        stage: Literal["before", "during", "after"],
        split: Literal["test", "train", "online"],
        cosines: Tensor,
        labels: Tensor | None,
    ) -> MetricsRecord | None:
        record = measure(
            cosines,
            labels,
            self._method.mcm_scale,
            method="zeroshot" if stage == "before" else self._method.method,
            seed=self._trainer.seed,
            epoch=0 if stage == "before" else self._epoch,
            stage=stage,
            split=split,
        )
        if record is not None:
            self._records[_key(record)] = record
            self._folder.write_json_lines(MEASURED, self._records.values())
        return record


def _key(record: MetricsRecord) -> tuple[Any, ...]:
    return record.method, record.epoch, record.stage, record.split


def check_trackers(options: OutputOptions) -> None:
    """Check that the packages that the run reports to are installed, before hours are spent.

    Raises:
        ModuleNotFoundError: one is not.
    """
    if options.tensorboard:
        importlib.import_module("tensorboard")
    if options.wandb is not None:
        importlib.import_module("wandb")


@contextlib.contextmanager
def training_hooks(
    options: OutputOptions,
    config: dict[str, Any],
    folder: RunFolder,
    recorder: Recorder,
    store: CheckpointStore,
) -> Iterator[Hooks]:
    """Hooks for a run, and its checkpoints; what they opened is closed at the end.

    Args:
        options: where to log.
        config: all options of the run, as in its ``config.json``.
        folder: of the run.
        recorder: of its metrics.
        store: of its checkpoints.
    """
    with contextlib.ExitStack() as stack:
        trackers: list[Tracker] = [JsonLinesTracker(folder)]
        if options.tensorboard:
            trackers.append(stack.enter_context(TensorBoardTracker(folder.path / TENSORBOARD)))
        if options.wandb is not None:
            trackers.append(stack.enter_context(_wandb(options.wandb, config, folder)))
        bar = stack.enter_context(training_bar(config["method"]))
        yield combine(
            *(tracker.hooks() for tracker in trackers),
            bar_hooks(bar),
            _terminal(bar, recorder),
            Hooks(checkpoints=store),
        )


def _wandb(project: str, config: dict[str, Any], folder: RunFolder) -> WandbTracker:
    try:
        return WandbTracker(project, folder, name=folder.path.name, config=config)
    except (ImportError, OSError):
        raise
    except Exception as error:  # wandb has its own tree of errors: no key, no network, no right
        raise OSError(
            f"wandb={project!r}: Weights & Biases says: {error}\nFix that (wandb login), or set "
            "WANDB_MODE=offline or disabled in the environment; then go on with ueo-fast finetune "
            f"--resume --out {shlex.quote(str(folder.path))}"
        ) from error


def _terminal(bar: Any, recorder: Recorder) -> Hooks:
    def on_start(record: StartRecord) -> None:
        recorder.goes_on(record.epoch)
        if record.step:
            bar.write(f"goes on after step {record.step} of {record.total}")

    def on_epoch(record: EpochRecord) -> None:
        metrics = recorder.during(record.epoch)
        if metrics is not None:
            bar.write(f"epoch {record.epoch}: {brief(metrics)}")

    def on_warning(text: str) -> None:
        bar.write(f"warning: {text}")

    return Hooks(on_start, on_epoch=on_epoch, on_warning=on_warning)
