"""What a patch did: one row for every norm, convolution and pool."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Literal

Kind = Literal["norm", "conv", "pool"]
KINDS: tuple[Kind, ...] = ("norm", "conv", "pool")


@dataclass(frozen=True)
class Site:
    """One norm, convolution or pool.

    Attributes:
        name: as in ``model.named_modules()``.
        type: name of the class that the module was built as.
        kind: ``norm``, ``conv`` or ``pool``.
        patched: whether our forward is in place (it may still run the original, see ``reason``).
        reason: what it does, or why it was left alone.
    """

    name: str
    type: str
    kind: Kind
    patched: bool
    reason: str


@dataclass(frozen=True)
class PatchReport:
    """All sites, in the model's order; ``str`` makes a table of them.

    Attributes:
        sites: one row each.
        notes: what holds for the model as a whole.
    """

    sites: tuple[Site, ...]
    notes: tuple[str, ...] = ()

    @property
    def patched(self) -> tuple[Site, ...]:
        """Sites whose forward is ours."""
        return tuple(site for site in self.sites if site.patched)

    @property
    def left_alone(self) -> tuple[Site, ...]:
        """Sites that were left as they are."""
        return tuple(site for site in self.sites if not site.patched)

    def summary(self) -> str:
        """One line per kind, and per reason how many sites it has."""
        lines = []
        for kind in KINDS:
            sites = [site for site in self.sites if site.kind == kind]
            if not sites:
                continue
            lines.append(f"{kind}: {sum(site.patched for site in sites)} of {len(sites)} patched")
            for (patched, reason), count in Counter((s.patched, s.reason) for s in sites).items():
                lines.append(f"  {count:4} {'patched' if patched else 'left'}: {reason}")
        return "\n".join([*(lines or ["no norm, convolution or pool was found"]), *self.notes])

    def table(self) -> str:
        """One line per site."""
        header = Site("name", "type", "norm", True, "")
        names, types = (
            max(len(str(getattr(site, column))) for site in (header, *self.sites))
            for column in ("name", "type")
        )
        lines = [f"{'name':{names}}  {'type':{types}}  kind  patched  what or why"]
        for site in self.sites:
            word = "yes" if site.patched else "no"
            lines.append(
                f"{site.name:{names}}  {site.type:{types}}  {site.kind}  {word:7}  {site.reason}"
            )
        return "\n".join(lines)

    def __str__(self) -> str:
        return f"{self.table()}\n\n{self.summary()}" if self.sites else self.summary()
