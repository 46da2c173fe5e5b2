"""``nn.Sequential`` with a batch norm after a 1 x 1 convolution, or before a ReLU."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ueo_fast.ops.frozen import is_traced
from ueo_fast.patch.batch_norm import norm_relu
from ueo_fast.patch.blocks import Block, Chain
from ueo_fast.patch.convolution_norm import can_join, join, widens
from ueo_fast.patch.patched import Patched


class PatchedSequential(Patched):
    """Calls together what belongs together; what its modules are is seen in every call."""

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


def _chains(module: Any) -> list[Chain]:
    modules = list(module)
    joined = {norm: conv for conv, norm in pairwise(modules) if widens(conv, norm)}
    chains = [
        Chain(norm, relu, adds=False, joined=joined.get(norm))
        for norm, relu in pairwise(modules)
        if isinstance(norm, _BatchNorm) and type(relu) is nn.ReLU
    ]
    before_relu = {chain.norm for chain in chains}
    return chains + [
        Chain(norm, None, adds=False, joined=conv)
        for norm, conv in joined.items()
        if norm not in before_relu
    ]


BLOCKS = {("torch.nn.modules.container.Sequential", "forward"): Block(PatchedSequential, _chains)}
