"""What nvcc made of the CUDA kernels, read from ``_cuda.so`` for every architecture; needs no GPU.

Registers, stack, shared memory and the length of the loss's loops must stay within the budgets of
csrc/cuda/launch.h, and rows must be loaded and stored 16 bytes at a time. The disassemblers come
with Triton.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
import setup_script
from triton_compilation import nvidia_tool

import ueo_fast

PACKAGE = Path(ueo_fast.__file__).parent
LAUNCH = setup_script.PATH.parent / "csrc" / "cuda" / "launch.h"
ARCHITECTURES = ("80", "90", "100", "120")
STORAGES = {"float": 4, "double": 8, "__half": 2, "__nv_bfloat16": 2}  # bytes of an element

# Kernels of rows and what they move 16 bytes at a time. No row of doubles is held in registers.
AFFINE = ("channel_affine", "channel_affine_gradient", "layer_norm", "layer_norm_gradient")
IN_REGISTERS = ("ueo_statistics", "ueo_gradient", "ueo_statistics_block", "ueo_gradient_block")
LOADS = ("max_softmax", "ueo_statistics_any", "ueo_gradient_any", *IN_REGISTERS, *AFFINE)
STORES = ("ueo_gradient", "ueo_gradient_block", "ueo_gradient_any", *AFFINE)
# kIsWide in csrc/cuda/channel_affine.cuh, kNormGradientBlocks in layer_norm.cuh.
WIDE = re.compile(
    r"channel_affine_gradient<__(half|nv_bfloat16), false, true>"
    r"|layer_norm_gradient<\w+, false, true>"
)
LOAD = re.compile(r"\b(LDG\.E|LDGSTS\.E)[.\w]*\.128\b")
STORE = re.compile(r"\bSTG\.E[.\w]*\.128\b")


# ueo_statistics<float, slots, lanes, plain>, ueo_statistics_block<float, slots>.
REGISTERS = re.compile(r"\bueo_(?:statistics|gradient)<(\w+), (\d+), (\d+), (true|false)>")
COUNTED_WITH = "13.0"  # the nvcc of the counts next to kLoopBudgets


class Kernel(NamedTuple):
    name: str  # ueo_gradient
    first: str  # its first template argument: a storage or compute type
    signature: str


class Resources(NamedTuple):
    registers: int  # per thread
    stack: int  # bytes per thread
    local: int  # bytes per thread
    shared: int  # bytes per block, without what a launch adds


@pytest.fixture(scope="module")
def library() -> Path:
    path = PACKAGE / "_cuda.so"
    if not path.exists():
        build = setup_script.load().cuda_of_this_build(os.environ, in_place=True)
        if isinstance(build, str):
            pytest.skip(f"_cuda.so was not built: {build}")
        pytest.fail(f"_cuda.so is missing though {build.toolkit.nvcc} could build it: make setup")
    return path


@pytest.fixture(scope="module")
def toolkit(library) -> dict[str, str]:
    read: dict[str, str] = json.loads((PACKAGE / "_cuda.json").read_text())
    return read


@pytest.fixture(scope="module")
def architectures(toolkit) -> list[str]:
    return toolkit["architectures"].split()


def demangle(names: list[str]) -> dict[str, Kernel]:
    assert shutil.which("c++filt"), "c++filt comes with the C++ compiler (binutils)"
    done = subprocess.run(
        ["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True
    )
    kernels = {}
    for name, signature in zip(names, done.stdout.splitlines(), strict=True):
        parts = re.search(r"ueo_fast::cuda::(\w+)(?:<(\w+))?", signature)
        assert parts is not None, signature
        kernels[name] = Kernel(parts[1], parts[2] or "", signature)
    return kernels


@pytest.fixture(scope="module")
def resources(library) -> dict[str, dict[Kernel, Resources]]:
    """By architecture and kernel."""
    found: list[tuple[str, str, Resources]] = []
    architecture = ""
    report = nvidia_tool("cuobjdump", "-res-usage", library)
    for match in re.finditer(
        r"^arch = sm_(\w+)$"
        r"|^ *Function (\S+):\n *REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)",
        report,
        re.MULTILINE,
    ):
        if match[1] is not None:
            architecture = match[1]
        else:
            registers, stack, shared, local = map(int, match.groups()[2:])
            # From sm_90 on the system's own KiB per block is counted in.
            shared -= 1024 if int(re.sub(r"\D", "", architecture)) >= 90 else 0
            found.append((architecture, match[2], Resources(registers, stack, local, shared)))
    assert len(found) == report.count("Function "), "cuobjdump reports in another form"
    kernels = demangle(sorted({name for _, name, _ in found}))
    table: dict[str, dict[Kernel, Resources]] = {}
    for architecture, name, used in found:
        # A kernel of the compute type alone is in several objects, each time the same.
        known = table.setdefault(architecture, {}).setdefault(kernels[name], used)
        assert known == used, kernels[name].signature
    return table


@pytest.fixture(scope="module")
def instructions(library, architectures) -> dict[Kernel, str]:
    """Machine code for sm_90."""
    if "90" not in architectures:
        pytest.skip(f"built for {architectures} only")
    _, *functions = re.split(
        r"^\s*Function : ",
        nvidia_tool("cuobjdump", "-sass", "-arch", "sm_90", library),
        flags=re.MULTILINE,
    )
    code = dict(function.split("\n", 1) for function in functions)
    return {kernel: code[name] for name, kernel in demangle(list(code)).items()}


def budget(name: str) -> int:
    match = re.search(rf"^inline constexpr int {name} = (\d+);", LAUNCH.read_text(), re.MULTILINE)
    assert match is not None, f"{LAUNCH} has no `inline constexpr int {name} = ...;`"
    return int(match[1])


def register_budget(host: ModuleType, kernel: Kernel) -> int:
    held = REGISTERS.search(kernel.signature)
    if held is not None:  # __launch_bounds__(kRegisterThreads, register_blocks())
        storage, slots, _, plain = held.groups()
        blocks = host.register_blocks(int(slots) * 16 // STORAGES[storage], plain == "true")
        threads = budget("kRegisterThreads") * blocks
        return min(255, 65536 // threads // 8 * 8)  # they are given out by the eight
    wide = kernel.first == "double" or WIDE.search(kernel.signature) is not None
    return budget("kMaxRegistersWide" if wide else "kMaxRegisters")


def test_every_architecture_is_there(library, architectures):
    build = setup_script.load().cuda_of_this_build(os.environ, in_place=True)
    if isinstance(build, str) or build.architectures:
        pytest.skip("this build is for other architectures; CUDA=1 make test compiles all")
    assert tuple(architectures) == ARCHITECTURES
    # The last one's PTX serves GPUs that are still to come.
    assert set(re.findall(r"\.sm_(\w+)\.ptx", nvidia_tool("cuobjdump", "-lptx", library))) == {
        ARCHITECTURES[-1]
    }


def test_every_architecture_has_every_kernel(resources, architectures):
    assert set(resources) == set(architectures)
    first, *others = resources.values()
    for other in others:
        assert set(other) == set(first)


@pytest.mark.parametrize("name", LOADS)
def test_every_storage_type_has_its_kernels(resources, name):
    expected = set(STORAGES) - ({"double"} if name in IN_REGISTERS else set())
    for architecture, kernels in resources.items():
        storages = {kernel.first for kernel in kernels if kernel.name == name}
        assert storages == expected, f"{name} on sm_{architecture}"


def test_kernels_keep_to_their_budgets(resources, cuda_on_host):
    stack, shared = budget("kMaxStackBytes"), budget("kMaxStaticSharedBytes")
    over = [
        f"sm_{architecture} {kernel.signature}: {used}"
        for architecture, kernels in resources.items()
        for kernel, used in kernels.items()
        if used.registers > register_budget(cuda_on_host, kernel)
        or used.stack > stack
        or used.local > stack
        or used.shared > shared
    ]
    assert not over, "\n".join(over)


def missing(instructions: dict[Kernel, str], name: str, wanted: re.Pattern[str]) -> list[str]:
    """Signatures of the kernels of this name whose machine code lacks an instruction."""
    kernels = {kernel: code for kernel, code in instructions.items() if kernel.name == name}
    assert kernels, f"no kernel is called {name}"
    return [kernel.signature for kernel, code in kernels.items() if not wanted.search(code)]


@pytest.mark.parametrize("name", LOADS)
def test_rows_are_loaded_16_bytes_at_a_time(instructions, name):
    assert not missing(instructions, name, LOAD)


@pytest.mark.parametrize("name", STORES)
def test_results_are_stored_16_bytes_at_a_time(instructions, name):
    assert not missing(instructions, name, STORE)


def loop_over_rows(code: str) -> list[str]:
    """The innermost loop with an exponential in it: what lies between the target of a backward
    branch and that branch."""
    found = re.findall(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", code, re.MULTILINE)
    position = {int(address, 16): i for i, (address, _) in enumerate(found)}
    text = [instruction for _, instruction in found]
    loops = []
    for end, instruction in enumerate(text):
        branch = re.search(r"\bBRA\b.*?(0x[0-9a-f]+)", instruction)
        begin = end if branch is None else position[int(branch[1], 16)]
        loop = text[begin : end + 1]
        if begin < end and any("MUFU.EX2" in line for line in loop):
            loops.append(loop)
    assert loops, "no loop has an exponential in it"
    return min(loops, key=len)


def test_loops_are_found():
    lines = ["MOV R1, c[0x0][0x28]", "MUFU.EX2 R2, R2", "FADD R3, R3, R2", "@P0 BRA 0x10"]
    lines += ["@!P1 BRA 0x0", "IADD3 R4, R4, 0x1, RZ", "@P2 BRA 0x50", "BRA `(.L_x_1) 0x70"]
    code = "".join(f"        /*{16 * i:04x}*/    {line} ;\n" for i, line in enumerate(lines))
    assert loop_over_rows(code) == lines[1:4]
    with pytest.raises(AssertionError, match="exponential"):
        loop_over_rows(code.replace("EX2", "LG2"))


def loop_per_row(host: ModuleType, instructions, name: str, storage: str, columns: int) -> float:
    """Instructions per row, by all warps that work on it, of the kernel that the plan takes."""
    device = host.Device(
        multiprocessors=132,
        threads_per_multiprocessor=2048,
        shared_per_block=227 << 10,
        shared_per_multiprocessor=228 << 10,
        l2_bytes=50 << 20,
    )
    rows, element = 16384, STORAGES[storage]
    if name.endswith("_block"):
        assert not host.plan_registers(device, rows, columns, element).fits
        plan = host.plan_shared_rows(device, rows, columns, element)
        arguments, warps_per_row = f"<{storage}, {plan.slots}>", plan.threads / 32
    else:
        plan = host.plan_registers(device, rows, columns, element)
        arguments = f"<{storage}, {plan.slots}, {plan.lanes}, true>"
        warps_per_row = plan.lanes / 32
    assert plan.fits
    (code,) = (
        code for kernel, code in instructions.items() if f"::{name}{arguments}" in kernel.signature
    )
    return len(loop_over_rows(code)) * warps_per_row


def test_loops_over_rows_keep_to_their_budgets(instructions, cuda_on_host, toolkit):
    over, loose = [], []
    for name, storage, columns, most in cuda_on_host.loop_budgets():
        counted = loop_per_row(cuda_on_host, instructions, name, storage, columns)
        told = f"{name}<{storage}>, {columns} columns: {counted:.0f} per row, budget {most}"
        over += [told] if counted > most else []
        # A budget with room for 10% more instructions would not catch a regression.
        loose += [told] if 1.1 * counted <= most else []
    assert not over, "\n".join(over)
    if toolkit["cuda"] == COUNTED_WITH:
        assert not loose, "\n".join(loose)
