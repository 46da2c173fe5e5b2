"""Universal Entropy Optimization for CLIP (Liang et al., ICML 2024), fast and exact.

The names below are imported when they are first used, and with them PyTorch, so that the command
line answers at once where nothing is computed. In a process that has PyTorch already they are
imported at once: loading an exported program needs the operators, not the names.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ueo_fast.functional import UEOStats, mcm_score, ueo_loss, ueo_loss_and_grad
    from ueo_fast.gradient_cache import GradCache
    from ueo_fast.modules import UEOLoss
    from ueo_fast.normalization import channel_affine, frozen_batch_norm, layer_norm
    from ueo_fast.patch import patch_visual
    from ueo_fast.patch.affine_parameters import affine_parameters, freeze_all_but_affine

__version__ = "0.1.0"
__all__ = [
    "GradCache",
    "UEOLoss",
    "UEOStats",
    "affine_parameters",
    "channel_affine",
    "freeze_all_but_affine",
    "frozen_batch_norm",
    "layer_norm",
    "mcm_score",
    "patch_visual",
    "ueo_loss",
    "ueo_loss_and_grad",
]

_ROOMS = ("functional", "gradient_cache", "modules", "normalization", "patch")
_MODULES = (*_ROOMS, "reference", "backends")  # ueo_fast.reference.ueo_loss needs no import


if not TYPE_CHECKING:  # which would take any name for a known one

    def __getattr__(name: str) -> Any:
        if name in _MODULES:
            return import_module(f"{__name__}.{name}")
        if name in __all__:
            for room in map(import_module, (f"{__name__}.{room}" for room in _ROOMS)):
                found = {key: getattr(room, key, None) for key in __all__}
                # Not a submodule that has the name of a function.
                globals().update({key: value for key, value in found.items() if callable(value)})
            return globals()[name]
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})


if "torch" in sys.modules:
    import_module(f"{__name__}.modules")
