"""Patch a network in place: fuse its frozen norms, and save no inputs that backward does not need.

    model, _, preprocess = open_clip.create_model_and_transforms(...)
    handle = patch_visual(model)                    # print(handle.report); handle.undo()
    trained = freeze_all_but_affine(model)          # optimise trained.values()

docs/patch.md is the guide.
"""

from ueo_fast.patch.affine_parameters import (
    AffineParameters,
    affine_parameters,
    freeze_all_but_affine,
)
from ueo_fast.patch.apply import PatchHandle, PatchReport, patch_visual, unpatch
from ueo_fast.patch.sites import Site

__all__ = [
    "AffineParameters",
    "PatchHandle",
    "PatchReport",
    "Site",
    "affine_parameters",
    "freeze_all_but_affine",
    "patch_visual",
    "unpatch",
]
