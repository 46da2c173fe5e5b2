"""Give one instance another forward: its class becomes a subclass, which is made once per class."""

from __future__ import annotations

import copyreg
from typing import Any, ClassVar

from torch import nn
from torch.nn.modules import module as torch_module

REPLACEABLE = ("forward", "_conv_forward", "_call_impl", "_wrapped_call_impl")
"""Methods behind a call, which an instance may replace by an attribute of its own."""

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Patched:
    """A mixin whose methods go before those of the class that the module was built as.

    The module keeps its parameters, buffers, children, hooks and state_dict keys; it is still an
    instance of its original class, and ``super()`` in a mixin's method is that class.
    """

    # Names that no child module has, since they would hide it.
    _ueo_patch: ClassVar[type[Patched]]
    _ueo_original: ClassVar[type[nn.Module]]
    # Attributes of the instance that go with the patch.
    _ueo_options: ClassVar[tuple[str, ...]] = ()

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copy and pickle by the original class: no module has the subclass under a name."""
        reduced = super().__reduce_ex__(max(int(protocol), 2))
        if isinstance(reduced, str) or reduced[0] is not copyreg.__newobj__:  # type: ignore[attr-defined]
            return reduced
        cls = type(self)
        if reduced[1] != (cls,) or "_ueo_original" not in vars(cls):
            return reduced
        return (new_instance, (cls._ueo_patch, cls._ueo_original), *reduced[2:])


class _EqualsOriginal(type):
    """Metaclass of patched classes: they equal their original, also as dictionary keys.

    torch.ao looks up layers by class to fuse and quantise them, and would silently skip patched
    ones.
    """

    def __eq__(cls, other: object) -> bool:
        return cls is other or (other is not None and vars(cls).get("_ueo_original") is other)

    def __hash__(cls) -> int:
        original = vars(cls).get("_ueo_original")
        return type.__hash__(cls) if original is None else hash(original)


_classes: dict[tuple[type[Patched], type[nn.Module]], type[nn.Module]] = {}


def patched_class(patch: type[Patched], original: type[nn.Module]) -> type[nn.Module]:
    """The subclass of ``original`` with the methods of ``patch``; the same for every module."""
    key = patch, original
    if key not in _classes:
        body = {
            # torch.fx recognises torch.nn's modules as leaves by this name.
            "__module__": original.__module__,
            "__doc__": original.__doc__,
            "_ueo_patch": patch,
            "_ueo_original": original,
        }
        # If the original has a metaclass, that stays the only one.
        meta: Any = _EqualsOriginal if type(original) is type else type(original)
        _classes[key] = meta(f"Patched{original.__name__}", (patch, original), body)
    return _classes[key]


def new_instance(patch: type[Patched], original: type[nn.Module]) -> nn.Module:
    """An empty module of the patched class: where copying and unpickling begin."""
    cls = patched_class(patch, original)
    return cls.__new__(cls)


def swap(module: nn.Module, patch: type[Patched]) -> str | None:
    """Give ``module`` the methods of ``patch``; return why its class does not allow it, or None."""
    original = type(module)
    try:
        module.__class__ = patched_class(patch, original)
    except Exception as error:  # from its metaclass, __init_subclass__, __setattr__, ...
        said = f"{type(error).__name__}: {error}".partition("\n")[0]
        return f"{original.__name__} cannot be replaced by a subclass ({said})"
    return None


def restore(module: nn.Module) -> bool:
    """Give a patched module its original class again; return False if that is impossible.

    It is when another class was put on top since (``torch.nn.utils.parametrize``, FSDP).
    """
    cls = type(module)
    if "_ueo_original" in vars(cls) and issubclass(cls, Patched):
        for name in cls._ueo_options:
            vars(module).pop(name, None)
        module.__class__ = cls._ueo_original
        return True
    return not isinstance(module, Patched)


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class that a module had before it was patched."""
    cls = type(module)
    return cls._ueo_original if issubclass(cls, Patched) else cls


def defines(cls: type, method: str) -> str:
    """``module.qualname`` of the class that ``cls`` has a method from; empty if from none."""
    for owner in cls.__mro__:
        if method in vars(owner):
            return f"{owner.__module__}.{owner.__qualname__}"
    return ""


def has_hooks(module: nn.Module) -> bool:
    """Whether ``module`` itself has a forward or backward hook."""
    return any(getattr(module, name) for name in _HOOKS)


def replaced_method(module: nn.Module) -> str | None:
    """The name of a method behind ``module``'s call that this instance has replaced."""
    own = vars(module)
    return next((name for name in REPLACEABLE if name in own), None)


def is_observed(module: nn.Module) -> bool:
    """Whether calling ``module`` runs more than its class's forward, so it must not be bypassed.

    Counts its own hooks, hooks on all modules (profilers, FLOP counters), and methods set on the
    instance.
    """
    if has_hooks(module) or replaced_method(module):
        return True
    return bool(
        torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
        or torch_module._global_backward_hooks
        or torch_module._global_backward_pre_hooks
    )
