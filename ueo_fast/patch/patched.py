"""How one instance gets another forward: its class becomes a subclass, made once per class."""

from __future__ import annotations

import copyreg
from typing import Any, ClassVar

from torch import nn


class Patched:
    """Mixin whose methods go before those of the class that a module was built as.

    The module keeps its parameters, buffers, children, hooks and state_dict keys; it is still an
    instance of its original class, and ``super()`` in a mixin's method is that class's method.
    """

    # Names that no child module has, which they would hide.
    _ueo_patch: ClassVar[type[Patched]]
    _ueo_original: ClassVar[type[nn.Module]]
    # Attributes of the instance that go with the patch.
    _ueo_options: ClassVar[tuple[str, ...]] = ()

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copies and pickles by the original class: no module holds the subclass by name."""
        reduced = super().__reduce_ex__(max(int(protocol), 2))
        if isinstance(reduced, str) or reduced[0] is not copyreg.__newobj__:  # type: ignore[attr-defined]
            return reduced
        cls = type(self)
        if reduced[1] != (cls,) or "_ueo_original" not in vars(cls):
            return reduced
        return (new_instance, (cls._ueo_patch, cls._ueo_original), *reduced[2:])


class _EqualsOriginal(type):
    """Of patched classes: ``==`` to the original, and found in its place as a key.

    torch.ao looks layers up by their class, to fuse and to quantise them, and would silently leave
    patched ones as they are.
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
        _classes[key] = _make_class(patch, original)
    return _classes[key]


def _make_class(patch: type[Patched], original: type[nn.Module]) -> type[nn.Module]:
    body = {
        # torch.fx takes modules of torch.nn for leaves, by this name.
        "__module__": original.__module__,
        "__doc__": original.__doc__,
        "_ueo_patch": patch,
        "_ueo_original": original,
    }
    # A metaclass of the original's stays the only one.
    meta: Any = _EqualsOriginal if type(original) is type else type(original)
    cls: type[nn.Module] = meta(f"Patched{original.__name__}", (patch, original), body)
    return cls


def new_instance(patch: type[Patched], original: type[nn.Module]) -> nn.Module:
    """An empty module of the patched class: where copying and unpickling begin."""
    cls = patched_class(patch, original)
    return cls.__new__(cls)


def swap(module: nn.Module, patch: type[Patched]) -> str | None:
    """Give ``module`` the methods of ``patch``; why its class does not allow it, else None."""
    original = type(module)
    try:
        module.__class__ = patched_class(patch, original)
    except Exception as error:  # of its metaclass, __init_subclass__, __setattr__, ...
        said = f"{type(error).__name__}: {error}".partition("\n")[0]
        return f"{original.__name__} allows no subclass in its place ({said})"
    return None


def restore(module: nn.Module) -> bool:
    """Gives a patched module its original class again; False where that cannot be done.

    It cannot where somebody has put a further class on top (``torch.nn.utils.parametrize``, FSDP).
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
