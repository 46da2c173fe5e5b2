"""Triton kernels compiled for GPUs that are not here: every variant that a launcher launches.

The compilation runs in another process, without the interpreter: there, launches are recorded
instead of run, so that what is compiled is what a user's call would compile.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

NVIDIA = ("sm_80", "sm_90", "sm_100", "sm_120")
AMD = "gfx942"

# What each (B, C) is there for. Processors: an H100's.
SHAPES = {
    "short": (4096, 7),  # many rows per tile, many chunks
    "batch": (64, 345),  # DomainNet's batch: few chunks
    "aligned": (4096, 1024),  # rows begin at 16 bytes
    "longest held": (512, 4000),  # the longest row in registers in float64
    "longest held float": (512, 8192),
    "tiled": (4096, 21841),
    "tiled vectors": (4096, 16384),  # rows begin at 16 bytes
}
PROCESSORS = 132
DTYPES = ("float32", "float16", "bfloat16", "float64")

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


def launches(dtype, shape, every_option):
    """(kernel, arguments, keywords) of all ops; at least all ops once without and with eps."""
    from triton.runtime import jit

    from ueo_fast.triton import ueo_loss as launchers

    found = []
    run = jit.JITFunction.run
    processors = launchers.processors_of
    jit.JITFunction.run = lambda kernel, *args, grid, warmup, **keywords: found.append(
        (kernel, args, keywords)
    )
    launchers.processors_of = lambda device: PROCESSORS
    try:
        logits = torch.empty(SHAPES[shape], dtype=getattr(torch, dtype))
        compute = torch.float64 if dtype == "float64" else torch.float32
        weights = torch.empty(logits.shape[0], dtype=compute)
        options = [(None, None, 1.0, 0.0), (weights, None, 1.0, 1e-5)]
        if every_option:
            options += [(None, None, 0.01, 1e-5), (weights, weights, 1.0, 0.0)]
            options += [(None, weights, 0.01, 0.0), (None, None, 0.01, 0.0)]
        for confidence, marginal_weights, scale, eps in options:
            forward = logits, confidence, marginal_weights, 0.5, scale, eps
            loss, *saved = launchers.KERNELS["ueo_loss_forward"](*forward)
            launchers.KERNELS["ueo_loss_backward"](loss, logits, *saved, 0.5, eps)
        launchers.KERNELS["ueo_loss_and_grad"](logits, None, None, 0.5, 1.0, 0.0)
        launchers.KERNELS["max_softmax"](logits, 0.5)
    finally:
        jit.JITFunction.run = run
        launchers.processors_of = processors
    return found


def source_of(kernel, args, keywords):
    """What the just-in-time compiler would make of a launch, and the options for it."""
    from triton.compiler import ASTSource

    names = {"float32": "fp32", "float64": "fp64", "float16": "fp16", "bfloat16": "bf16"}
    signature, constants, attributes = {}, {}, {}
    values = {**dict(zip(kernel.arg_names, args, strict=False)), **keywords}
    for index, name in enumerate(kernel.arg_names):
        value = values.pop(name)
        divisible = [["tt.divisibility", 16]]
        if isinstance(value, torch.Tensor):
            element = str(value.dtype).removeprefix("torch.")
            signature[name] = "*" + names.get(element, "i32")
            attributes[(index,)] = divisible  # torch's allocator aligns to more
        elif index >= len(args) or value is None or (value == 1 and isinstance(value, int)):
            signature[name] = "constexpr"
            constants[(index,)] = value
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if abs(value) < 2**31 else "i64"
            if value % 16 == 0:
                attributes[(index,)] = divisible
    return ASTSource(kernel, signature, constants, attributes), values


def resources_of(compiled, arch):
    """Registers per thread, bytes spilled or kept on a stack, shared bytes per program."""
    if arch == AMD:
        text = compiled.asm["amdgcn"]

        def number(name):
            return max(int(found) for found in re.findall(rf"\.{name}:\s+(\d+)", text))

        spilled = number("vgpr_spill_count") + number("sgpr_spill_count")
        spilled += number("private_segment_fixed_size")
        return number("vgpr_count"), spilled, compiled.metadata.shared
    import triton

    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    binary = Path(os.environ["CUBIN"])
    binary.write_bytes(compiled.asm["cubin"])
    done = subprocess.run(
        [cuobjdump, "-res-usage", binary], capture_output=True, text=True, check=True
    )
    (registers,) = re.findall(r" REG:(\d+)", done.stdout)
    (stack,) = re.findall(r" STACK:(\d+)", done.stdout)
    (local,) = re.findall(r" LOCAL:(\d+)", done.stdout)
    return int(registers), int(stack) + int(local), compiled.metadata.shared


def compile_case(arch, dtype, shape, every_option):
    """One line of JSON per variant: kernel, warps, registers, spilled, shared."""
    import triton
    from triton.backends.compiler import GPUTarget

    number = arch.removeprefix("sm_")
    target = GPUTarget("hip", arch, 64) if arch == AMD else GPUTarget("cuda", int(number), 32)
    done = set()
    for kernel, args, keywords in launches(dtype, shape, every_option):
        source, options = source_of(kernel, args, keywords)
        key = (kernel.__name__, str(source.signature), str(source.constants), str(source.attrs))
        if key in done:
            continue
        done.add(key)
        compiled = triton.compile(source, target=target, options=options)
        registers, spilled, shared = resources_of(compiled, arch)
        print(
            json.dumps(
                {
                    "kernel": kernel.__name__,
                    "warps": options["num_warps"],
                    "registers": registers,
                    "spilled": spilled,
                    "shared": shared,
                }
            ),
            flush=True,
        )


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
    assert kernels == {"forward_kernel", "backward_kernel", "max_softmax_kernel", "finish_kernel"}
    for variant in variants:
        chosen = every_option and variant["registers"] < TUNING.max_registers
        assert variant["spilled"] <= (TUNING.max_spilled_bytes if chosen else 0), variant
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
