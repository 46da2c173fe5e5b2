"""Small calls of the affine layers' CUDA kernels for compute-sanitizer; see sanitize_set.py.

The autograd functions are called directly: they take channels in any dimension besides statistics.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ueo_fast import reference
from ueo_fast.ops.channel_affine import ChannelAffineFunction
from ueo_fast.ops.layer_norm import LayerNormFunction

EPS = 1e-3


@dataclass(frozen=True)
class AffineSample:
    reason: str
    shape: tuple[int, ...]
    dim: int = 1
    dtype: torch.dtype = torch.float32
    relu: bool = False
    residual: bool = False
    channels_last: bool = False


AFFINE = (
    AffineSample("planes of 7 x 7, ReLU", (3, 70, 7, 7), relu=True),
    AffineSample("planes, addition and ReLU", (2, 40, 14, 14), relu=True, residual=True),
    AffineSample("odd planes, bfloat16", (2, 5, 3, 3), dtype=torch.bfloat16, residual=True),
    AffineSample("channels_last, ReLU", (2, 66, 5, 5), relu=True, channels_last=True),
    AffineSample(
        "channels_last, float16", (2, 33, 5, 5), 1, torch.float16, True, True, channels_last=True
    ),
    AffineSample("channels in the last dimension", (5, 19, 70), dim=2),
    AffineSample("one channel, float64", (70, 1), dtype=torch.float64, relu=True),
    AffineSample("more rows than blocks", (3000, 3), relu=True),
)
NORMS = (
    AffineSample("layer norm", (37, 768)),
    AffineSample("layer norm, odd columns, bfloat16", (9, 345), dtype=torch.bfloat16),
    AffineSample("layer norm, one column, float64", (5, 1), dtype=torch.float64),
    AffineSample("layer norm, more rows than blocks", (3000, 33), dtype=torch.float16),
)


def _affine(sample: AffineSample, device: str, backend: str) -> list[Tensor]:
    """The result and every gradient; all inputs are made on the host and copied as they are."""
    generator = torch.Generator().manual_seed(0)
    channels = sample.shape[sample.dim]
    compute = reference.compute_dtype(sample.dtype)

    def values() -> Tensor:
        return torch.randn(channels, generator=generator).to(compute).to(device)

    def like_x() -> Tensor:
        values = torch.randn(sample.shape, generator=generator).to(sample.dtype)
        if sample.channels_last:
            values = values.contiguous(memory_format=torch.channels_last)
        return values.to(device)

    x, weight, bias, mean = like_x(), values(), values(), values()
    var = (torch.rand(channels, generator=generator) + 0.1).to(compute).to(device)
    residual = like_x() if sample.residual else None
    leaves = [t.requires_grad_() for t in (x, weight, bias, residual) if t is not None]
    if backend == "reference":
        scale = weight / (var + EPS).sqrt()
        y = reference.channel_affine(
            x, scale, bias - mean * scale, sample.dim,
            activation="relu" if sample.relu else "none", residual=residual,
        )  # fmt: skip
    else:
        y = ChannelAffineFunction.apply(
            backend, x, weight, bias, mean, var, EPS, residual, sample.dim, sample.relu
        )
    return [y, *torch.autograd.grad(y, leaves, like_x())]


def _norm(sample: AffineSample, device: str, backend: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    compute = reference.compute_dtype(sample.dtype)
    x, grad = (
        torch.randn(sample.shape, generator=generator).to(sample.dtype).to(device) for _ in range(2)
    )
    weight, bias = (
        torch.randn(sample.shape[1], generator=generator).to(compute).to(device) for _ in range(2)
    )
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    if backend in ("reference", "cpp"):  # a CPU's is torch's own
        y = reference.layer_norm(x, weight, bias, 1e-5)
    else:
        y = LayerNormFunction.apply(backend, x, weight, bias, 1e-5)
    return [y, *torch.autograd.grad(y, leaves, grad)]


SAMPLES = (*AFFINE, *NORMS)


def check(sample: AffineSample, backend: str, device: str) -> None:
    """A sample on the device, compared with the reference on the CPU."""
    results = _norm if sample in NORMS else _affine
    found, expected = results(sample, device, backend), results(sample, "cpu", "reference")
    tolerance = 2e-2 if sample.dtype.itemsize == 2 else 1e-4
    for index, (ours, true) in enumerate(zip(found, expected, strict=True)):
        error = (ours.detach().cpu().double() - true.double()).norm()
        limit = tolerance * (true.double().norm() + 1)
        assert error <= limit, f"result {index}: off by {float(error):.3g}"
