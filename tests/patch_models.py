"""Towers for the tests of the patch, with statistics and affines unlike those of a new model, and
the comparison of a patched tower with an unpatched one."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import open_clip
import torch
from open_clip.model import _build_vision_tower
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ueo_fast import affine_parameters, freeze_all_but_affine, patch_visual
from ueo_fast.patch import PatchHandle


def tower(name: str, image_size: int | None = None, **vision: Any) -> nn.Module:
    """The visual tower of an open_clip config in evaluation mode; weights from a fixed seed.

    Args:
        name: of the config.
        image_size: instead of the config's.
        vision: fields of ``vision_cfg`` to change.
    """
    config = open_clip.get_model_config(name)
    config["vision_cfg"].update(vision)
    if image_size is not None:
        config["vision_cfg"]["image_size"] = image_size
    torch.manual_seed(0)
    logging.disable(logging.WARNING)
    built = _build_vision_tower(
        config["embed_dim"], config["vision_cfg"], config.get("quick_gelu", False)
    )
    logging.disable(logging.NOTSET)
    return perturbed(built)


def patch_all(model: nn.Module) -> PatchHandle:
    """Patch for inputs of any size, as those of tests are small."""
    return patch_visual(model, min_elements=0)


def perturbed(model: nn.Module) -> nn.Module:
    """``model`` in evaluation mode, as if it had been trained: no affine is 0 or 1."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.running_mean.normal_(0, 0.1, generator=generator)
            module.running_var.uniform_(0.5, 2.0, generator=generator)
    try:
        affines = affine_parameters(model)
    except (TypeError, ValueError):
        return model.eval()
    with torch.no_grad():
        for name, parameter in affines.items():
            if name.endswith("weight"):
                parameter.uniform_(0.5, 1.5, generator=generator)
            else:
                parameter.normal_(0, 0.1, generator=generator)
    return model.eval()


def images(count: int, size: int, memory_format: torch.memory_format) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(count, 3, size, size, generator=generator)
    return x.to(memory_format=memory_format)


def gradients(model: nn.Module, x: Tensor, *, autocast: bool = False) -> dict[str, Tensor]:
    """The output (named "output") and the gradients of x and of all trained parameters."""
    x = x.detach().requires_grad_()
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = model(x)
    generator = torch.Generator().manual_seed(3)
    y.backward(torch.randn(y.shape, generator=generator).to(y.dtype))
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    assert x.grad is not None
    return {"output": y.detach(), "x": x.grad, **found}


def assert_as_exact_as_eager(
    build: Callable[[], nn.Module],
    patch: Callable[[nn.Module], Any],
    x: Tensor,
    *,
    autocast: bool = False,
    tolerance: float,
    freeze: bool = True,
) -> None:
    """Check a patched model: abs(ours - truth) <= abs(eager - truth) + tolerance * abs(truth).

    This compares the norms of each tensor's error; the truth is the unpatched model in float64.
    Under autocast both round by similar amounts but not equally, so ours may be off by twice as
    much in a single tensor. Over all tensors together the rule holds as it is.
    """
    eager = build()
    if freeze:
        freeze_all_but_affine(eager)
    patched, exact = copy.deepcopy(eager), copy.deepcopy(eager).double()
    patch(patched)
    truth = gradients(exact, x.double())
    theirs = gradients(eager, x, autocast=autocast)
    ours = gradients(patched, x, autocast=autocast)
    assert ours.keys() == theirs.keys() == truth.keys()
    total_error = total_allowed = 0.0
    for name, true in truth.items():
        assert ours[name].dtype == theirs[name].dtype, name
        size = true.norm().item()
        error = (ours[name].double() - true).norm().item()
        eagers = (theirs[name].double() - true).norm().item()
        allowed = (2 if autocast else 1) * eagers + tolerance * size
        total_error += error / max(size, 1e-30)
        total_allowed += eagers / max(size, 1e-30) + tolerance
        assert error <= allowed, f"{name}: error {error:.3g} > allowed {allowed:.3g}"
    assert total_error <= total_allowed
