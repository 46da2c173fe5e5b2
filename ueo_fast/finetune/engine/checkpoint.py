"""Checkpoints: all that a run is, the file that keeps it, and signals held until it is saved."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Literal, cast

import torch
from torch import Tensor

from ueo_fast.finetune.clip.model import ClipClassifier, adapted_state, load_adapted_state
from ueo_fast.finetune.data.loader import STOPPING
from ueo_fast.finetune.engine.hooks import SERIES, Checkpoint, History
from ueo_fast.finetune.engine.monitor import CollapseMonitor, EarlyStop, Totals, below
from ueo_fast.finetune.engine.objective import Objective
from ueo_fast.finetune.files.records import fitting
from ueo_fast.finetune.files.run_files import CHECKPOINT
from ueo_fast.finetune.files.run_folder import RunFolder
from ueo_fast.finetune.files.tensor_file import checksum, read_tensors, write_tensors

_FORMAT = "2"


class SafetensorsCheckpoints:
    """The last checkpoint of a run, in ``checkpoint.safetensors``; a ``CheckpointStore``.

    Tensors as they are, step and values as JSON in the file's metadata. A crash, a kill or a full
    disk while one is saved leaves the one before. The run's ``folder`` must exist.

    Attributes:
        step: of the checkpoint that was loaded or saved last; ``None``: there was none yet.
    """

    def __init__(self, folder: RunFolder | str | os.PathLike[str]) -> None:
        self.path = (folder.path if isinstance(folder, RunFolder) else Path(folder)) / CHECKPOINT
        self.step: int | None = None

    def load(self) -> Checkpoint | None:
        """The last one that was saved whole, or ``None``.

        Raises:
            ValueError: the file is damaged, or is not a checkpoint.
        """
        if not os.path.lexists(self.path):
            return None
        try:
            tensors, metadata = read_tensors(self.path)
            if metadata.get("ueo_fast_checkpoint") != _FORMAT:
                raise ValueError("it is not a checkpoint of this version of ueo_fast")
            if metadata.get("checksum") != checksum(metadata, tensors):
                raise ValueError("its checksum does not fit its content: damaged or edited")
            values = fitting(dict[str, Any], json.loads(metadata["values"]), "values")
            self.step = int(metadata["step"])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            what = f"{error} is missing" if isinstance(error, KeyError) else error
            raise ValueError(
                f"the run cannot resume from {self.path} ({what}): delete it to start this run anew"
            ) from error
        return Checkpoint(self.step, tensors, values, str(self.path))

    def save(self, checkpoint: Checkpoint) -> None:
        """Replace it, atomically.

        Raises:
            OSError: full disk, read-only or missing folder; the one before is kept.
            ValueError: a value that JSON cannot hold.
        """
        metadata = {
            "ueo_fast_checkpoint": _FORMAT,
            "step": str(checkpoint.step),
            "values": json.dumps(checkpoint.values, allow_nan=False),
        }
        write_tensors(self.path, checkpoint.tensors, metadata, checked=True)
        self.step = checkpoint.step


@dataclass
class TrainingState:
    """The parts of a run that change from step to step.

    Attributes:
        classifier: what is trained.
        objective: with its memory, in its buffers.
        sgd: with its momentum.
        scaler: with the loss scale of fp16, if that is the precision.
        monitor: of collapses.
        early_stop: with the best state, if asked for.
        fingerprint: what a run that resumes must have in common with this one.
        history: of all steps.
        totals: of the running epoch.
        step: steps done.
    """

    classifier: ClipClassifier
    objective: Objective
    sgd: torch.optim.SGD
    scaler: torch.amp.GradScaler | None
    monitor: CollapseMonitor
    early_stop: EarlyStop | None
    fingerprint: dict[str, Any]
    totals: Totals
    history: History = field(default_factory=History)
    step: int = 0

    @property
    def parameters(self) -> list[Tensor]:
        """All that are trained; their order names the momentum in a checkpoint."""
        return [p for group in self.sgd.param_groups for p in group["params"]]

    def checkpoint(self) -> Checkpoint:
        """Copies of everything, on the CPU."""
        momenta = [self.sgd.state.get(p, {}).get("momentum_buffer") for p in self.parameters]
        monitor, monitor_values = self.monitor.state()
        best, best_values = self.early_stop.state() if self.early_stop else ({}, {})
        series = [getattr(self.history, name) for name in SERIES]
        tensors = {"history": torch.tensor(series, dtype=torch.float64, device="cpu")}
        for room, named in (
            ("adapted", adapted_state(self.classifier)),
            ("objective", self.objective.state_dict()),
            (
                "momentum",
                {str(i): buffer for i, buffer in enumerate(momenta) if buffer is not None},
            ),
            ("epoch", self.totals.tensors()),
            ("monitor", monitor),
            ("best", best),
        ):
            for name, tensor in named.items():
                tensors[f"{room}/{name}"] = tensor.detach().to("cpu", copy=True)
        values: dict[str, object] = {
            "run": self.fingerprint,
            "optimizer": {} if self.scaler is None else self.scaler.state_dict(),
            "monitor": monitor_values,
            "best": best_values,
            "stopped": self.history.stopped,
            "kept_epoch": self.history.kept_epoch,
        }
        return Checkpoint(self.step, tensors, values)

    def load(self, checkpoint: Checkpoint, steps: int) -> None:
        """Resume this run of ``steps`` steps from a checkpoint that anybody may have changed.

        Raises:
            ValueError: it is of another run, or has a value that this run cannot have; the message
                names its file, and the first difference. Nothing is changed.
        """
        self._check(checkpoint, steps)
        tensors, values = checkpoint.tensors, cast(Any, checkpoint.values)
        load_adapted_state(self.classifier, below("adapted/", tensors))
        self.objective.prepare(self.classifier)
        self.objective.load_state_dict(below("objective/", tensors))
        for index, parameter in enumerate(self.parameters):
            if (saved := tensors.get(f"momentum/{index}")) is not None:
                buffer = torch.empty_like(parameter).copy_(saved)
                self.sgd.state[parameter]["momentum_buffer"] = buffer
        if self.scaler is not None:
            self.scaler.load_state_dict(values["optimizer"])
        self.totals = Totals.of_tensors(below("epoch/", tensors))
        self.monitor.load(below("monitor/", tensors), values["monitor"])
        if self.early_stop:
            self.early_stop.load(below("best/", tensors), values["best"])
        series = dict(zip(SERIES, tensors["history"].tolist(), strict=True))
        self.history = History(**series, stopped=values["stopped"], kept_epoch=values["kept_epoch"])
        self.step = checkpoint.step

    def _check(self, checkpoint: Checkpoint, steps: int) -> None:
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
        expected = {name: (t.shape, t.dtype) for name, t in self.checkpoint().tensors.items()}
        expected["history"] = (torch.Size((len(SERIES), step)), torch.float64)
        for index, parameter in enumerate(self.parameters):
            if f"momentum/{index}" in tensors:
                expected[f"momentum/{index}"] = (parameter.shape, parameter.dtype)
        if any(name.startswith("monitor/start/") for name in tensors):
            for name in ("scalars", "probabilities", "histogram"):
                expected[f"monitor/start/{name}"] = expected[f"epoch/{name}"]
        if different := sorted(expected.keys() ^ tensors.keys()):
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


def _brief(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


class HeldSignals:
    """A block in which the first signal of :data:`STOPPING` only sets :attr:`pending`.

    :meth:`deliver` lets it do what it would have done; a second signal does that at once. Ignored
    signals stay ignored, and the earlier handlers are back after the block. Nothing is done where
    ``active`` is false, or in any thread but the main one, which is the one that gets signals.

    Attributes:
        pending: the signal that came, or ``None``.
    """

    def __init__(self, active: bool) -> None:
        self._active = active and threading.current_thread() is threading.main_thread()
        self.pending: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> HeldSignals:
        for number in STOPPING if self._active else ():
            before = signal.getsignal(number)
            if before not in (signal.SIG_IGN, None):  # None: of a library in C
                self._before[number] = before
                signal.signal(number, self._hold)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._restore()
        if kind is None:
            self.deliver()

    def deliver(self) -> None:
        """Let a pending signal do what it does without this block.

        Mostly that raises ``KeyboardInterrupt`` or ends the process; else the block continues.
        """
        if self.pending is not None:
            number, self.pending = self.pending, None
            before = self._before[number]
            if callable(before):
                before(number, None)
            else:
                signal.signal(number, before)
                signal.raise_signal(number)

    def _hold(self, number: int, frame: FrameType | None) -> None:
        if self.pending is not None:
            self._restore()
            signal.raise_signal(number)
            return
        self.pending = number
        # Not print: the signal may have come while something was printed.
        if sys.stderr is not None:
            with suppress(OSError, ValueError, AttributeError):
                said = b"\nstopping after this step; the same signal again stops at once\n"
                os.write(sys.stderr.fileno(), said)

    def _restore(self) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)
