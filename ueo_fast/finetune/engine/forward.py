"""The forward pass of both towers in training: precision, memory format, compilation."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor

from ueo_fast.finetune.clip.model import ClipClassifier
from ueo_fast.finetune.engine.training_config import TrainerConfig
from ueo_fast.finetune.evaluation.predict import PRECISIONS, on_device, warn_of_slow


class Forward:
    """Features of images and classes, as the config wants them computed.

    Args:
        classifier: what is run; with ``channels_last`` the weights of its visual tower change their
            memory format.
        config: its precision, memory format, compilation and learning rates are used.

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
        self._encode_images: Callable[[Tensor], Tensor] = classifier.image_features
        self._encode_text: Callable[[], Tensor] = classifier.text_features
        if config.compile:
            # One graph each: with graph breaks allowed, parts would silently run uncompiled.
            self._encode_images = torch.compile(self._encode_images, fullgraph=True)
            if classifier.prompt.is_open_clips:  # the others run with a hook, which is no graph
                self._encode_text = torch.compile(self._encode_text, fullgraph=True)
        self._text_is_fixed = config.prompt_lr == 0
        self._fixed_text: Tensor | None = None

    def to_device(self, images: Tensor) -> Tensor:
        """A batch where and as the tower wants it."""
        return on_device(images, self.device, self._channels_last)

    def image_features(self, images: Tensor) -> Tensor:
        """(B, E), L2-normalised, float32 whatever the precision."""
        with self._autocast():
            return self._encode_images(images)

    def text_features(self) -> Tensor:
        """(C, E), L2-normalised, float32 whatever the precision; computed once where they are
        fixed."""
        if not self._text_is_fixed:
            with self._autocast():
                return self._encode_text()
        if self._fixed_text is None:
            with torch.no_grad(), self._autocast():
                self._fixed_text = self._encode_text()
        return self._fixed_text

    def _autocast(self) -> contextlib.AbstractContextManager[object]:
        # A context per pass: autocast keeps its casts of the weights until the context ends, and
        # those made without gradients must not serve a pass with them.
        if self._dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self._dtype)


def _can_cast(device: torch.device, dtype: torch.dtype) -> bool:
    if not torch.amp.is_autocast_available(device.type):
        return False
    if device.type == "cuda" and dtype == torch.bfloat16:
        return torch.cuda.is_bf16_supported()
    return True
