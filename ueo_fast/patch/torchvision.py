"""torchvision's residual blocks, batch norms fused with what follows; known by name."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ueo_fast.ops.frozen import is_traced
from ueo_fast.patch.batch_norm import can_add, norm_relu, normalize
from ueo_fast.patch.blocks import Block, of_children
from ueo_fast.patch.patched import Patched


def _end(block: Any, norm: Any, x: Tensor, out: Tensor) -> Tensor:
    """``relu(norm(out) + shortcut(x))``."""
    identity = x if block.downsample is None else block.downsample(x)
    if can_add(norm, block.relu, out, identity):
        return normalize(norm, out, activation="relu", residual=identity)
    out = norm(out)
    out += identity
    return block.relu(out)


class PatchedBasicBlock(Patched):
    """``torchvision.models.resnet.BasicBlock``."""

    def forward(self, x: Tensor) -> Tensor:
        block: Any = self
        if is_traced(x):
            return super().forward(x)  # type: ignore[misc]
        out = norm_relu(block.bn1, block.relu, block.conv1(x))
        return _end(block, block.bn2, x, block.conv2(out))


class PatchedBottleneck(Patched):
    """``torchvision.models.resnet.Bottleneck``."""

    def forward(self, x: Tensor) -> Tensor:
        block: Any = self
        if is_traced(x):
            return super().forward(x)  # type: ignore[misc]
        out = norm_relu(block.bn1, block.relu, block.conv1(x))
        out = norm_relu(block.bn2, block.relu, block.conv2(out))
        return _end(block, block.bn3, x, block.conv3(out))


BLOCKS = {
    ("torchvision.models.resnet.BasicBlock", "forward"): Block(
        PatchedBasicBlock,
        of_children("conv1 bn1 relu conv2 bn2 downsample", "bn1>relu bn2+>relu"),
    ),
    ("torchvision.models.resnet.Bottleneck", "forward"): Block(
        PatchedBottleneck,
        of_children("conv1 bn1 conv2 bn2 conv3 bn3 relu downsample", "bn1>relu bn2>relu bn3+>relu"),
    ),
}
