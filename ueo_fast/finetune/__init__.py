"""The recipe around the loss: prompt, affine parameters, category shifts, metrics, training.

    from ueo_fast.finetune import adapt

Everything else is imported from its module, e.g. ``from ueo_fast.finetune.clip.prompt import
PromptLearner``; ``adapt`` itself is imported when it is asked for, so that a module needs no more
packages than it uses, and ``import ueo_fast`` needs neither open_clip nor scikit-learn.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ueo_fast.finetune.adaptation import Adaptation, adapt

__all__ = ["Adaptation", "adapt"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from ueo_fast.finetune import adaptation

        return getattr(adaptation, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
