"""The backends that the tests of channel_affine, frozen_batch_norm and layer_norm run on.

Names, devices and what is spared are those of loss_backends; ``cuda_host`` is defined here for
these ops.
"""

from __future__ import annotations

import cuda_affine_host
from loss_backends import CUDA_HOST, backend_param

from ueo_fast.ops import channel_affine, layer_norm

for ops in (channel_affine.OPS, layer_norm.OPS):
    ops.define_in_python(CUDA_HOST.namespace, cuda_affine_host.kernels)

COMPILED = [backend_param(name) for name in ("cpp", "cuda", "triton", "cuda_host")]
"""Those with kernels for channel_affine."""

LAYER_NORM = [backend_param(name) for name in ("cuda", "triton", "cuda_host")]
"""Those with kernels for layer_norm; ``cpp`` runs PyTorch's own."""

REFERENCE = backend_param("reference")
BACKENDS = [*COMPILED, REFERENCE]
