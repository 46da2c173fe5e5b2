"""Where a command computes, and the model of a finished run."""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass
from typing import NamedTuple, get_args

import torch

from ueo_fast.finetune.clip.base_model import named_as_flags
from ueo_fast.finetune.clip.delta import load_delta, read_delta
from ueo_fast.finetune.clip.load import LoadedClip, load_base
from ueo_fast.finetune.clip.model import ClipClassifier
from ueo_fast.finetune.commands.finetune_config import FinetuneConfig
from ueo_fast.finetune.data import Decoding
from ueo_fast.finetune.files.run_files import DELTA
from ueo_fast.finetune.files.run_folder import RunFolder
from ueo_fast.ranges import check_number


def chosen_device(name: str | None) -> str:
    """``name`` if this machine has such a device; ``None``: a GPU where there is one, else the CPU.

    Raises:
        ValueError: PyTorch knows no such device, or cannot use it here.
    """
    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=name).cpu()
    except (RuntimeError, NotImplementedError, AssertionError, ImportError) as error:
        # Only the first sentence: of a missing backend PyTorch lists all the others.
        reason = str(error).partition("\n")[0].partition(". ")[0].rstrip(".")
        raise ValueError(
            f"device={name!r} cannot be used here: {reason}. Take --device cpu, or leave it out; "
            "ueo-fast info lists the devices of this machine"
        ) from error
    return name


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
            patch=self.config.model.patch,
        )


def open_run(
    path: str, device: str | None, model: str | None = None, pretrained: str | None = None
) -> AdaptedRun:
    """A run that has something to use.

    Args:
        path: its folder.
        device: where its model goes.
        model: the base model as the user names it; ``None`` takes the run's word for it, if this
            machine knows that model.
        pretrained: its weights.

    Raises:
        OSError: no run, or one that has learnt nothing yet.
        ValueError: its model cannot be loaded, or is not known on this machine.
    """
    folder = RunFolder.open(path)
    if not (folder.path / DELTA).exists():
        raise FileNotFoundError(
            f"{folder.path} has no {DELTA} yet: the run was stopped before its end; finish it with "
            f"ueo-fast finetune --resume --out {shlex.quote(str(folder.path))}"
        )
    config = FinetuneConfig.read(folder)
    base = read_delta(folder.path / DELTA).base
    with named_as_flags():
        clip = load_base(base, model=model, pretrained=pretrained, device=chosen_device(device))
    return AdaptedRun(folder, config, clip)


class Adapted(NamedTuple):
    """An adapted classifier with its run's score scale and decoding.

    Attributes:
        classifier: the classifier.
        mcm_scale: multiplies the cosines in the MCM score.
        decode: how image files are decoded.
    """

    classifier: ClipClassifier
    mcm_scale: float
    decode: Decoding


def open_adapted(
    path: str, device: str | None, model: str | None = None, pretrained: str | None = None
) -> Adapted:
    """Load an adapted classifier from a run folder or a delta file.

    Args:
        path: of either.
        device: this and the others as for :func:`open_run`, where the errors are listed too.
        model: the base model as the user names it.
        pretrained: its weights.
    """
    if not os.path.isfile(path):
        run = open_run(path, device, model, pretrained)
        return Adapted(run.classifier(), run.config.method.mcm_scale, run.config.data.decode)
    delta = read_delta(path)
    scale, decode = delta.extra.get("mcm_scale", 1.0), delta.extra.get("decode", "full")
    try:
        check_number("mcm_scale", scale, sign="positive")
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}; give --mcm-scale") from error
    if decode not in get_args(Decoding):
        raise ValueError(f"{path}: decode is {decode!r:.50}, expected auto or full")
    with named_as_flags():
        clip = load_base(
            delta.base, model=model, pretrained=pretrained, device=chosen_device(device)
        )
    classifier = load_delta(clip.model, path, tokenizer=clip.tokenizer, base=clip.base)
    return Adapted(classifier, scale, decode)
