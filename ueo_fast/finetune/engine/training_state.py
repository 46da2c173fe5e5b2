"""All that a training run is, as one checkpoint and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, cast

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
from ueo_fast.finetune.files.records import fitting


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

    def check(self, checkpoint: Checkpoint, steps: int) -> None:
        """Whether it is of this run, and every value in it is one that this run can have.

        Args:
            checkpoint: from a file that anybody may have changed.
            steps: of the whole run.

        Raises:
            ValueError: it is not; the message names its file, and the first choice or value that
                is not this run's.
        """
        source, theirs = checkpoint.source, checkpoint.values.get("run")
        if not isinstance(theirs, dict) or theirs.keys() != self.fingerprint.keys():
            raise ValueError(
                f"{source} is not a checkpoint of this version of ueo_fast: delete it to start anew"
            )
        for name, mine in self.fingerprint.items():
            if theirs[name] != mine:
                raise ValueError(
                    f"{source} is of a run with {name}={_brief(theirs[name])}, and this one "
                    f"has {name}={_brief(mine)}: resume with the options of that run, or start "
                    "anew in another folder"
                )
        try:
            self._check_values(checkpoint.values, checkpoint.step, steps)
            self._check_tensors(checkpoint.tensors, checkpoint.step)
        except (KeyError, TypeError, ValueError) as error:
            what = f"{error} is missing" if isinstance(error, KeyError) else error
            raise ValueError(
                f"{source} does not fit this run: {what}; delete it to start anew"
            ) from error

    def _check_values(self, values: Mapping[str, object], step: int, steps: int) -> None:
        if not 0 <= step <= steps:
            raise ValueError(f"step is {_brief(step)}, and this run has {steps}")
        fitting(str | None, values["stopped"], "stopped")
        epochs = [fitting(int | None, values["kept_epoch"], "kept_epoch")]
        fitting(dict[str, float], values["optimizer"], "optimizer")
        monitor = fitting(dict[str, Any], values["monitor"], "monitor")
        fitting(list[Literal["entropy", "others"]], monitor["warned"], "monitor.warned")
        best = fitting(dict[str, Any], values["best"], "best")
        if self.early_stop is not None:
            fitting(float | None, best["information"], "best.information")
            epochs.append(fitting(int, best["best_epoch"], "best.best_epoch"))
        for epoch in epochs:
            if epoch is not None and not 0 <= epoch <= self.fingerprint["epochs"]:
                raise ValueError(f"an epoch is {epoch}, of {self.fingerprint['epochs']}")

    def _check_tensors(self, tensors: Mapping[str, Tensor], step: int) -> None:
        """Names, shapes and types are those of this run, and what it counts with is finite."""
        expected = {name: (t.shape, t.dtype) for name, t in self.checkpoint(0).tensors.items()}
        expected["history"] = (torch.Size((len(SERIES), step)), torch.float64)
        for index, parameter in enumerate(self.optimizer.parameters):
            if f"momentum/{index}" in tensors:
                expected[f"momentum/{index}"] = (parameter.shape, parameter.dtype)
        if any(name.startswith("monitor/start/") for name in tensors):
            for name in ("scalars", "probabilities", "histogram"):
                expected[f"monitor/start/{name}"] = expected[f"epoch/{name}"]
        if expected.keys() != tensors.keys():
            different = sorted(expected.keys() ^ tensors.keys())
            what = "lacks" if different[0] in expected else "has"
            raise ValueError(f"its state {what} {different[0]!r} ({len(different)} differ)")
        for name, tensor in tensors.items():
            shape, dtype = expected[name]
            if (tensor.shape, tensor.dtype) != (shape, dtype):
                raise ValueError(
                    f"{name!r} has {tuple(tensor.shape)} {tensor.dtype}, expected {tuple(shape)} "
                    f"{dtype}"
                )
            # A method's own memory may have NaN where it has seen nothing yet.
            if not name.startswith("objective/") and not tensor.isfinite().all():
                raise ValueError(f"{name!r} has NaN or infinite values")
            if name.endswith(("/histogram", "/probabilities")) and (tensor < 0).any():
                raise ValueError(f"{name!r} has negative values")
        if "monitor/start/histogram" in tensors and not tensors["monitor/start/histogram"].any():
            raise ValueError("'monitor/start/histogram' counts no image")
        subset = self.objective.subset
        if subset is not None and not torch.equal(subset.cpu(), tensors["objective/subset"]):
            raise ValueError("it was trained on other images")

    def load_classifier(self, checkpoint: Checkpoint) -> None:
        """Put the classifier's part back."""
        load_adapted_state(self.classifier, _room(checkpoint.tensors, "adapted"))

    def load(self, checkpoint: Checkpoint) -> None:
        """Put the rest back."""
        tensors, values = checkpoint.tensors, cast(Any, checkpoint.values)
        self.objective.load_state_dict(_room(tensors, "objective"))
        self.optimizer.load(_room(tensors, "momentum"), values["optimizer"])
        self.totals = Totals.of_tensors(_room(tensors, "epoch"))
        self.monitor.load(_room(tensors, "monitor"), values["monitor"])
        if self.early_stop:
            self.early_stop.load(_room(tensors, "best"), values["best"])
        series = dict(zip(SERIES, tensors["history"].tolist(), strict=True))
        self.history = History(**series, stopped=values["stopped"], kept_epoch=values["kept_epoch"])


def _room(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    prefix = f"{name}/"
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _brief(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
