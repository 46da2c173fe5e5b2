"""Universal Entropy Optimization for CLIP (Liang et al., ICML 2024), fast and exact."""

from ueo_fast.functional import UEOStats, mcm_score, ueo_loss, ueo_loss_and_grad
from ueo_fast.modules import UEOLoss

__version__ = "0.1.0"
__all__ = ["UEOLoss", "UEOStats", "mcm_score", "ueo_loss", "ueo_loss_and_grad"]
