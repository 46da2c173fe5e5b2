"""Where a run's numbers go: JSON lines in the run folder, TensorBoard, Weights & Biases."""

from __future__ import annotations

import os
import secrets
from abc import ABC, abstractmethod
from contextlib import suppress
from types import TracebackType
from typing import Any, Literal, TypeVar

from ueo_fast.finetune.engine.hooks import Hooks, StartRecord
from ueo_fast.finetune.files.records import fitting
from ueo_fast.finetune.files.run_files import (
    EPOCHS,
    STEPS,
    WANDB,
    WARNINGS,
    EpochRecord,
    StepRecord,
    WarningRecord,
)
from ueo_fast.finetune.files.run_folder import RunFolder

WandbMode = Literal["online", "offline", "disabled"]
Self = TypeVar("Self", bound="Tracker")


class Tracker(ABC):
    """Turns what a run reports into entries somewhere. A context manager: its end closes it."""

    _step = 0  # the last one that was reported

    def hooks(self) -> Hooks:
        """For the run, through :func:`~ueo_fast.finetune.engine.hooks.combine` with others."""
        return Hooks(self._on_start, self._on_step, self._on_epoch, self._on_warning)

    def close(self, exit_code: int = 0) -> None:  # noqa: B027 (JSON lines have nothing left)
        """Write or send what is left; no more entries follow."""

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.close(0 if error is None else 1)

    def _on_start(self, record: StartRecord) -> None:
        self._step = record.step

    def _on_step(self, record: StepRecord) -> None:
        self._step = record.step

    @abstractmethod
    def _on_epoch(self, record: EpochRecord) -> None: ...

    @abstractmethod
    def _on_warning(self, text: str) -> None: ...


class JsonLinesTracker(Tracker):
    """``train.jsonl``, ``epochs.jsonl`` and ``warnings.jsonl`` in a run folder.

    One record per line, each forced to disk when it is reported. When a run is resumed, lines after
    its checkpoint are dropped, as the run will report them again: each step is there once.

    Args:
        folder: of the run.
    """

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder

    def _on_start(self, record: StartRecord) -> None:
        super()._on_start(record)
        self._folder.drop_json_lines(STEPS, "step", record.step)
        self._folder.drop_json_lines(EPOCHS, "epoch", record.epoch)
        self._folder.drop_json_lines(WARNINGS, "step", record.step)

    def _on_step(self, record: StepRecord) -> None:
        super()._on_step(record)
        self._folder.append_json_line(STEPS, record)

    def _on_epoch(self, record: EpochRecord) -> None:
        self._folder.append_json_line(EPOCHS, record)

    def _on_warning(self, text: str) -> None:
        warning = WarningRecord(self._step, text)
        # A resumed run repeats the warnings from before its first step.
        with suppress(FileNotFoundError):
            if warning in self._folder.read_json_lines(WARNINGS, WarningRecord):
                return
        self._folder.append_json_line(WARNINGS, warning)


class TensorBoardTracker(Tracker):
    """Curves for TensorBoard, and one histogram of predicted classes per epoch.

    All are drawn over steps. When a run is resumed, TensorBoard is made to forget what came after
    its checkpoint.

    Args:
        folder: of the event files.

    Raises:
        ModuleNotFoundError: TensorBoard is not installed.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        try:
            from torch.utils import tensorboard
        except ImportError as error:
            raise _missing("tensorboard", error) from error
        self._make: Any = tensorboard.SummaryWriter
        self._folder = str(folder)
        self._writer: Any = None

    def close(self, exit_code: int = 0) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _on_start(self, record: StartRecord) -> None:
        super()._on_start(record)
        self.close()
        # Also at step 0: a run that was killed before its first checkpoint begins again.
        self._writer = self._make(self._folder, purge_step=record.step + 1)

    def _open(self) -> Any:
        if self._writer is None:  # a warning came before the start
            self._writer = self._make(self._folder)
        return self._writer

    def _on_step(self, record: StepRecord) -> None:
        super()._on_step(record)
        for name, value in _step_values(record).items():
            self._open().add_scalar(name, value, record.step)

    def _on_epoch(self, record: EpochRecord) -> None:
        writer = self._open()
        for name, value in _epoch_values(record).items():
            writer.add_scalar(name, value, self._step)
        counts = record.histogram
        writer.add_histogram_raw(
            "epoch/predicted_class",
            min=0,
            max=len(counts),
            num=sum(counts),
            sum=sum(index * count for index, count in enumerate(counts)),
            sum_squares=sum(index * index * count for index, count in enumerate(counts)),
            bucket_limits=list(range(1, len(counts) + 1)),
            bucket_counts=list(counts),
            global_step=self._step,
        )
        writer.flush()

    def _on_warning(self, text: str) -> None:
        self._open().add_text("warning", text, self._step)


class WandbTracker(Tracker):
    """Curves for Weights & Biases.

    The run's id is kept in the run folder (``wandb.json``), so that a resumed run continues on the
    same page. What it reports a second time is ignored there; it is the same, to the bit.

    Args:
        project: name of the project.
        folder: of the run; W&B's own files go there too.
        name: of the run on the page; ``None`` lets W&B find one.
        config: choices to show next to the curves.
        mode: ``online``, ``offline`` or ``disabled``; ``None`` takes ``WANDB_MODE``, or online.

    Raises:
        ModuleNotFoundError: wandb is not installed.
    """

    def __init__(
        self,
        project: str,
        folder: RunFolder,
        *,
        name: str | None = None,
        config: dict[str, Any] | None = None,
        mode: WandbMode | None = None,
    ) -> None:
        try:
            import wandb
        except ImportError as error:
            raise _missing("wandb", error) from error
        self._run: Any = wandb.init(
            project=project,
            dir=str(folder.path),
            name=name,
            config=config,
            id=_wandb_id(folder),
            resume="allow",
            mode=mode,
        )

    def close(self, exit_code: int = 0) -> None:
        self._run.finish(exit_code=exit_code)

    def _on_step(self, record: StepRecord) -> None:
        super()._on_step(record)
        self._run.log(_step_values(record), step=record.step)

    def _on_epoch(self, record: EpochRecord) -> None:
        self._run.log(_epoch_values(record), step=self._step)

    def _on_warning(self, text: str) -> None:
        self._run.alert(title="ueo_fast", text=text)


def _step_values(record: StepRecord) -> dict[str, float]:
    names = ("loss", "conditional_entropy", "marginal_entropy", "largest_share", "seconds")
    values = {f"train/{name}": float(getattr(record, name)) for name in names}
    rates = {f"learning_rate/{name}": rate for name, rate in record.learning_rates.items()}
    return values | rates


def _epoch_values(record: EpochRecord) -> dict[str, float]:
    names = ("epoch", "loss", "conditional_entropy", "marginal_entropy", "mutual_information")
    values = {f"epoch/{name}": float(getattr(record, name)) for name in names}
    return values | {"epoch/largest_share": max(record.histogram) / sum(record.histogram)}


def _wandb_id(folder: RunFolder) -> str:
    with suppress(FileNotFoundError):
        return folder.read_json(WANDB, lambda value: str(fitting(str, value["id"], "id")))
    identity = secrets.token_hex(8)
    folder.write_json(WANDB, {"id": identity})
    return identity


def _missing(package: str, error: ImportError) -> ModuleNotFoundError:
    return ModuleNotFoundError(
        f"{package} cannot be imported ({error}); install it with `pip install {package}`, or "
        "leave it out",
        name=package,
    )
