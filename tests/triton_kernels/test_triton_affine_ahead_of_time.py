"""The affine Triton kernels compiled for GPUs that are not here: tests/triton_compilation.py."""

from __future__ import annotations

import itertools

import pytest
import torch
import triton_compilation as compilation
from triton_compilation import AMD, DTYPES, NVIDIA

pytest.importorskip("triton")

# What each is there for. Channel affine: shape, dim; layer norm: (rows, columns).
SHAPES = {
    "planes": ((64, 256, 28, 28), 1),
    "odd planes": ((16, 2048, 7, 7), 1),  # a byte of the mask spans two channels
    "quarter planes": ((16, 1024, 14, 14), 1),  # 14 x 14 is divisible by 4
    "tokens": ((64, 197, 768), 2),
    "few channels": ((64, 3, 224, 224), 1),
    "short": (4096, 7),
    "vit": (12608, 768),
    "longest held": (512, 2048),  # in float64
    "longest held float": (512, 8192),
    "tiled": (512, 21841),
}

DEFAULT_CASES = [
    ("sm_90", "bfloat16", "odd planes"),
    ("sm_80", "float32", "tokens"),
    ("sm_90", "float32", "vit"),
    ("sm_120", "float32", "longest held float"),
    ("sm_100", "float64", "tiled"),
    ("gfx942", "float16", "planes"),
    ("gfx942", "float32", "vit"),
]
ALL_CASES = [
    (arch, dtype, shape) for arch in (*NVIDIA, AMD) for dtype in DTYPES for shape in SHAPES
]


def call_channel_affine(launchers, shape, dim, dtype, compute, count):
    x = torch.empty(shape, dtype=dtype)
    values = torch.empty(shape[dim], dtype=compute)
    batch_norm, linear = (values, values, values, values, 1e-5), (values, values, None, None, 0.0)
    stored = (*(value.to(dtype) for value in batch_norm[:4]), 1e-5)
    options = [(batch_norm, False, True, True, True), (batch_norm, True, True, True, True)]
    options += [(linear, False, False, True, True)]
    flags = [False, True]
    options += itertools.product((batch_norm, linear), flags, flags, [False], [True])
    options += itertools.product((batch_norm, linear, stored), flags, flags, [True], flags)
    for parameters, residual, relu, needs_x, needs_sums in options[:count]:
        added = x if residual else None
        _, bits = launchers.KERNELS["channel_affine_forward"](x, *parameters, added, dim, relu)
        needs = needs_x, needs_sums, needs_sums, residual
        launchers.KERNELS["channel_affine_backward"](x, x, *parameters, bits, dim, relu, *needs)


def call_layer_norm(launchers, shape, dtype, compute, count):
    x = torch.empty(shape, dtype=dtype)
    values = torch.empty(shape[1], dtype=compute)
    options = [(values, values, True, True)]
    options += [(None, None, True, False), (values, values, False, True)]
    options += [(values, None, True, False), (None, None, True, True)]
    for weight, bias, *needs in options[:count]:
        _, *saved = launchers.KERNELS["layer_norm_forward"](x, weight, bias, 1e-5)
        launchers.KERNELS["layer_norm_backward"](x, x, *saved, weight, *needs)


KERNELS = {
    "channel_affine_kernels.forward_kernel",
    "channel_affine_kernels.backward_kernel",
    "channel_affine_kernels.finish_sums_kernel",
    "layer_norm_kernels.forward_kernel",
    "layer_norm_kernels.backward_kernel",
    "layer_norm_kernels.forward_tiled_kernel",
    "layer_norm_kernels.backward_tiled_kernel",
}

DOUBLE = {
    "channel_affine_kernels.finish_sums_kernel": {"arith.extf", "arith.addf", "arith.truncf"},
}
"""Arithmetic in float64 that is meant where everything else is float32."""


def launches(dtype, shape, count):
    """(kernel, arguments, keywords) of all ops of a shape."""
    from ueo_fast.triton import channel_affine, layer_norm

    found = compilation.record_launches(channel_affine, layer_norm)
    element = getattr(torch, dtype)
    compute = torch.float64 if dtype == "float64" else torch.float32
    size = SHAPES[shape]
    if isinstance(size[0], tuple):
        call_channel_affine(channel_affine, *size, element, compute, count)
    else:
        call_layer_norm(layer_norm, size, element, compute, count)
    return found


NEEDED = {"forward_kernel", "backward_kernel", "finish_sums_kernel"}
"""By every case, tiled or not."""


def test_representative_kernels_compile_within_their_budgets(tmp_path):
    compilation.check_cases(__file__, DEFAULT_CASES, NEEDED, tmp_path, count=2)


@pytest.mark.slow
@pytest.mark.parametrize("case", ALL_CASES, ids="-".join)
def test_every_kernel_compiles_within_its_budget(case, tmp_path):
    compilation.check_cases(__file__, [case], NEEDED, tmp_path, count=None)


def test_no_literal_changes_the_precision(tmp_path):
    # In bfloat16 only loads and stores are others: a shape of each kind of kernel will do.
    cases = [("float32", list(SHAPES)), ("bfloat16", ["planes", "vit", "tiled"])]
    for variants in compilation.run(__file__, "precision", *cases, folder=tmp_path):
        compilation.check_precision(variants, DOUBLE, KERNELS)


if __name__ == "__main__":
    compilation.main(launches)
