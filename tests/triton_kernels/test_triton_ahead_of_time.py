"""The loss's Triton kernels compiled for GPUs that are not here: tests/triton_compilation.py."""

from __future__ import annotations

import collections
import re

import pytest
import torch
import triton_compilation as compilation
from triton_compilation import AMD, DTYPES, NVIDIA

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

# What each (B, C) is there for.
SHAPES = {
    "short": (4096, 7),  # many rows per tile, many chunks
    "batch": (64, 345),  # DomainNet's batch: few chunks
    "aligned": (4096, 1024),  # rows begin at 16 bytes
    "longest held": (512, 4000),  # the longest row in registers in float64
    "longest held float": (512, 8192),
    "tiled": (4096, 21841),
    "tiled vectors": (4096, 16384),  # rows begin at 16 bytes
}

DEFAULT_CASES = [
    ("sm_90", "float32", "batch"),
    ("sm_90", "bfloat16", "longest held float"),
    ("sm_80", "float16", "tiled"),
    ("sm_100", "float64", "short"),
    ("gfx942", "float32", "aligned"),
]
ALL_CASES = [
    (arch, dtype, shape) for arch in (*NVIDIA, AMD) for dtype in DTYPES for shape in SHAPES
]


KERNELS = {
    "ueo_loss_kernels.forward_kernel",
    "ueo_loss_kernels.backward_kernel",
    "ueo_loss_kernels.finish_kernel",
    "ueo_loss_kernels.max_softmax_kernel",
    "ueo_loss_tiled_kernels.forward_tiled_kernel",
    "ueo_loss_tiled_kernels.backward_tiled_kernel",
    "ueo_loss_tiled_kernels.max_softmax_tiled_kernel",
}

SUMS = {"arith.extf", "arith.mulf", "arith.addf", "arith.truncf"}
DOUBLE = {
    "ueo_loss_kernels.forward_kernel": SUMS,
    "ueo_loss_tiled_kernels.forward_tiled_kernel": SUMS,
    "ueo_loss_kernels.finish_kernel": SUMS | {"arith.sitofp", "arith.subf", "arith.divf"},
}
"""Arithmetic in float64 that is meant where everything else is float32."""


@triton.jit
def planted_kernel(x, out):
    index = tl.arange(0, 16)
    smallest = tl.full((), 1.17549435e-38, tl.float64)  # as Triton 3.6 reads the bare number
    tl.store(out + index, 2.0 / tl.maximum(tl.load(x + index), smallest))


def launches(dtype, shape, count):
    """(kernel, arguments, keywords) of all ops, forward and backward with some of the options."""
    from ueo_fast.triton import ueo_loss as launchers

    found = compilation.record_launches(launchers)
    if shape == "planted":
        planted_kernel[(1,)](torch.empty(16), torch.empty(16), num_warps=4)
        return found
    logits = torch.empty(SHAPES[shape], dtype=getattr(torch, dtype))
    compute = torch.float64 if dtype == "float64" else torch.float32
    weights = torch.empty(logits.shape[0], dtype=compute)
    options = [(None, None, 1.0, 0.0), (weights, None, 1.0, 1e-5)]
    options += [(None, None, 0.01, 1e-5), (weights, weights, 1.0, 0.0)]
    options += [(weights, None, 1.0, 0.0), (None, weights, 0.01, 0.0), (None, None, 0.01, 0.0)]
    for confidence, marginal_weights, scale, eps in options[:count]:
        forward = logits, confidence, marginal_weights, 0.5, scale, eps
        loss, *saved = launchers.KERNELS["ueo_loss_forward"](*forward)
        launchers.KERNELS["ueo_loss_backward"](loss, logits, *saved, 0.5, eps)
    launchers.KERNELS["ueo_loss_and_grad"](logits, None, None, 0.5, 1.0, 0.0)
    launchers.KERNELS["max_softmax"](logits, 0.5)
    return found


NEEDED = {"forward_kernel", "backward_kernel", "max_softmax_kernel", "finish_kernel"}
"""By every case, tiled or not."""


def test_representative_kernels_compile_within_their_budgets(tmp_path):
    compilation.check_cases(__file__, DEFAULT_CASES, NEEDED, tmp_path, count=2)


@pytest.mark.slow
@pytest.mark.parametrize("case", ALL_CASES, ids="-".join)
def test_every_kernel_compiles_within_its_budget(case, tmp_path):
    compilation.check_cases(__file__, [case], NEEDED, tmp_path, count=None)


def test_no_literal_changes_the_precision(tmp_path):
    # In bfloat16 only loads and stores are others: a shape of each kind of kernel will do.
    cases = [("float32", list(SHAPES)), ("bfloat16", ["batch", "tiled"])]
    for variants in compilation.run(__file__, "precision", *cases, folder=tmp_path):
        compilation.check_precision(variants, DOUBLE, KERNELS)


def test_a_literal_that_changes_the_precision_is_seen(tmp_path):
    case = "float32", ["planted"]
    ((variant,),) = compilation.run(__file__, "precision", case, folder=tmp_path)
    # Of the literal, the maximum, and the quotient.
    assert {"arith.constant", "arith.divf"} <= set(variant["double"])


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float32", marks=pytest.mark.slow)])
def test_tile_loops_are_short_and_have_no_barriers(dtype, tmp_path):
    case = "sm_90", dtype, "tiled", 1
    (variants,) = compilation.run(__file__, "loops", case, folder=tmp_path)
    check_loops(variants)


def check_loops(variants):
    from ueo_fast.triton.tuning import BUDGETS

    seen = set()
    for variant in variants:
        budget = BUDGETS[variant["kernel"]].loop_instructions
        if budget is None:
            continue
        seen.add(variant["kernel"])
        instructions = 0
        for loop in variant["loops"]:
            names = collections.Counter(re.sub(r"^@\S+ ", "", line).split(".")[0] for line in loop)
            if names["MUFU"] < 8:  # exponentials; the other loops look for the largest weight
                continue
            assert not names["BAR"] + names["SHFL"] + names["LDL"] + names["STL"], variant["kernel"]
            instructions += len(loop)
        assert 0 < instructions <= budget, (variant["kernel"], instructions)
    assert seen == {kernel for kernel in KERNELS if "tiled" in kernel}


if __name__ == "__main__":
    compilation.main(launches)
