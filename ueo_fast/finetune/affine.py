"""The affine parameters of the visual tower's normalisation layers: what UEO trains in the images.

Statistics and all other weights stay frozen. Keep the model in eval mode while training, so that
BatchNorm uses its running statistics.
"""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

SCOPES = ("all", "authors")

_NORM_TYPES = (_BatchNorm, _InstanceNorm, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def _is_norm(module: nn.Module) -> bool:
    """Whether a module is a normalisation layer, by type.

    open_clip's norms, and most of timm's, are subclasses of torch's. Those of timm that are not
    (RmsNorm, EvoNorm, InplaceAbn, ...) are known by name and by where they are defined, so that
    timm stays optional.
    """
    if isinstance(module, _NORM_TYPES):
        return True
    return any(
        cls.__module__.startswith("timm.layers.")
        and ("norm" in cls.__name__.lower() or cls.__name__ == "InplaceAbn")
        for cls in type(module).__mro__
    )


def _visual_tower(model: nn.Module) -> nn.Module:
    tower = getattr(model, "visual", None)
    if not isinstance(tower, nn.Module):
        raise TypeError(
            f"model is a {type(model).__name__} without a visual tower (model.visual); give an "
            "open_clip model"
        )
    return tower


def affine_parameters(model: nn.Module, scope: str = "all") -> dict[str, nn.Parameter]:
    """The affine parameters of the visual tower's normalisation layers, in the model's order.

    Args:
        model: an open_clip model.
        scope: ``"all"`` takes the weight and bias of every normalisation layer, found by type.
            ``"authors"`` is the published rule: every visual parameter with ``bn`` or ``ln`` in
            its name. On RN50 the rule misses the BatchNorm of the four downsampling paths (45,568
            of 53,248 numbers); on ViT-B-16 both find 39,936; in timm's transformers, whose layers
            are called ``norm``, it finds none.

    Returns:
        Name (as in ``model.named_parameters()``) to parameter. A parameter shared by several
        layers occurs once.

    Raises:
        TypeError: the model has no visual tower.
        ValueError: unknown ``scope``, or no parameter found.

    Source: Liang et al., 2024, arXiv 2308.12919, section 3.4; the rule is in the authors' demo.py.
    """
    if scope not in SCOPES:
        raise ValueError(
            f"scope={scope!r} is unknown; choose one of {', '.join(map(repr, SCOPES))}"
        )
    tower = _visual_tower(model)
    if scope == "authors":
        found = {
            f"visual.{name}": parameter
            for name, parameter in tower.named_parameters()
            if "bn" in name or "ln" in name
        }
    else:
        of_norms = {
            id(parameter)
            for module in tower.modules()
            if _is_norm(module)
            for name, parameter in module.named_parameters(recurse=False)
            if name in ("weight", "bias")  # EvoNorm and FRN have parameters of their activation
        }
        found = {
            f"visual.{name}": parameter
            for name, parameter in tower.named_parameters()
            if id(parameter) in of_norms
        }
    if not found:
        way_out = (
            "use scope='all', which goes by type"
            if scope == "authors"
            else "train the prompt only, or choose a tower with BatchNorm or LayerNorm"
        )
        raise ValueError(
            f"scope={scope!r} finds no affine parameter of a normalisation layer in the visual "
            f"tower {type(tower).__name__}; {way_out}"
        )
    return found


def freeze_all_but_affine(model: nn.Module, scope: str = "all") -> dict[str, nn.Parameter]:
    """Set ``requires_grad`` so that only :func:`affine_parameters` are trained, and return them.

    Freezes the text tower and the logit scale as well. Changes nothing if it raises.

    Args:
        model: an open_clip model, changed in place.
        scope: as for :func:`affine_parameters`, which also lists the errors.

    Returns:
        Name to parameter, as :func:`affine_parameters`.
    """
    trained = affine_parameters(model, scope)
    model.requires_grad_(False)
    for parameter in trained.values():
        parameter.requires_grad_(True)
    return trained
