"""The metrics of a run: measured before, during and after, and kept in metrics.jsonl."""

from __future__ import annotations

import contextlib
import json
from typing import Any

from torch import Tensor

from ueo_fast.finetune.commands.evaluation import measure
from ueo_fast.finetune.commands.finetune_config import FinetuneConfig
from ueo_fast.finetune.commands.stages import Start
from ueo_fast.finetune.data.names import printable, shown
from ueo_fast.finetune.engine.trainer import History
from ueo_fast.finetune.evaluation.finished_run import checked_metrics
from ueo_fast.finetune.evaluation.predict import collect, predict_batches, watched
from ueo_fast.finetune.files.run_folder import RunFolder
from ueo_fast.finetune.methods import METHODS

METRICS = "metrics.jsonl"
Record = dict[str, Any]


class Recorder:
    """One record per method, epoch, stage and split; writing one again replaces it.

    So a run that was killed after an evaluation, and repeats it, has it once.

    Args:
        config: of the run.
        folder: where the records are kept; those that are there already are read.
        start: the images and the classifier, which is measured as it is at each call.
    """

    def __init__(self, config: FinetuneConfig, folder: RunFolder, start: Start) -> None:
        self._config = config
        self._folder = folder
        self._start = start
        self._method = METHODS[config.method]
        self._epoch = 0
        self._records: dict[tuple[Any, ...], Record] = {}
        with contextlib.suppress(FileNotFoundError):
            for record in folder.read_json_lines(METRICS, checked_metrics):
                self._records[_key(record)] = record

    def before(self) -> Record | None:
        """Measure the zero-shot classifier, from what it said already; ``None`` without labels."""
        start = self._start
        zero_shot = METHODS["zeroshot"]
        values = {"method": zero_shot.name, "title": zero_shot.title, "epoch": 0, "stage": "before"}
        record = self._add(values, "test", start.test_cosines, start.tested.labels)
        if start.separate:
            cosines = start.target.zero_shot_cosines()
            self._add(values, "train", cosines, start.train.labels)
        return record

    def goes_on(self, epoch: int) -> None:
        """Note how many epochs the run that is resumed had done."""
        self._epoch = epoch

    def during(self, epoch: int) -> Record | None:
        """Note that an epoch is over, and measure the classifier every so many of them.

        Returns:
            The record; ``None`` where nothing was measured.
        """
        self._epoch = epoch
        every = self._config.eval_every
        last = epoch == self._config.epochs  # is measured at the end
        if self._start.tested.labels is None or not every or epoch % every or last:
            return None
        cosines = self._predict("test")
        return self._add(self._values("during"), "test", cosines, self._start.tested.labels)

    def after(self, history: History) -> Tensor:
        """Measure the adapted classifier; returns its cosines (M, C) on the test images."""
        start = self._start
        cosines = self._predict("test")
        if self._method is METHODS["zeroshot"]:  # it was measured before
            return cosines
        if history.kept_epoch is not None:
            self._epoch = history.kept_epoch
        values = self._values("after")
        self._add(values, "test", cosines, start.tested.labels)
        if start.separate and start.train.labels is not None:
            self._add(values, "train", self._predict("train"), start.train.labels)
        if history.online is not None:
            self._add(values, "online", history.online, start.train.labels)
        return cosines

    def first_and_last(self) -> list[Record]:
        """What a table of before and after shows."""
        chosen = []
        for record in self._records.values():
            if record["stage"] == "during" or record["split"] == "train":
                continue
            online = record["split"] == "online"
            title = f"{record['title']}, online" if online else record["title"]
            chosen.append({**record, "title": title})
        return chosen

    def _values(self, stage: str) -> Record:
        values = {"method": self._method.name, "title": self._method.title}
        return {**values, "epoch": self._epoch, "stage": stage}

    def _predict(self, split: str) -> Tensor:
        start, config = self._start, self._config
        part = start.tested if split == "test" else start.train
        # A resumed run has no features until its first evaluation.
        keep_features = not config.make_method().trains_tower(config.trainer())
        batches = predict_batches(
            start.classifier,
            start.plain[split],
            batch_size=config.eval_batch_size,
            num_workers=config.workers,
            precision=config.precision,
            channels_last=config.channels_last,
            keep_features=keep_features,
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
        self, values: Record, split: str, cosines: Tensor, labels: Tensor | None
    ) -> Record | None:
        metrics = measure(cosines, labels, self._config.mcm_scale)
        if metrics is None:
            return None
        record = {**values, "seed": self._config.seed, "split": split, **metrics.as_dict()}
        self._records[_key(record)] = record
        lines = [json.dumps(each, allow_nan=False) + "\n" for each in self._records.values()]
        self._folder.write_text(METRICS, "".join(lines))
        return record


def _key(record: Record) -> tuple[Any, ...]:
    return tuple(record[name] for name in ("method", "epoch", "stage", "split"))
