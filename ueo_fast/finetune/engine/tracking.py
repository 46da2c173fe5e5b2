"""Where a run's numbers go: JSON lines in the run folder, TensorBoard, Weights & Biases."""

from __future__ import annotations

import os
import secrets
from contextlib import suppress
from dataclasses import asdict
from types import TracebackType
from typing import Any, Literal, Protocol

from ueo_fast.finetune.engine.hooks import EpochRecord, Hooks, StartRecord, StepRecord
from ueo_fast.finetune.files.records import fitting
from ueo_fast.finetune.files.run_folder import RunFolder

WandbMode = Literal["online", "offline", "disabled"]


class Tracker(Protocol):
    """Turns what a run tells into entries somewhere."""

    def hooks(self) -> Hooks:
        """For the run, through :func:`~ueo_fast.finetune.engine.hooks.combine` with others."""

    def close(self) -> None:
        """No more entries; call it in any case."""


class JsonLinesTracker:
    """``train.jsonl``, ``epochs.jsonl`` and ``warnings.jsonl`` in a run folder.

    One record per line, each forced to disk when it is told. When a run is resumed, lines after its
    checkpoint are dropped, as the run will tell them again: each step is there once.

    Args:
        folder: of the run.
    """

    steps = "train.jsonl"
    epochs = "epochs.jsonl"
    warnings = "warnings.jsonl"

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder
        self._step = 0

    def hooks(self) -> Hooks:
        return Hooks(self._on_start, self._on_step, self._on_epoch, self._on_warning)

    def close(self) -> None:
        """Nothing is left to write."""

    def _on_start(self, record: StartRecord) -> None:
        self._step = record.step
        self._folder.drop_json_lines(self.steps, "step", record.step)
        self._folder.drop_json_lines(self.epochs, "epoch", record.epoch)
        self._folder.drop_json_lines(self.warnings, "step", record.step)

    def _on_step(self, record: StepRecord) -> None:
        self._step = record.step
        self._folder.append_json_line(self.steps, asdict(record))

    def _on_epoch(self, record: EpochRecord) -> None:
        self._folder.append_json_line(self.epochs, asdict(record))

    def _on_warning(self, text: str) -> None:
        warning = {"step": self._step, "text": text}
        # What was said before the run was under way, a resumed run says again.
        path = self._folder.path / self.warnings
        if not path.exists() or warning not in self._folder.read_json_lines(self.warnings):
            self._folder.append_json_line(self.warnings, warning)


class TensorBoardTracker:
    """Curves for TensorBoard, and one histogram of predicted classes per epoch.

    All are drawn over steps. When a run is resumed, TensorBoard is told to forget what came after
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
        self._step = 0

    def hooks(self) -> Hooks:
        return Hooks(self._on_start, self._on_step, self._on_epoch, self._on_warning)

    def close(self) -> None:
        """Write what is left."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def __enter__(self) -> TensorBoardTracker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.close()

    def _on_start(self, record: StartRecord) -> None:
        self.close()
        self._step = record.step
        # Also at step 0: a run that was killed before its first checkpoint begins again.
        self._writer = self._make(self._folder, purge_step=record.step + 1)

    def _open(self) -> Any:
        if self._writer is None:  # told of something before the start
            self._writer = self._make(self._folder)
        return self._writer

    def _on_step(self, record: StepRecord) -> None:
        self._step = record.step
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


class WandbTracker:
    """Curves for Weights & Biases.

    The run's id is kept in the run folder (``wandb.json``), so that a resumed run goes on with the
    same page. What it tells a second time is ignored there; it is the same, to the bit.

    Args:
        project: name of the project.
        folder: of the run; W&B's own files go there too.
        name: of the run on the page; ``None`` lets W&B find one.
        config: choices to show beside the curves.
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
        self._step = 0
        self._run: Any = wandb.init(
            project=project,
            dir=str(folder.path),
            name=name,
            config=config,
            id=_wandb_id(folder),
            resume="allow",
            mode=mode,
        )

    def hooks(self) -> Hooks:
        return Hooks(self._on_start, self._on_step, self._on_epoch, self._on_warning)

    def close(self) -> None:
        """Send what is left."""
        self._run.finish()

    def __enter__(self) -> WandbTracker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self._run.finish(exit_code=0 if error is None else 1)

    def _on_start(self, record: StartRecord) -> None:
        self._step = record.step

    def _on_step(self, record: StepRecord) -> None:
        self._step = record.step
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
    name = "wandb.json"
    with suppress(FileNotFoundError):
        return folder.read_json(name, lambda value: str(fitting(str, value["id"], "id")))
    identity = secrets.token_hex(8)
    folder.write_json(name, {"id": identity})
    return identity


def _missing(package: str, error: ImportError) -> ModuleNotFoundError:
    return ModuleNotFoundError(
        f"{package} cannot be imported ({error}); install it with `pip install {package}`, or "
        "leave it out",
        name=package,
    )
