"""Patch one model in place, report what was done, and undo it."""

from __future__ import annotations

import dataclasses
import warnings
from collections import Counter
from dataclasses import dataclass
from types import TracebackType

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ueo_fast.patch.blocks import Chain, block_of
from ueo_fast.patch.norms import (
    MIN_ELEMENTS,
    PatchedBatchNorm,
    PatchedBatchNormAct,
    set_min_elements,
)
from ueo_fast.patch.patched import Patched, has_hooks, original_class, restore, swap
from ueo_fast.patch.sites import KINDS, Site, decide, kind_of, visual_tower

_BATCH_NORMS = (PatchedBatchNorm, PatchedBatchNormAct)


@dataclass(frozen=True)
class PatchReport:
    """All norms, convolutions and pools, in the model's order; ``str`` makes a table of them.

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
        """One line per kind, and the number of sites for each reason."""
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


class PatchHandle:
    """What :func:`patch_visual` did and how to undo it; a context manager that undoes on exit.

    A deep copy of a model together with its handle gives the copy a handle of its own.

    Attributes:
        report: every norm, convolution and pool, patched or not, with the reason.
    """

    def __init__(self, report: PatchReport, modules: list[nn.Module]) -> None:
        self.report = report
        self._modules = modules

    def undo(self) -> None:
        """Give every module that this handle patched its class again. A second call does nothing.

        Modules whose class was changed again since (parametrisations, FSDP) stay, with a warning.
        """
        _restore_all(self._modules)
        self._modules = []

    def __enter__(self) -> PatchHandle:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.undo()

    def __repr__(self) -> str:
        patched = len(self.report.patched)
        return f"PatchHandle({patched} of {len(self.report.sites)} sites patched)"


def patch_visual(model: nn.Module, *, min_elements: int | None = None) -> PatchHandle:
    """Replace, on this instance, what wastes memory or time if only the affines are trained.

    - Batch norms with running statistics become one fused call each, which includes the ReLU, or
      the addition and the ReLU, that follow if the structure is known (open_clip's ModifiedResNet,
      torchvision's residual blocks, timm's ``BatchNormAct2d``, ``nn.Sequential``). In training
      mode, and for small inputs on a CPU, they are the originals.
    - Layer norms use fused kernels on a GPU.
    - Convolutions with a frozen weight, and average pools, save no input for backward.

    Everything else stays: the same Parameter objects, buffers, state_dict keys and hooks; a patched
    module is an instance of its original class. Each call decides what to run, so the order of
    patching, freezing, ``.eval()``, ``.to()`` and ``register_forward_hook`` does not matter.

    Args:
        model: an open_clip model, whose ``visual`` is patched, or any other module, which is
            patched as a whole. Changed in place.
        min_elements: on a CPU, batch norms with fewer elements in their input run the original,
            which is faster for them. None means 400,000, as measured; 0 fuses every size.

    Returns:
        A handle: ``print(handle.report)``, ``handle.undo()``, or ``with patch_visual(model):``. A
        module that is already patched stays with the handle that patched it; the report says so.

    Raises:
        TypeError: ``model`` is not a module, or ``min_elements`` not an integer.
        ValueError: ``min_elements`` is negative.

    Source: Bhatia and Dangel, 2024, "Lowering PyTorch's Memory Consumption for Selective
    Differentiation"; the fused kernels are :func:`ueo_fast.frozen_batch_norm` and
    :func:`ueo_fast.layer_norm`.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    _check_min_elements(min_elements)
    tower, prefix = visual_tower(model)
    swapped: list[nn.Module] = []
    try:
        report = _patch(tower, prefix, min_elements, swapped)
    except BaseException:
        _restore_all(swapped)
        raise
    return PatchHandle(report, swapped)


def _patch(
    tower: nn.Module, prefix: str, min_elements: int | None, swapped: list[nn.Module]
) -> PatchReport:
    """Patch all that can be; ``swapped`` collects each module whose class has changed."""
    rows: list[tuple[nn.Module, Site]] = []
    for name, module in tower.named_modules():
        kind = kind_of(module)
        if kind is None:
            continue
        if isinstance(module, Patched):
            patched, reason = True, "already patched"
        else:
            patch, reason = decide(module)
            refused = swap(module, patch) if patch is not None else None
            patched = patch is not None and refused is None
            if refused is not None:
                reason = refused
            elif patch is not None:
                swapped.append(module)
                if min_elements is not None and issubclass(patch, _BATCH_NORMS):
                    set_min_elements(module, min_elements)
        type_ = original_class(module).__name__
        full = f"{prefix}{name}".rstrip(".")
        rows.append((module, Site(full, type_, kind, patched, reason)))
    fused: dict[nn.Module, str] = {}
    for module in tower.modules():
        if isinstance(module, Patched) or (block := block_of(module)) is None:
            continue
        patch, chains = block
        if swap(module, patch) is None:
            swapped.append(module)
            fused.update(_fused(chains))
    return PatchReport(
        tuple(
            dataclasses.replace(site, reason=fused[module]) if module in fused else site
            for module, site in rows
        ),
        _notes(tower, swapped, MIN_ELEMENTS if min_elements is None else min_elements),
    )


def _check_min_elements(value: object) -> None:
    if value is None:
        return
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(
            f"min_elements must be an int or None (as measured), got {type(value).__name__}"
        )
    if value < 0:
        raise ValueError(f"min_elements must not be negative, got {value}: 0 fuses every size")


def _fused(chains: list[Chain]) -> dict[nn.Module, str]:
    """What each batch norm is fused with."""
    said: dict[nn.Module, str] = {}
    for norm, activation, adds, joined in chains:
        if not isinstance(norm, PatchedBatchNorm):
            continue
        follower = "the addition and the ReLU" if adds else "the ReLU"
        watched = [module for module in (norm, activation) if module and has_hooks(module)]
        if joined and not (watched or has_hooks(joined)):
            tail = " and the ReLU after it" if activation else ""
            said[norm] = f"fused with the 1 x 1 convolution before it{tail}, whose input is saved"
        elif activation is None:
            said[norm] = "fused, not with the convolution before it while one of them has hooks"
        elif type(activation) is not nn.ReLU:
            said[norm] = f"fused, not with the {type(activation).__name__} that follows"
        elif watched:
            owners = " and ".join(original_class(module).__name__ for module in watched)
            said[norm] = f"fused, not with {follower} that follows while {owners} has hooks"
        else:
            said[norm] = f"fused with {follower} that follows"
    return said


def _notes(tower: nn.Module, swapped: list[nn.Module], min_elements: int) -> tuple[str, ...]:
    notes = []
    if min_elements and any(isinstance(module, _BATCH_NORMS) for module in swapped):
        notes.append(
            f"Batch norms run PyTorch's kernel for inputs of fewer than {min_elements:,} elements "
            "on the CPU, where it is faster; patch_visual(model, min_elements=0) fuses every size."
        )
    if any(isinstance(m, _BatchNorm) and m.training for m in tower.modules()):
        notes.append(
            "The model is in training mode: its batch norms use the statistics of the batch and "
            "run the originals until model.eval()."
        )
    return tuple(notes)


def unpatch(model: nn.Module) -> None:
    """Undo every patch in ``model`` without a handle: for a copy, or an unpickled model."""
    _restore_all(list(model.modules()))


def _restore_all(modules: list[nn.Module]) -> None:
    stuck = [type(module).__name__ for module in modules if not restore(module)]
    if stuck:
        warnings.warn(
            f"{len(stuck)} patched modules stay as they are, because their class was changed again "
            f"after the patch ({', '.join(sorted(set(stuck)))}): undo that change first",
            stacklevel=3,
        )
