"""Who is told how a run goes: the terminal, the run folder, TensorBoard, Weights & Biases."""

from __future__ import annotations

import importlib
import shlex
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from typing import Any

from ueo_fast.finetune.commands.evaluation import brief
from ueo_fast.finetune.commands.finetune_config import FinetuneConfig
from ueo_fast.finetune.commands.recorder import Recorder
from ueo_fast.finetune.engine.checkpoint import SafetensorsCheckpoints
from ueo_fast.finetune.engine.hooks import (
    EpochRecord,
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
from ueo_fast.finetune.files.run_folder import RunFolder


def check_trackers(config: FinetuneConfig) -> None:
    """Whether the packages are there that the run will report to, before hours are spent.

    Raises:
        ModuleNotFoundError: one is not.
    """
    if config.tensorboard:
        importlib.import_module("tensorboard")
    if config.wandb is not None:
        importlib.import_module("wandb")


@contextmanager
def training_hooks(
    config: FinetuneConfig, folder: RunFolder, recorder: Recorder
) -> Iterator[Hooks]:
    """Hooks for a run, and its checkpoints; what they opened is closed at the end."""
    with ExitStack() as stack:
        trackers: list[Tracker] = [JsonLinesTracker(folder)]
        if config.tensorboard:
            trackers.append(TensorBoardTracker(folder.path / "tensorboard"))
        if config.wandb is not None:
            trackers.append(_wandb(config.wandb, config, folder))
        for tracker in trackers:
            stack.enter_context(closing(tracker))
        bar = stack.enter_context(training_bar(config.method))
        yield combine(
            *(tracker.hooks() for tracker in trackers),
            bar_hooks(bar),
            _terminal(bar, recorder),
            Hooks(checkpoints=SafetensorsCheckpoints(folder)),
        )


def _wandb(project: str, config: FinetuneConfig, folder: RunFolder) -> WandbTracker:
    try:
        return WandbTracker(project, folder, name=folder.path.name, config=config.as_dict())
    except (ImportError, OSError):
        raise
    except Exception as error:  # wandb has its own tree of errors: no key, no network, no right
        raise OSError(
            f"wandb={project!r}: Weights & Biases says: {error}\nMend that (wandb login), or set "
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
