"""Known blocks, whose forward says which ReLU follows which batch norm: both become one call.

open_clip's ModifiedResNet, torchvision's residual blocks, and ``nn.Sequential``. Classes are known
by name, so nothing is imported: a model that has them has imported them.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ueo_fast.ops.frozen import is_traced
from ueo_fast.patch.convolution import can_join, join, widens
from ueo_fast.patch.norms import can_add, norm_relu, normalize
from ueo_fast.patch.patched import Patched, defines, replaced_method


class Chain(NamedTuple):
    """A batch norm and what is called together with it.

    Attributes:
        activation: after the norm, if any.
        adds: whether something is added between the norm and the activation.
        joined: the convolution before the norm, if it is part of the same call.
    """

    norm: nn.Module
    activation: nn.Module | None
    adds: bool = False
    joined: nn.Module | None = None


def _end(block: Any, norm: Any, relu: Any, x: Tensor, out: Tensor) -> Tensor:
    """``relu(norm(out) + shortcut(x))``."""
    identity = x if block.downsample is None else block.downsample(x)
    if can_add(norm, relu, out, identity):
        return normalize(norm, out, activation="relu", residual=identity)
    out = norm(out)
    out += identity
    return relu(out)


class PatchedClipBottleneck(Patched):
    """``open_clip.modified_resnet.Bottleneck``."""

    def forward(self, x: Tensor) -> Tensor:
        block: Any = self
        if is_traced(x):
            return super().forward(x)  # type: ignore[misc]
        out = norm_relu(block.bn1, block.act1, block.conv1(x))
        out = norm_relu(block.bn2, block.act2, block.conv2(out))
        out = block.conv3(block.avgpool(out))
        return _end(block, block.bn3, block.act3, x, out)


class PatchedClipStem(Patched):
    """The stem of ``open_clip.modified_resnet.ModifiedResNet``."""

    def stem(self, x: Tensor) -> Tensor:
        tower: Any = self
        if is_traced(x):
            return super().stem(x)  # type: ignore[misc]
        x = norm_relu(tower.bn1, tower.act1, tower.conv1(x))
        x = norm_relu(tower.bn2, tower.act2, tower.conv2(x))
        x = norm_relu(tower.bn3, tower.act3, tower.conv3(x))
        return tower.avgpool(x)


class PatchedBasicBlock(Patched):
    """``torchvision.models.resnet.BasicBlock``."""

    def forward(self, x: Tensor) -> Tensor:
        block: Any = self
        if is_traced(x):
            return super().forward(x)  # type: ignore[misc]
        out = norm_relu(block.bn1, block.relu, block.conv1(x))
        return _end(block, block.bn2, block.relu, x, block.conv2(out))


class PatchedBottleneck(Patched):
    """``torchvision.models.resnet.Bottleneck``."""

    def forward(self, x: Tensor) -> Tensor:
        block: Any = self
        if is_traced(x):
            return super().forward(x)  # type: ignore[misc]
        out = norm_relu(block.bn1, block.relu, block.conv1(x))
        out = norm_relu(block.bn2, block.relu, block.conv2(out))
        return _end(block, block.bn3, block.relu, x, block.conv3(out))


class PatchedSequential(Patched):
    """``nn.Sequential``; looks in every call for modules that can be called together."""

    def forward(self, input: Any) -> Any:
        sequence: Any = self
        if is_traced(input):
            return super().forward(input)  # type: ignore[misc]
        modules = list(sequence)
        while modules:
            module, *modules = modules
            following = modules[0] if modules else None
            if can_join(module, following, input):
                relu = modules[1] if len(modules) > 1 and type(modules[1]) is nn.ReLU else None
                input = join(module, following, input, relu)
                modules = modules[1:] if relu is None else modules[2:]
            elif isinstance(module, _BatchNorm) and type(following) is nn.ReLU:
                input = norm_relu(module, following, input)
                modules = modules[1:]
            else:
                input = module(input)
        return input


def _of_sequence(module: Any) -> list[Chain]:
    modules = list(module)
    joined = {norm: conv for conv, norm in pairwise(modules) if widens(conv, norm)}
    chains = [
        Chain(norm, relu, joined=joined.get(norm))
        for norm, relu in pairwise(modules)
        if isinstance(norm, _BatchNorm) and type(relu) is nn.ReLU
    ]
    before_relu = {chain.norm for chain in chains}
    return chains + [
        Chain(norm, None, joined=conv) for norm, conv in joined.items() if norm not in before_relu
    ]


def _of_children(children: str, chains: str) -> Callable[[Any], list[Chain]]:
    """The chains of a block with a fixed set of children.

    Args:
        children: the names of all of them, None or not. A block with others, from another version
            of its library, has no chains.
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


_BLOCKS: dict[tuple[str, str], tuple[type[Patched], Callable[[Any], list[Chain]]]] = {
    ("open_clip.modified_resnet.Bottleneck", "forward"): (
        PatchedClipBottleneck,
        _of_children(
            "conv1 bn1 act1 conv2 bn2 act2 avgpool conv3 bn3 act3 downsample",
            "bn1>act1 bn2>act2 bn3+>act3",
        ),
    ),
    ("open_clip.modified_resnet.ModifiedResNet", "stem"): (
        PatchedClipStem,
        _of_children(
            "conv1 bn1 act1 conv2 bn2 act2 conv3 bn3 act3 avgpool "
            "layer1 layer2 layer3 layer4 attnpool",
            "bn1>act1 bn2>act2 bn3>act3",
        ),
    ),
    ("torchvision.models.resnet.BasicBlock", "forward"): (
        PatchedBasicBlock,
        _of_children("conv1 bn1 relu conv2 bn2 downsample", "bn1>relu bn2+>relu"),
    ),
    ("torchvision.models.resnet.Bottleneck", "forward"): (
        PatchedBottleneck,
        _of_children(
            "conv1 bn1 conv2 bn2 conv3 bn3 relu downsample", "bn1>relu bn2>relu bn3+>relu"
        ),
    ),
    ("torch.nn.modules.container.Sequential", "forward"): (PatchedSequential, _of_sequence),
}
"""By the class that defines a method, and that method: the patch that replaces it, and what finds
a module's chains."""


def block_of(module: nn.Module) -> tuple[type[Patched], list[Chain]] | None:
    """The patch for a known block and the chains that it fuses; None if there is nothing to do."""
    if replaced_method(module):
        return None
    for (owner, method), (patch, chains_of) in _BLOCKS.items():
        if (
            method not in vars(module)
            and defines(type(module), method) == owner
            and (chains := chains_of(module))
        ):
            return patch, chains
    return None
