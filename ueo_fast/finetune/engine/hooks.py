"""Training callbacks and what they receive; the history that a run returns, and its error."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from ueo_fast.finetune.files.run_files import EpochRecord, StepRecord

if TYPE_CHECKING:  # a message about an error needs no PyTorch
    from torch import Tensor


@dataclass(frozen=True)
class StartRecord:
    """Where a run starts or resumes.

    Attributes:
        step: steps already done, by the run that is resumed; 0 in a new one.
        total: steps in all.
        epoch: whole epochs already done.
    """

    step: int
    total: int
    epoch: int


SERIES = ("loss", "conditional_entropy", "marginal_entropy")
"""The fields of :class:`History` that have one number per step."""


@dataclass
class History:
    """One entry per step; after a resume, of the steps before it too.

    Attributes:
        loss: as in :class:`StepRecord`.
        conditional_entropy: as in :class:`StepRecord`.
        marginal_entropy: as in :class:`StepRecord`. Near 0, everything is put into one class: the
            training has collapsed.
        stopped: why the training ended before its last step; ``None`` where it did not.
        kept_epoch: with early stopping, the epoch whose state the classifier was left in (0: that
            before the training); else ``None``.
        online: (N, C) predictions that were made on the way, where the method makes such.
    """

    loss: list[float] = field(default_factory=list)
    conditional_entropy: list[float] = field(default_factory=list)
    marginal_entropy: list[float] = field(default_factory=list)
    stopped: str | None = None
    kept_epoch: int | None = None
    online: Tensor | None = field(default=None, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.loss)

    def __repr__(self) -> str:
        last = f", last loss {self.loss[-1]:.4g}" if self.loss else ""
        stopped = f", stopped {self.stopped}" if self.stopped else ""
        return f"History({len(self)} steps{last}{stopped})"

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers, lists and ``None``, without ``online``: what JSON can hold."""
        series = {name: list(getattr(self, name)) for name in SERIES}
        return {**series, "stopped": self.stopped, "kept_epoch": self.kept_epoch}


class NonFiniteLossError(RuntimeError):
    """Loss or gradient became NaN or infinite; the weights are those of the step before."""


@dataclass(frozen=True)
class Checkpoint:
    """All that a run needs to resume.

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
    """Training callbacks; no-ops by default. One that raises ends the run.

    All are called before the checkpoint of their step is saved, so a log has every step of the
    checkpoint. A resumed run repeats later steps; :attr:`on_start` receives where it starts.

    Attributes:
        on_start: called once, before the first step, when a checkpoint has been loaded.
        on_step: called after each gradient step.
        on_epoch: called after each epoch, with the classifier in evaluation mode.
        on_warning: called with a sentence when something looks wrong (a collapse).
        checkpoints: where to resume from and save to; ``None``: neither.
    """

    on_start: Callable[[StartRecord], None] = _ignore
    on_step: Callable[[StepRecord], None] = _ignore
    on_epoch: Callable[[EpochRecord], None] = _ignore
    on_warning: Callable[[str], None] = _ignore
    checkpoints: CheckpointStore | None = None


def combine(*hooks: Hooks) -> Hooks:
    """Hooks that call all of ``hooks``, in their order.

    Raises:
        ValueError: more than one of them has checkpoints.
    """
    stores = [one.checkpoints for one in hooks if one.checkpoints is not None]
    if len(stores) > 1:
        raise ValueError(
            f"{len(stores)} of the hooks have checkpoints, but a run has one place to resume from: "
            "leave them out of all but one"
        )

    def all_of(name: str) -> Callable[[Any], None]:
        def call(record: Any) -> None:
            for one in hooks:
                getattr(one, name)(record)

        return call

    store = stores[0] if stores else None
    return Hooks(
        all_of("on_start"), all_of("on_step"), all_of("on_epoch"), all_of("on_warning"), store
    )


@contextmanager
def training_bar(title: str, show: bool | None = True) -> Iterator[Any]:
    """A progress bar of steps; ``show=None`` shows it if the standard error stream is a terminal.

    A method that takes no steps leaves no line.
    """
    from tqdm import tqdm

    hidden = None if show is None else not show
    with tqdm(desc=title, unit="step", leave=False, delay=0.1, disable=hidden) as bar:
        yield bar


def bar_hooks(bar: Any) -> Hooks:
    """Hooks for a tqdm bar: losses, images per second, and whether loading or computing is slow."""
    from ueo_fast.finetune.data.loader import LoadingMeter

    meter = LoadingMeter()

    def on_start(record: StartRecord) -> None:
        bar.reset(total=record.total)
        bar.update(record.step)

    def on_step(record: StepRecord) -> None:
        values = [
            # + 0.0: no -0.0000
            f"loss={round(record.loss, 4) + 0.0:.4f}",
            f"conditional={round(record.conditional_entropy, 3) + 0.0:.3f}",
            f"marginal={round(record.marginal_entropy, 3) + 0.0:.3f}",
            meter.text(),
        ]
        bar.set_postfix_str(", ".join(filter(None, values)), refresh=False)
        bar.update()

    return Hooks(on_start, on_step)
