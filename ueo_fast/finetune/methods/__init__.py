"""Adaptation methods behind one interface, and the registry that names them."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any

from ueo_fast.finetune.methods.adabn import AdaBN
from ueo_fast.finetune.methods.base import LossMethod, Method
from ueo_fast.finetune.methods.entmin import EntMin
from ueo_fast.finetune.methods.infomax import InfoMax
from ueo_fast.finetune.methods.ueo import UEO
from ueo_fast.finetune.methods.zeroshot import ZeroShot

METHODS: dict[str, type[Method]] = {
    method.name: method for method in (ZeroShot, AdaBN, EntMin, InfoMax, UEO)
}


def create_method(name: str, **options: Any) -> Method:
    """The method called ``name``, with its own options.

    Raises:
        ValueError: no such method, or an option that this method does not have; the message lists
            those that exist.
    """
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}: choose one of {', '.join(METHODS)}")
    method = METHODS[name]
    known: list[str] = [field.name for field in fields(method)] if is_dataclass(method) else []
    for option in options:
        if option not in known:
            raise ValueError(
                f"method {name!r} has no option {option!r}: it has {', '.join(known) or 'none'}"
            )
    return method(**options)


__all__ = [
    "METHODS",
    "UEO",
    "AdaBN",
    "EntMin",
    "InfoMax",
    "LossMethod",
    "Method",
    "ZeroShot",
    "create_method",
]
