"""The equations in plain PyTorch: slow, differentiable twice, and the truth of every test."""

from ueo_fast.reference.affine import channel_affine, frozen_batch_norm, layer_norm
from ueo_fast.reference.ueo_loss import compute_dtype, max_softmax, ueo_loss, ueo_terms

__all__ = [
    "channel_affine",
    "compute_dtype",
    "frozen_batch_norm",
    "layer_norm",
    "max_softmax",
    "ueo_loss",
    "ueo_terms",
]
