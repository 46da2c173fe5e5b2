"""Whether anybody watches a module's call, so that it must not be bypassed."""

from __future__ import annotations

from torch import nn
from torch.nn.modules import module as torch_module

REPLACEABLE = ("forward", "_conv_forward", "_call_impl", "_wrapped_call_impl")
"""Methods behind a call, which an instance may replace by an attribute of its own."""

_OWN = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def has_hooks(module: nn.Module) -> bool:
    """Whether ``module`` itself has a forward or backward hook."""
    return any(getattr(module, name) for name in _OWN)


def replaced_method(module: nn.Module) -> str | None:
    """Name of a method behind ``module``'s call that this instance has replaced."""
    own = vars(module)
    return next((name for name in REPLACEABLE if name in own), None)


def is_observed(module: nn.Module) -> bool:
    """Whether calling ``module`` runs more than its class's forward.

    Hooks of its own, hooks on all modules (profilers and counters), a method set on the instance.
    """
    if has_hooks(module) or replaced_method(module):
        return True
    return bool(
        torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
        or torch_module._global_backward_hooks
        or torch_module._global_backward_pre_hooks
    )
