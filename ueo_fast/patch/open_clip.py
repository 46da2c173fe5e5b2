"""open_clip's ModifiedResNet: its stem and its bottleneck, batch norms fused with what follows.

Classes are known by name, so nothing is imported: a model that has them has imported them.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ueo_fast.ops.frozen import is_traced
from ueo_fast.patch.batch_norm import can_add, norm_relu, normalize
from ueo_fast.patch.blocks import Block, of_children
from ueo_fast.patch.patched import Patched


class PatchedBottleneck(Patched):
    """``open_clip.modified_resnet.Bottleneck``."""

    def forward(self, x: Tensor) -> Tensor:
        block: Any = self
        if is_traced(x):
            return super().forward(x)  # type: ignore[misc]
        out = norm_relu(block.bn1, block.act1, block.conv1(x))
        out = norm_relu(block.bn2, block.act2, block.conv2(out))
        out = block.conv3(block.avgpool(out))
        identity = x if block.downsample is None else block.downsample(x)
        if can_add(block.bn3, block.act3, out, identity):
            return normalize(block.bn3, out, activation="relu", residual=identity)
        out = block.bn3(out)
        out += identity
        return block.act3(out)


class PatchedStem(Patched):
    """The stem of ``open_clip.modified_resnet.ModifiedResNet``."""

    def stem(self, x: Tensor) -> Tensor:
        tower: Any = self
        if is_traced(x):
            return super().stem(x)  # type: ignore[misc]
        x = norm_relu(tower.bn1, tower.act1, tower.conv1(x))
        x = norm_relu(tower.bn2, tower.act2, tower.conv2(x))
        x = norm_relu(tower.bn3, tower.act3, tower.conv3(x))
        return tower.avgpool(x)


BLOCKS = {
    ("open_clip.modified_resnet.Bottleneck", "forward"): Block(
        PatchedBottleneck,
        of_children(
            "conv1 bn1 act1 conv2 bn2 act2 avgpool conv3 bn3 act3 downsample",
            "bn1>act1 bn2>act2 bn3+>act3",
        ),
    ),
    ("open_clip.modified_resnet.ModifiedResNet", "stem"): Block(
        PatchedStem,
        of_children(
            "conv1 bn1 act1 conv2 bn2 act2 conv3 bn3 act3 avgpool "
            "layer1 layer2 layer3 layer4 attnpool",
            "bn1>act1 bn2>act2 bn3>act3",
        ),
    ),
}
"""By the class that defines a method, and the method that is replaced."""
