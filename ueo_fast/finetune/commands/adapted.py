"""A finished run's model, for commands that use it."""

from __future__ import annotations

import shlex
from dataclasses import dataclass

from ueo_fast.finetune.clip.delta import load_delta, read_delta
from ueo_fast.finetune.clip.load import LoadedClip, load_base
from ueo_fast.finetune.clip.model import ClipClassifier
from ueo_fast.finetune.commands.device import chosen_device
from ueo_fast.finetune.commands.finetune_config import FinetuneConfig
from ueo_fast.finetune.files.run_folder import RunFolder

DELTA = "delta.safetensors"


@dataclass(frozen=True)
class AdaptedRun:
    """What a run was asked for, and its base model, not adapted yet.

    Attributes:
        folder: of the run.
        config: every choice of it.
        clip: the base model.
    """

    folder: RunFolder
    config: FinetuneConfig
    clip: LoadedClip

    def classifier(self) -> ClipClassifier:
        """The adapted classifier; the base model is changed in place.

        Raises:
            ValueError: the delta is not of this model, or is broken.
        """
        return load_delta(
            self.clip.model,
            self.folder.path / DELTA,
            tokenizer=self.clip.tokenizer,
            base=self.clip.base,
            patch=self.config.patch,
        )


def open_run(path: str, device: str | None) -> AdaptedRun:
    """A run that has something to use.

    Raises:
        OSError: no run, or one that has learnt nothing yet.
        ValueError: its model cannot be loaded.
    """
    folder = RunFolder.open(path)
    if not (folder.path / DELTA).exists():
        raise FileNotFoundError(
            f"{folder.path} has no {DELTA} yet: the run was stopped before its end; finish it with "
            f"ueo-fast finetune --resume --out {shlex.quote(str(folder.path))}"
        )
    config = FinetuneConfig.read(folder)
    base = read_delta(folder.path / DELTA).base
    clip = load_base(base, device=chosen_device(device))
    return AdaptedRun(folder, config, clip)
