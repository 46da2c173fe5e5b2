"""Universal Entropy Optimization for CLIP (Liang et al., ICML 2024), fast and exact."""

from ueo_fast.functional import UEOStats, mcm_score, ueo_loss, ueo_loss_and_grad
from ueo_fast.gradient_cache import GradCache
from ueo_fast.modules import UEOLoss
from ueo_fast.normalization import channel_affine, frozen_batch_norm, layer_norm
from ueo_fast.patch import affine_parameters, freeze_all_but_affine, patch_visual

__version__ = "0.1.0"
__all__ = [
    "GradCache",
    "UEOLoss",
    "UEOStats",
    "affine_parameters",
    "channel_affine",
    "freeze_all_but_affine",
    "frozen_batch_norm",
    "layer_norm",
    "mcm_score",
    "patch_visual",
    "ueo_loss",
    "ueo_loss_and_grad",
]
