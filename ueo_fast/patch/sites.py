"""Find a model's visual tower and its sites (norms, convolutions, pools); decide what they become.

Sites are known by type and by the class that defines their forward, never by name: a subclass with
a forward of its own computes something of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from torch import nn
from torch.nn.modules import pooling
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.modules.lazy import LazyModuleMixin

from ueo_fast.patch.convolution import (
    PatchedAdaptiveAvgPool2d,
    PatchedAvgPool2d,
    PatchedConvolution,
)
from ueo_fast.patch.norms import (
    LAYER_NORMS,
    PatchedBatchNorm,
    PatchedBatchNormAct,
    PatchedLayerNorm,
)
from ueo_fast.patch.patched import Patched, defines, original_class, replaced_method

Kind = Literal["norm", "conv", "pool"]
KINDS: tuple[Kind, ...] = ("norm", "conv", "pool")

_VISUAL = frozenset(
    {"visual", "vision_model", "vision_tower", "vision_encoder", "visual_encoder", "visual_model"}
    | {"image_encoder", "image_model"}
)
"""What open_clip, HuggingFace's transformers and others call the tower."""

_NORMS = (_BatchNorm, _InstanceNorm, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
_MAX_POOLS = (
    pooling._MaxPoolNd,
    pooling._AdaptiveMaxPoolNd,
    nn.FractionalMaxPool2d,
    nn.FractionalMaxPool3d,
)
_POOLS = (*_MAX_POOLS, pooling._AvgPoolNd, pooling._AdaptiveAvgPoolNd, pooling._LPPoolNd)

_BATCH_NORMS = ("torch.nn.modules.batchnorm._BatchNorm", "torch.nn.modules.batchnorm.SyncBatchNorm")
_BATCH_NORM_ACT = "timm.layers.norm_act.BatchNormAct2d"
_AVG_POOLS: dict[str, type[Patched]] = {
    "torch.nn.modules.pooling.AvgPool2d": PatchedAvgPool2d,
    "torch.nn.modules.pooling.AdaptiveAvgPool2d": PatchedAdaptiveAvgPool2d,
}


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


class Decision(NamedTuple):
    """What a site becomes (None: it stays), and what that does or why it stays."""

    patch: type[Patched] | None
    reason: str


def visual_towers(model: nn.Module) -> dict[str, nn.Module]:
    """The modules with a visual tower's name, by path, outermost only.

    ``model.visual`` alone, if there is one. Otherwise wrappers are searched as well: ``module``
    (DataParallel), ``_orig_mod`` (torch.compile), or whatever attribute holds the model.
    """
    found: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        outer, _, name = path.rpartition(".")
        if name in _VISUAL and not any(f"{outer}.".startswith(f"{one}.") for one in found):
            found[path] = module
    return {"visual": found["visual"]} if "visual" in found else found


def visual_tower(model: nn.Module) -> tuple[nn.Module, str]:
    """The tower and the prefix of its names; the model itself if it has no tower, or several."""
    found = visual_towers(model)
    if len(found) != 1:
        return model, ""
    ((path, tower),) = found.items()
    return tower, f"{path}."


def _is_of(cls: type, library: str, *words: str) -> bool:
    """Whether a class comes from ``library`` and has one of ``words`` in its name."""
    return any(
        base.__module__.startswith(library) and any(word in base.__name__ for word in words)
        for base in cls.__mro__
    )


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a normalisation layer.

    open_clip's norms, and most of timm's, are subclasses of torch's. The others (RmsNorm, EvoNorm,
    InplaceAbn, FrozenBatchNorm2d, ...) are known by their name and where they are defined, so that
    timm and torchvision stay optional.
    """
    if isinstance(module, _NORMS):
        return True
    if not (module._parameters or module._buffers):
        return (
            False  # made of modules that are sites themselves: ConvNormAct, NormMlpClassifierHead
        )
    return _is_of(type(module), "timm.layers.", "Norm", "InplaceAbn") or _is_of(
        type(module), "torchvision.ops.misc", "FrozenBatchNorm"
    )


def kind_of(module: nn.Module) -> Kind | None:
    """The kind of site that a module is; None if it is not a site."""
    if is_norm(module):
        return "norm"
    if isinstance(module, _ConvNd):
        return "conv"
    if isinstance(module, _POOLS) or (
        _is_of(type(module), "timm.layers.", "AvgPool2dSame", "MaxPool2dSame", "BlurPool")
    ):
        return "pool"
    return None


def decide(module: nn.Module) -> Decision:
    """Decide what a site becomes."""
    if replaced := replaced_method(module):
        return Decision(None, f"its {replaced} was replaced on this instance")
    cls = original_class(module)
    for method in ("__call__", "_call_impl", "_wrapped_call_impl"):
        if defines(cls, method) != "torch.nn.modules.module.Module":
            return Decision(None, f"{cls.__name__} has a {method} of its own")
    if isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():
        return Decision(None, "it is not initialised: run the model once, then patch")
    kind = kind_of(module)
    if kind == "norm":
        return _norm(module)
    return _convolution(module) if kind == "conv" else _pool(module)


def _own_forward(module: nn.Module) -> Decision:
    return Decision(None, f"{original_class(module).__name__} has a forward of its own")


def _norm(module: Any) -> Decision:
    owner = defines(original_class(module), "forward")
    if owner in _BATCH_NORMS:
        return Decision(PatchedBatchNorm, "fused, no ReLU known to follow")
    if owner == _BATCH_NORM_ACT:
        return Decision(PatchedBatchNormAct, _with_activation(module))
    if owner in LAYER_NORMS:
        if len(module.normalized_shape) != 1:
            return Decision(None, "it normalises over several dimensions")
        if getattr(module, "_fast_norm", False):
            return Decision(None, "timm's fast norm is in use")
        return Decision(
            PatchedLayerNorm, "fused on a GPU; PyTorch's own on the CPU, which is near the limit"
        )
    if "FrozenBatchNorm" in original_class(module).__name__:
        return Decision(None, "its weight and bias are buffers, so there is nothing to train")
    if isinstance(module, nn.GroupNorm | nn.RMSNorm | _InstanceNorm):
        return Decision(None, f"no fused kernel for {type(module).__name__}")
    return _own_forward(module)


def _with_activation(module: Any) -> str:
    if type(module.drop) is not nn.Identity:
        return f"fused, not with its {type(module.drop).__name__} and activation"
    if type(module.act) is nn.ReLU:
        return "fused with its ReLU"
    if type(module.act) is nn.Identity:
        return "fused, it has no activation"
    return f"fused, not with its {type(module.act).__name__}"


def _convolution(module: nn.Module) -> Decision:
    if isinstance(module, _ConvTransposeNd):
        return Decision(None, "transposed convolutions are left alone")
    cls = original_class(module)
    of_torch = tuple(f"torch.nn.modules.conv.Conv{dimensions}d" for dimensions in (1, 2, 3))
    owner = defines(cls, "forward")
    if owner not in of_torch or defines(cls, "_conv_forward") != owner:
        return _own_forward(module)
    return Decision(PatchedConvolution, "saves no input while its weight is frozen")


def _pool(module: nn.Module) -> Decision:
    patch = _AVG_POOLS.get(defines(original_class(module), "forward"))
    if patch is not None:
        return Decision(patch, "saves no input")
    if isinstance(module, _MAX_POOLS):
        return Decision(None, "max pooling's gradient needs to know where the maxima were")
    if type(module).__module__ == "torch.nn.modules.pooling":
        return Decision(None, f"no replacement for {type(module).__name__}, only for 2-d averages")
    return _own_forward(module)
