"""What autograd holds between forward and backward, by storage."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def saved_bytes(model: nn.Module, forward: Callable[[], Any]) -> int:
    """Bytes of the distinct storages that ``forward()`` saves, those of ``model`` left out."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    saved: dict[int, Tensor] = {}  # the tensors stay alive, so that no address occurs twice

    def pack(tensor: Tensor) -> Tensor:
        saved.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()
    del result
    return sum(t.untyped_storage().nbytes() for where, t in saved.items() if where not in own)
