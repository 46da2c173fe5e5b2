"""Adaptation methods behind one interface, by name. A new one is a class in its own file, listed in
:data:`METHODS`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ueo_fast.finetune.methods.adabn import AdaBN
from ueo_fast.finetune.methods.base import LossMethod, Method, ZeroShot
from ueo_fast.finetune.methods.dance import DANCE
from ueo_fast.finetune.methods.pouf import POUF
from ueo_fast.finetune.methods.tent import Tent
from ueo_fast.finetune.methods.ueo import UEO, EntMin, InfoMax, Oracle
from ueo_fast.finetune.methods.upl import UPL
from ueo_fast.ranges import check_one_of

__all__ = [
    "DANCE",
    "METHODS",
    "POUF",
    "UEO",
    "UPL",
    "AdaBN",
    "EntMin",
    "InfoMax",
    "LossMethod",
    "Method",
    "Oracle",
    "Tent",
    "ZeroShot",
    "make_method",
    "option_defaults",
]

METHODS: Mapping[str, type[Method]] = {
    method.name: method
    for method in (ZeroShot, AdaBN, Tent, EntMin, InfoMax, UPL, POUF, DANCE, UEO, Oracle)
}
"""Every method by its name, in the order of tables: baselines, rivals, ours, the upper bound."""


def option_defaults(method: type[Method]) -> dict[str, Any]:
    """The options of a method with their defaults: the fields of its dataclass."""
    fields: Any = method
    return {field.name: field.default for field in dataclasses.fields(fields)}


def make_method(name: str, **options: object) -> Method:
    """A method by name, from the options of all methods.

    Args:
        name: a key of :data:`METHODS`.
        options: fields of any method (``trade_off``, ``confidence``, ``mcm_scale``, ``eps``,
            ``k``, ...). One that this method has no use for must have its default.

    Raises:
        TypeError: an option that no method has.
        ValueError: unknown name; an option that the method does not use; a value that it refuses.
    """
    check_one_of("method", name, METHODS)
    users: dict[str, list[str]] = {}
    for method in METHODS.values():
        for option in option_defaults(method):
            users.setdefault(option, []).append(method.name)
    for option in options:
        if option not in users:
            raise TypeError(f"no method has the option {option!r}: there are {', '.join(users)}")
    used = {option: value for option, value in options.items() if name in users[option]}
    in_vain = [
        f"{option}={value!r} (used by {', '.join(users[option])})"
        for option, value in options.items()
        if option not in used and value != option_defaults(METHODS[users[option][0]])[option]
    ]
    if in_vain:
        raise ValueError(
            f"method={name!r} has no use for {'; '.join(in_vain)}: leave it out, or choose one of "
            "these methods"
        )
    return METHODS[name](**used)
