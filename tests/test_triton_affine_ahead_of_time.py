"""The affine Triton kernels compiled for GPUs that are not here, as the loss's are.

See tests/test_triton_ahead_of_time.py: launches are recorded in another process and compiled.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")

from test_triton_ahead_of_time import AMD, DTYPES, NVIDIA, PROCESSORS, resources_of, source_of

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


def call_channel_affine(launchers, shape, dim, dtype, compute, every_option):
    x = torch.empty(shape, dtype=dtype)
    values = torch.empty(shape[dim], dtype=compute)
    batch_norm, linear = (values, values, values, values, 1e-5), (values, values, None, None, 0.0)
    options = [
        (batch_norm, False, True, True, True),
        (batch_norm, True, True, True, True),
        (linear, False, False, True, True),
    ]
    if every_option:
        stored = (*(value.to(dtype) for value in batch_norm[:4]), 1e-5)
        flags = [False, True]
        options += itertools.product((batch_norm, linear), flags, flags, [False], [True])
        options += itertools.product((batch_norm, linear, stored), flags, flags, [True], flags)
    for parameters, residual, relu, needs_x, needs_sums in options:
        added = x if residual else None
        _, bits = launchers.KERNELS["channel_affine_forward"](x, *parameters, added, dim, relu)
        needs = needs_x, needs_sums, needs_sums, residual
        launchers.KERNELS["channel_affine_backward"](x, x, *parameters, bits, dim, relu, *needs)


def call_layer_norm(launchers, shape, dtype, compute, every_option):
    x = torch.empty(shape, dtype=dtype)
    values = torch.empty(shape[1], dtype=compute)
    options = [(values, values, True, True)]
    if every_option:
        options += [(None, None, True, False), (values, values, False, True)]
        options += [(values, None, True, False), (None, None, True, True)]
    for weight, bias, *needs in options:
        _, *saved = launchers.KERNELS["layer_norm_forward"](x, weight, bias, 1e-5)
        launchers.KERNELS["layer_norm_backward"](x, x, *saved, weight, *needs)


def launches(dtype, shape, every_option):
    """(kernel, arguments, keywords) of all ops of a shape."""
    from triton.runtime import jit

    from ueo_fast.triton import channel_affine, layer_norm

    found = []
    jit.JITFunction.run = lambda kernel, *args, grid, warmup, **keywords: found.append(
        (kernel, args, keywords)
    )
    channel_affine.processors_of = layer_norm.processors_of = lambda device: PROCESSORS
    element = getattr(torch, dtype)
    compute = torch.float64 if dtype == "float64" else torch.float32
    size = SHAPES[shape]
    if isinstance(size[0], tuple):
        call_channel_affine(channel_affine, *size, element, compute, every_option)
    else:
        call_layer_norm(layer_norm, size, element, compute, every_option)
    return found


def compile_case(arch, dtype, shape, every_option):
    """One line of JSON per variant: kernel, warps, registers, spilled, shared."""
    import triton
    from triton.backends.compiler import GPUTarget

    target = (
        GPUTarget("hip", arch, 64)
        if arch == AMD
        else GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    )
    done = set()
    for kernel, args, keywords in launches(dtype, shape, every_option):
        source, options = source_of(kernel, args, keywords)
        if source.signature.get("bits", "constexpr") != "constexpr":
            source.signature["bits"] = "*u8"
        key = (kernel.__name__, str(source.signature), str(source.constants), str(source.attrs))
        if key in done:
            continue
        done.add(key)
        compiled = triton.compile(source, target=target, options=options)
        registers, spilled, shared = resources_of(compiled, arch)
        found = {"kernel": kernel.__name__, "warps": options["num_warps"], "registers": registers}
        print(json.dumps(found | {"spilled": spilled, "shared": shared}), flush=True)


def check_case(case, folder, every_option):
    from ueo_fast.triton.tuning import TUNING

    arch, dtype, _ = case
    environment = dict(os.environ, TRITON_CACHE_DIR=str(folder), CUBIN=str(folder / "x.cubin"))
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, __file__, json.dumps([*case, every_option])],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    variants = [json.loads(line) for line in done.stdout.splitlines()]
    kernels = {variant["kernel"].replace("_tiled", "") for variant in variants}
    assert kernels == {"forward_kernel", "backward_kernel", "finish_sums_kernel"}
    for variant in variants:
        assert variant["spilled"] == 0, variant
        assert variant["shared"] <= TUNING.max_shared_bytes, variant
        if arch == AMD and dtype != "float64":
            assert variant["registers"] <= TUNING.max_vector_registers, variant
        elif arch != AMD:
            double = dtype == "float64"
            budget = TUNING.max_registers_double if double else TUNING.max_registers
            assert variant["registers"] <= budget, variant


@pytest.mark.parametrize("case", DEFAULT_CASES, ids="-".join)
def test_representative_kernels_compile_within_their_budgets(case, tmp_path):
    check_case(case, tmp_path, every_option=False)


@pytest.mark.slow
@pytest.mark.parametrize("case", ALL_CASES, ids="-".join)
def test_every_kernel_compiles_within_its_budget(case, tmp_path):
    check_case(case, tmp_path, every_option=True)


if __name__ == "__main__":
    compile_case(*json.loads(sys.argv[1]))
