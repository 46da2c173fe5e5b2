"""The forward pass of both towers in training: precision, memory format, compilation, modes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from ueo_fast.finetune.clip.model import ClipClassifier
from ueo_fast.finetune.engine.training_config import TrainerConfig
from ueo_fast.finetune.evaluation.predict import PRECISIONS, on_device, warn_of_slow


class Forward:
    """Features of images and classes, computed as ``config`` says.

    With ``channels_last`` the weights of the classifier's visual tower change their memory format.

    Raises:
        ValueError: this device has no autocast to ``config.precision``.
    """

    def __init__(self, classifier: ClipClassifier, config: TrainerConfig) -> None:
        self.device = classifier.logit_scale.device
        self._dtype = PRECISIONS[config.precision]
        self._channels_last = config.channels_last
        if self._dtype is not None and not _can_cast(self.device, self._dtype):
            raise ValueError(
                f"precision={config.precision!r} does not run on {self.device}: this PyTorch or "
                "this device lacks it; take precision='fp32'"
            )
        warn_of_slow(self.device, self._dtype)
        if config.channels_last:
            classifier.model.visual.to(memory_format=torch.channels_last)
        self._encode_images, self._encode_text = classifier.image_features, classifier.text_features
        if config.compile:
            # One graph each: with graph breaks allowed, parts would silently run uncompiled.
            self._encode_images = torch.compile(self._encode_images, fullgraph=True)
            if classifier.prompt.is_open_clips:  # other towers run with a hook, which has no graph
                self._encode_text = torch.compile(self._encode_text, fullgraph=True)
        self._text_is_fixed = config.prompt_lr == 0
        self._fixed_text: Tensor | None = None

    def to_device(self, images: Tensor) -> Tensor:
        """The batch on the tower's device, in its memory format."""
        return on_device(images, self.device, self._channels_last)

    def image_features(self, images: Tensor) -> Tensor:
        """(B, E), L2-normalised, float32 whatever the precision."""
        with self._autocast():
            return self._encode_images(images)

    def text_features(self) -> Tensor:
        """(C, E), L2-normalised, float32 whatever the precision; computed once if fixed."""
        if self._fixed_text is not None:
            return self._fixed_text
        with torch.set_grad_enabled(not self._text_is_fixed), self._autocast():
            features = self._encode_text()
        if self._text_is_fixed:
            self._fixed_text = features
        return features

    def _autocast(self) -> contextlib.AbstractContextManager[object]:
        # A context per pass: autocast keeps its casts of the weights until the context ends, and
        # those made without gradients must not serve a pass with them.
        if self._dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self._dtype)


def _can_cast(device: torch.device, dtype: torch.dtype) -> bool:
    if device.type == "cuda" and dtype == torch.bfloat16 and not torch.cuda.is_bf16_supported():
        return False
    return torch.amp.is_autocast_available(device.type)


class RunningStatistics:
    """Of the BatchNorms of ``tower`` that are in training mode; mostly there are none.

    A forward pass updates them, also one whose loss turns out to be NaN.
    """

    def __init__(self, tower: nn.Module) -> None:
        self._buffers = [
            buffer
            for module in tower.modules()
            if isinstance(module, _BatchNorm) and module.training
            for buffer in module.buffers(recurse=False)
        ]
        self._kept: list[Tensor] = []

    def keep(self) -> None:
        self._kept = [buffer.clone() for buffer in self._buffers]

    @torch.no_grad()
    def restore(self) -> None:
        for buffer, kept in zip(self._buffers, self._kept, strict=True):
            buffer.copy_(kept)


def check_independent(tower: nn.Module, micro_batch_size: int) -> None:
    """Refuse micro-batches where the features of an image depend on the rest of its batch.

    Raises:
        ValueError: a BatchNorm or dropout is in training mode.
    """
    for path, module in tower.named_modules(prefix="visual"):
        if isinstance(module, _BatchNorm | _DropoutNd) and module.training:
            raise ValueError(
                f"micro_batch_size={micro_batch_size} does not go with this method: {path} "
                f"({type(module).__name__}) is in training mode, so the features of a micro-batch "
                "are not those of the whole batch; leave micro_batch_size out"
            )


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Switch to eval mode, then restore each module's mode."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
