"""The equations in plain PyTorch: slow, differentiable twice, and the truth of every test."""

from ueo_fast.reference.ueo_loss import compute_dtype, max_softmax, ueo_loss, ueo_terms

__all__ = ["compute_dtype", "max_softmax", "ueo_loss", "ueo_terms"]
