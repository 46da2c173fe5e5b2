"""Whether anybody watches a module's call, so that it must not be bypassed."""

from __future__ import annotations

from torch import nn
from torch.nn.modules import module as torch_module

_OWN = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def has_hooks(module: nn.Module) -> bool:
    """Whether ``module`` itself has a forward or backward hook."""
    return any(getattr(module, name) for name in _OWN)


def is_observed(module: nn.Module) -> bool:
    """Whether calling ``module`` runs more than its class's forward.

    Hooks of its own, hooks on all modules (profilers and counters), a forward set on the instance.
    """
    if has_hooks(module) or "forward" in vars(module):
        return True
    return bool(
        torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
        or torch_module._global_backward_hooks
        or torch_module._global_backward_pre_hooks
    )
