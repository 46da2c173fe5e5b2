"""Patch a torchvision network, so that training only its norms takes less memory.

    python examples/patch_torchvision.py resnet50 DEFAULT

The same lines work for any other network made of PyTorch's layers.
"""

import sys

import torch
import torchvision

from ueo_fast import freeze_all_but_affine, patch_visual, ueo_loss

name, *weights = sys.argv[1:]
network = torchvision.models.get_model(name, weights=weights[0] if weights else None)
network.eval()  # batch norms keep their running statistics
trained = freeze_all_but_affine(network)
optimizer = torch.optim.SGD(trained.values(), lr=1e-3)
images = torch.randn(8, 3, 224, 224)  # yours, preprocessed


def step() -> tuple[float, float]:
    """Train on the batch; return the loss and the MiB that forward keeps for backward."""
    kept = {}

    def keep(tensor):
        if not isinstance(tensor, torch.nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = ueo_loss(network(images))
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item(), sum(kept.values()) / 2**20


print(trained.summary())
print("unpatched: loss {:.4f}, {:.0f} MiB kept".format(*step()))
with patch_visual(network) as handle:  # this instance only; leaving the block undoes it
    print(handle.report)
    print("patched: loss {:.4f}, {:.0f} MiB kept".format(*step()))
