"""The gradient of a whole batch's loss, with one micro-batch in memory."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def cached_features(
    encode: Callable[[Tensor], Tensor], images: Tensor, micro_batch_size: int
) -> Tensor:
    """Features of all images, micro-batch by micro-batch, as a leaf of the graph.

    A loss that couples the images of a batch (UEO's marginal does) is not a sum over micro-batches,
    so adding up their losses' gradients would minimise something else. Exact is: features of all
    without a graph, the loss of the whole batch with these as its leaves, and then
    :func:`backward_features`, which runs each micro-batch again and passes its share of the
    features' gradient on. By the chain rule that is the gradient of the whole batch, up to rounding
    and provided that ``encode`` treats each image by itself and the same way twice (no BatchNorm in
    training mode, no dropout). Activations of one micro-batch are held at a time (and all images
    and features); the price is one more forward pass.

    Args:
        encode: (b, 3, H, W) to (b, E).
        images: (B, 3, H, W).
        micro_batch_size: b, the most images at a time.

    Returns:
        (B, E) that requires a gradient.

    Source: Gao et al., *Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup*,
    2021, arXiv 2101.06983, section 3.2.
    """
    with torch.no_grad():
        features = torch.cat([encode(part) for part in images.split(micro_batch_size)])
    return features.detach().requires_grad_()


def backward_features(
    encode: Callable[[Tensor], Tensor], images: Tensor, gradient: Tensor, micro_batch_size: int
) -> None:
    """Add the gradient of ``encode``'s parameters to their ``.grad``.

    Args:
        encode: as it was called for :func:`cached_features`.
        images: (B, 3, H, W).
        gradient: (B, E), of the loss by the features; scaled, where the loss was.
        micro_batch_size: as before.
    """
    parts = zip(images.split(micro_batch_size), gradient.split(micro_batch_size), strict=True)
    for part, share in parts:
        encode(part).backward(share)
