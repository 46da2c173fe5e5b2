"""Where a model's visual tower is."""

from __future__ import annotations

from torch import nn


def visual_tower(model: nn.Module) -> tuple[nn.Module, str]:
    """``model.visual`` and the prefix of its names; a model without one is the tower itself."""
    tower = getattr(model, "visual", None)
    return (tower, "visual.") if isinstance(tower, nn.Module) else (model, "")
