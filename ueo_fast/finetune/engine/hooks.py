"""What a training run tells, and to whom."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from ueo_fast.finetune.data.loader import LoadingMeter
from ueo_fast.finetune.files.run_files import EpochRecord, StepRecord


@dataclass(frozen=True)
class StartRecord:
    """Where a run begins, or goes on.

    Attributes:
        step: steps that are done already, by the run that is resumed; 0 in a new one.
        total: steps in all.
        epoch: whole epochs that are done already.
    """

    step: int
    total: int
    epoch: int


@dataclass(frozen=True)
class Checkpoint:
    """All that a run needs to go on.

    Attributes:
        step: steps done.
        tensors: by name, on the CPU.
        values: numbers and lists that JSON can hold.
        source: what messages call it; the file, where it is from one.
    """

    step: int
    tensors: dict[str, Tensor]
    values: dict[str, object]
    source: str = field(default="the checkpoint", compare=False)


class CheckpointStore(Protocol):
    """Where checkpoints are kept, one at a time."""

    def load(self) -> Checkpoint | None:
        """The last one that was saved whole."""

    def save(self, checkpoint: Checkpoint) -> None:
        """Replaces it, atomically."""


def _ignore(record: object) -> None:
    pass


@dataclass(frozen=True)
class Hooks:
    """Who is told of what; nobody, by default.

    Everything is told before the checkpoint of its step is saved, so a log always has all steps of
    the checkpoint; what it has beyond, a resumed run tells again (:attr:`on_start` says from
    where). What a hook raises ends the run.

    Attributes:
        on_start: called once, before the first step, when a checkpoint has been loaded.
        on_step: called after each gradient step.
        on_epoch: called after each epoch, with the classifier in evaluation mode.
        on_warning: called with a sentence when something looks wrong (a collapse).
        checkpoints: where to resume from and where to save to; ``None``: neither.
    """

    on_start: Callable[[StartRecord], None] = _ignore
    on_step: Callable[[StepRecord], None] = _ignore
    on_epoch: Callable[[EpochRecord], None] = _ignore
    on_warning: Callable[[str], None] = _ignore
    checkpoints: CheckpointStore | None = None


def combine(*hooks: Hooks) -> Hooks:
    """Hooks that tell all of ``hooks``, in their order.

    Raises:
        ValueError: more than one of them has checkpoints.
    """
    stores = [one.checkpoints for one in hooks if one.checkpoints is not None]
    if len(stores) > 1:
        raise ValueError(
            f"{len(stores)} of the hooks have checkpoints, but a run has one place to resume from: "
            "leave them out of all but one"
        )

    def on_start(record: StartRecord) -> None:
        for one in hooks:
            one.on_start(record)

    def on_step(record: StepRecord) -> None:
        for one in hooks:
            one.on_step(record)

    def on_epoch(record: EpochRecord) -> None:
        for one in hooks:
            one.on_epoch(record)

    def on_warning(text: str) -> None:
        for one in hooks:
            one.on_warning(text)

    return Hooks(on_start, on_step, on_epoch, on_warning, stores[0] if stores else None)


@contextmanager
def training_bar(title: str, show: bool | None = True) -> Iterator[Any]:
    """A progress bar of steps; ``None`` shows it where the standard error stream is a terminal.

    It leaves no line where a method takes no steps.
    """
    from tqdm import tqdm

    hidden = None if show is None else not show
    with tqdm(desc=title, unit="step", leave=False, delay=0.1, disable=hidden) as bar:
        yield bar


def bar_hooks(bar: Any) -> Hooks:
    """Hooks that move a progress bar of tqdm's, with the losses, the images per second, and
    whether loading or computing takes the time."""
    meter = LoadingMeter()

    def on_start(record: StartRecord) -> None:
        bar.reset(total=record.total)
        bar.update(record.step)

    def on_step(record: StepRecord) -> None:
        values = (
            f"loss={_fixed(record.loss, 4)}",
            f"conditional={_fixed(record.conditional_entropy, 3)}",
            f"marginal={_fixed(record.marginal_entropy, 3)}",
            meter.text(),
        )
        bar.set_postfix_str(", ".join(filter(None, values)), refresh=False)
        bar.update()

    return Hooks(on_start, on_step)


def _fixed(value: float, digits: int) -> str:
    return f"{round(value, digits) + 0.0:.{digits}f}"  # + 0.0: no -0.0000
