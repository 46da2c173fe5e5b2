"""Parts of a tower that are in training mode while the rest is evaluated, as Tent wants them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd


class RunningStatistics:
    """Of the BatchNorms that are in training mode; mostly there are none.

    A forward pass updates them, also one whose loss turns out to be NaN.

    Args:
        tower: whose BatchNorms.
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
        """Remember them."""
        self._kept = [buffer.clone() for buffer in self._buffers]

    @torch.no_grad()
    def restore(self) -> None:
        """Put back what was kept last."""
        for buffer, kept in zip(self._buffers, self._kept, strict=True):
            buffer.copy_(kept)


def check_independent(tower: nn.Module, micro_batch_size: int) -> None:
    """Whether the features of an image are the same whatever batch it comes in.

    Raises:
        ValueError: they are not.
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
    """For whoever predicts in between: what is in training mode is so again afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
