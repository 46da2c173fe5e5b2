"""All that a training run is, as one checkpoint and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ueo_fast.finetune.clip.adapted_state import adapted_state, load_adapted_state
from ueo_fast.finetune.clip.model import ClipClassifier
from ueo_fast.finetune.engine.early_stop import EarlyStop
from ueo_fast.finetune.engine.history import SERIES, History
from ueo_fast.finetune.engine.hooks import Checkpoint
from ueo_fast.finetune.engine.monitor import CollapseMonitor
from ueo_fast.finetune.engine.objective import Objective
from ueo_fast.finetune.engine.optimizer import Optimizer
from ueo_fast.finetune.engine.step_statistics import Totals
from ueo_fast.finetune.engine.training_config import TrainerConfig


def fingerprint(
    config: TrainerConfig, classifier: ClipClassifier, objective: Objective, images: int
) -> dict[str, Any]:
    """What a run that goes on must have in common with the one that was stopped."""
    return {
        **config.decisive(),
        "images": images,
        "classes": list(classifier.prompt.class_names),
        "prompt": classifier.prompt.template,
        "objective": type(objective).__name__,
        "choices": objective.choices,
    }


class TrainingState:
    """The parts of a run that change from step to step.

    Attributes:
        classifier: what is trained.
        objective: with its memory, in its buffers.
        optimizer: with its momentum, and the loss scale of fp16.
        totals: of the running epoch.
        monitor: of collapses.
        early_stop: with the best state, if asked for.
        history: of all steps.
        fingerprint: what a run that goes on must have in common with this one.
    """

    def __init__(
        self,
        classifier: ClipClassifier,
        objective: Objective,
        optimizer: Optimizer,
        monitor: CollapseMonitor,
        early_stop: EarlyStop | None,
        fingerprint: dict[str, Any],
    ) -> None:
        self.classifier = classifier
        self.objective = objective
        self.optimizer = optimizer
        self.monitor = monitor
        self.early_stop = early_stop
        self.fingerprint = fingerprint
        self.history = History()
        self.totals = Totals(len(classifier.prompt.class_names))

    def checkpoint(self, step: int) -> Checkpoint:
        """Copies of everything, on the CPU, after ``step`` steps."""
        series = [getattr(self.history, name) for name in SERIES]
        momentum, scaling = self.optimizer.state()
        monitor, monitor_values = self.monitor.state()
        best, best_values = self.early_stop.state() if self.early_stop else ({}, {})
        tensors = {"history": torch.tensor(series, dtype=torch.float64, device="cpu")}
        for room, named in (
            ("adapted", adapted_state(self.classifier)),
            ("objective", self.objective.state_dict()),
            ("momentum", momentum),
            ("epoch", self.totals.tensors()),
            ("monitor", monitor),
            ("best", best),
        ):
            for name, tensor in named.items():
                tensors[f"{room}/{name}"] = tensor.detach().to("cpu", copy=True)
        values: dict[str, object] = {
            "run": self.fingerprint,
            "optimizer": scaling,
            "monitor": monitor_values,
            "best": best_values,
            "stopped": self.history.stopped,
            "kept_epoch": self.history.kept_epoch,
        }
        return Checkpoint(step, tensors, values)

    def check(self, checkpoint: Checkpoint) -> None:
        """Whether it is of this run.

        Raises:
            ValueError: it is not; the message names the first choice that differs.
        """
        theirs = checkpoint.values.get("run")
        if not isinstance(theirs, dict) or theirs.keys() != self.fingerprint.keys():
            raise ValueError(
                "the checkpoint is not one of a training run of this version of ueo_fast: delete "
                "it to start anew"
            )
        for name, mine in self.fingerprint.items():
            if theirs[name] != mine:
                raise ValueError(
                    f"the checkpoint is of a run with {name}={_brief(theirs[name])}, and this one "
                    f"has {name}={_brief(mine)}: resume with the options of that run, or start "
                    "anew in another folder"
                )

    def load_classifier(self, checkpoint: Checkpoint) -> None:
        """Put the classifier's part back."""
        load_adapted_state(self.classifier, _room(checkpoint.tensors, "adapted"))

    def load(self, checkpoint: Checkpoint) -> None:
        """Put the rest back.

        Raises:
            ValueError: tensors that do not fit this run.
        """
        tensors, values = checkpoint.tensors, checkpoint.values
        try:
            self.objective.load_state_dict(_room(tensors, "objective"))
            self.optimizer.load(_room(tensors, "momentum"), _table(values, "optimizer"))
            self.totals = Totals.of_tensors(_room(tensors, "epoch"))
            self.monitor.load(_room(tensors, "monitor"), _table(values, "monitor"))
            if self.early_stop:
                self.early_stop.load(_room(tensors, "best"), _table(values, "best"))
            stopped, kept = values["stopped"], values["kept_epoch"]
            assert stopped is None or isinstance(stopped, str)
            assert kept is None or isinstance(kept, int)
            series = dict(zip(SERIES, tensors["history"].tolist(), strict=True))
            self.history = History(**series, stopped=stopped, kept_epoch=kept)
        except (AssertionError, KeyError, RuntimeError, TypeError) as error:
            raise ValueError(
                f"the checkpoint does not fit this run ({error}): delete it to start anew"
            ) from error


def _room(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    prefix = f"{name}/"
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _table(values: Mapping[str, object], name: str) -> dict[str, Any]:
    table = values[name]
    assert isinstance(table, dict), name
    return table


def _brief(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
