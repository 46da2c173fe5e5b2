"""Which modules are norms, convolutions and pools, and what each of them can become.

By type and by the class that defines its forward, never by name: a subclass with a forward of its
own does something of its own.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn
from torch.nn.modules import pooling
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.modules.lazy import LazyModuleMixin

from ueo_fast.patch.batch_norm import PatchedBatchNorm, PatchedBatchNormAct
from ueo_fast.patch.blocks import Chain
from ueo_fast.patch.convolution import PatchedConvolution
from ueo_fast.patch.hooks import replaced_method
from ueo_fast.patch.layer_norm import RULES, PatchedLayerNorm
from ueo_fast.patch.open_clip import BLOCKS as BLOCKS_OF_OPEN_CLIP
from ueo_fast.patch.patched import Patched, defines, original_class
from ueo_fast.patch.pooling import PatchedAdaptiveAvgPool2d, PatchedAvgPool2d
from ueo_fast.patch.report import Kind
from ueo_fast.patch.sequential import BLOCKS as SEQUENCES
from ueo_fast.patch.torchvision import BLOCKS as BLOCKS_OF_TORCHVISION

_NORMS = (_BatchNorm, _InstanceNorm, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
_POOLS = (
    pooling._AvgPoolNd,
    pooling._MaxPoolNd,
    pooling._AdaptiveAvgPoolNd,
    pooling._AdaptiveMaxPoolNd,
    pooling._LPPoolNd,
    nn.FractionalMaxPool2d,
    nn.FractionalMaxPool3d,
)
_MAX_POOLS = (
    pooling._MaxPoolNd,
    pooling._AdaptiveMaxPoolNd,
    nn.FractionalMaxPool2d,
    nn.FractionalMaxPool3d,
)
_BLOCKS = {**BLOCKS_OF_OPEN_CLIP, **BLOCKS_OF_TORCHVISION, **SEQUENCES}

_BATCH_NORMS = ("torch.nn.modules.batchnorm._BatchNorm", "torch.nn.modules.batchnorm.SyncBatchNorm")
_BATCH_NORM_ACT = "timm.layers.norm_act.BatchNormAct2d"
_AVG_POOLS: dict[str, type[Patched]] = {
    "torch.nn.modules.pooling.AvgPool2d": PatchedAvgPool2d,
    "torch.nn.modules.pooling.AdaptiveAvgPool2d": PatchedAdaptiveAvgPool2d,
}


class Decision(NamedTuple):
    """What a site becomes (None: it stays), and what that does or why it stays."""

    patch: type[Patched] | None
    reason: str


def _is_of(cls: type, library: str, *words: str) -> bool:
    """Whether a class comes from ``library`` and has one of ``words`` in its name."""
    return any(
        base.__module__.startswith(library) and any(word in base.__name__ for word in words)
        for base in cls.__mro__
    )


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a normalisation layer.

    open_clip's norms, and most of timm's, are subclasses of torch's. Those that are not (RmsNorm,
    EvoNorm, InplaceAbn, FrozenBatchNorm2d, ...) are known by name and by where they are defined, so
    that timm and torchvision stay optional.
    """
    if isinstance(module, _NORMS):
        return True
    if not (module._parameters or module._buffers):
        return False  # made of others that are sites themselves: ConvNormAct, NormMlpClassifierHead
    return _is_of(type(module), "timm.layers.", "Norm", "InplaceAbn") or _is_of(
        type(module), "torchvision.ops.misc", "FrozenBatchNorm"
    )


def kind_of(module: nn.Module) -> Kind | None:
    """Whether a module is a site, and of which kind."""
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
    """What becomes of a site."""
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
    if owner in RULES:
        if len(module.normalized_shape) != 1:
            return Decision(None, "it normalises over several dimensions")
        if getattr(module, "_fast_norm", False):
            return Decision(None, "timm's fast norm is in use")
        return Decision(
            PatchedLayerNorm, "fused on a GPU; on the CPU PyTorch's own, which is at the limit"
        )
    if "FrozenBatchNorm" in original_class(module).__name__:
        return Decision(None, "its weight and bias are buffers, nothing to train")
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
    return Decision(PatchedConvolution, "holds no input while its weight is frozen")


def _pool(module: nn.Module) -> Decision:
    patch = _AVG_POOLS.get(defines(original_class(module), "forward"))
    if patch is not None:
        return Decision(patch, "holds no input")
    if isinstance(module, _MAX_POOLS):
        return Decision(None, "max pooling's gradient needs to know where the maxima were")
    if type(module).__module__ == "torch.nn.modules.pooling":
        return Decision(None, f"no replacement for {type(module).__name__}, only 2-d averages")
    return _own_forward(module)


def block_of(module: nn.Module) -> tuple[type[Patched], list[Chain]] | None:
    """What a block can become whose forward says which ReLU follows which batch norm."""
    if replaced_method(module):
        return None
    for (owner, method), block in _BLOCKS.items():
        if (
            method not in vars(module)
            and defines(type(module), method) == owner
            and (chains := block.chains(module))
        ):
            return block.patch, chains
    return None
