"""Patching one model in place, and undoing it."""

from __future__ import annotations

import dataclasses
import warnings
from types import TracebackType

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ueo_fast.patch.batch_norm import (
    MIN_ELEMENTS,
    PatchedBatchNorm,
    PatchedBatchNormAct,
    set_min_elements,
)
from ueo_fast.patch.blocks import Chain
from ueo_fast.patch.hooks import has_hooks
from ueo_fast.patch.patched import Patched, original_class, restore, swap
from ueo_fast.patch.report import PatchReport, Site
from ueo_fast.patch.sites import block_of, decide, kind_of
from ueo_fast.patch.tower import visual_tower

_BATCH_NORMS = (PatchedBatchNorm, PatchedBatchNormAct)


class PatchHandle:
    """What :func:`patch_visual` did, and how to undo it; also a context manager, which undoes.

    A deep copy of a model and its handle together gives the copy a handle of its own.

    Attributes:
        report: every norm, convolution and pool, patched or not, with the reason.
    """

    def __init__(self, report: PatchReport, modules: list[nn.Module]) -> None:
        self.report = report
        self._modules = modules

    def undo(self) -> None:
        """Gives every module that this handle patched its class again. A second call does nothing.

        Warns of modules on whose patched class something else was put since (parametrisations,
        FSDP): those stay.
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
    """Replace, on this instance, what holds memory or time in vain where only affines are trained.

    - Batch norms by running statistics become one fused call each, with the ReLU, or the addition
      and the ReLU, that follow where the structure is known (open_clip's ModifiedResNet,
      torchvision's residual blocks, timm's ``BatchNormAct2d``, ``nn.Sequential``). In training
      mode, and for small inputs on a CPU, they are the originals.
    - Layer norms use fused kernels on a GPU.
    - Convolutions with a frozen weight, and average pools, hold no input for backward.

    Everything else stays: the same Parameter objects, buffers, state_dict keys and hooks; a patched
    module is an instance of its original class. What to run is decided in every call, so the order
    of patching, freezing, ``.eval()``, ``.to()`` and ``register_forward_hook`` does not matter.

    Args:
        model: an open_clip model, whose ``visual`` is patched, or any other module, which is
            patched as a whole. Changed in place.
        min_elements: inputs of a batch norm with fewer elements are left to the original on a CPU,
            where it is faster than a fused call. None means 400,000, as measured; 0 fuses all.

    Returns:
        A handle: ``print(handle.report)``, ``handle.undo()``, or ``with patch_visual(model):``. A
        module that was patched before is left to the handle that patched it, and reported so.

    Raises:
        TypeError: ``model`` is no module, or ``min_elements`` no integer.
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
    """Patch what can be; ``swapped`` grows by each module whose class has changed."""
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
    """By batch norm, what it is fused with."""
    said: dict[nn.Module, str] = {}
    for norm, activation, adds, joined in chains:
        if not isinstance(norm, PatchedBatchNorm):
            continue
        follower = "the addition and the ReLU" if adds else "the ReLU"
        watched = [module for module in (norm, activation) if module and has_hooks(module)]
        if joined and not (watched or has_hooks(joined)):
            tail = " and the ReLU after it" if activation else ""
            said[norm] = f"fused with the 1 x 1 convolution before it{tail}, whose input is held"
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
            f"A batch norm's input of fewer than {min_elements:,} elements on the CPU is left to "
            "PyTorch's own, which is faster there: patch_visual(model, min_elements=0) fuses all."
        )
    if any(isinstance(m, _BatchNorm) and m.training for m in tower.modules()):
        notes.append(
            "The model is in training mode: its batch norms use the statistics of the batch and "
            "run the originals until model.eval()."
        )
    return tuple(notes)


def unpatch(model: nn.Module) -> None:
    """Undo every patch in ``model`` without a handle: on a copy, or one that was unpickled."""
    _restore_all(list(model.modules()))


def _restore_all(modules: list[nn.Module]) -> None:
    stuck = [type(module).__name__ for module in modules if not restore(module)]
    if stuck:
        warnings.warn(
            f"{len(stuck)} patched modules stay as they are, because their class was changed again "
            f"after the patch ({', '.join(sorted(set(stuck)))}): undo that first",
            stacklevel=3,
        )
