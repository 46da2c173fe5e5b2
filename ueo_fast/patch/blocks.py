"""Blocks whose own forward says which activation follows which batch norm."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn

from ueo_fast.patch.patched import Patched


class Chain(NamedTuple):
    """A batch norm and what is called together with it.

    Attributes:
        activation: after the norm, if any.
        adds: whether something is added between the norm and the activation.
        joined: the convolution before the norm, where it is part of the same call.
    """

    norm: nn.Module
    activation: nn.Module | None
    adds: bool
    joined: nn.Module | None = None


@dataclass(frozen=True)
class Block:
    """A block that can call its batch norms and activations together.

    Attributes:
        patch: the methods that do so.
        chains: what is fused in a module of this kind; none means that it is left as it is.
    """

    patch: type[Patched]
    chains: Callable[[nn.Module], list[Chain]]


def of_children(children: str, chains: str) -> Callable[[Any], list[Chain]]:
    """The chains of a block with a fixed set of children.

    Args:
        children: names of all of them, None or not. A block with others, from another version of
            its library, has no chains.
        chains: "norm>activation" or "norm+>activation" (with an addition between), by name.
    """
    expected = frozenset(children.split())
    parsed = [link.split(">") for link in chains.split()]

    def find(module: Any) -> list[Chain]:
        # A child that is None (no shortcut) is an attribute only.
        known = all(hasattr(module, name) for name in expected)
        if not known or not set(module._modules) <= expected:
            return []
        return [
            Chain(
                getattr(module, norm.removesuffix("+")),
                getattr(module, activation),
                norm.endswith("+"),
            )
            for norm, activation in parsed
        ]

    return find
