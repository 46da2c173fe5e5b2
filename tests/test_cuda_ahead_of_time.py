"""What nvcc made of the CUDA kernels, read from ``_cuda.so`` for every architecture; needs no GPU.

Registers, stack and shared memory are held to the budgets of csrc/cuda/launch.h, and loads and
stores of rows to 16 bytes. The tools that read machine code come with Triton.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
import setup_script

import ueo_fast

PACKAGE = Path(ueo_fast.__file__).parent
LAUNCH = setup_script.PATH.parent / "csrc" / "cuda" / "launch.h"
ARCHITECTURES = ("80", "86", "89", "90", "100", "120")
STORAGES = ("float", "double", "__half", "__nv_bfloat16")

# Kernels of rows, compiled for every storage type, and what they move 16 bytes at a time.
AFFINE = ("channel_affine", "channel_affine_gradient", "layer_norm", "layer_norm_gradient")
LOADS = ("max_softmax", "ueo_statistics", "ueo_gradient", "ueo_one_pass", *AFFINE)
STORES = ("ueo_gradient", "ueo_one_pass", *AFFINE)
# kIsWide in csrc/cuda/channel_affine.cuh, kNormGradientBlocks in layer_norm.cuh.
WIDE = re.compile(
    r"channel_affine_gradient<__(half|nv_bfloat16), false, true>"
    r"|layer_norm_gradient<\w+, false, true>"
)
LOAD = re.compile(r"\b(LDG\.E|LDGSTS\.E)[.\w]*\.128\b")
STORE = re.compile(r"\bSTG\.E[.\w]*\.128\b")


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
def architectures() -> list[str]:
    return json.loads((PACKAGE / "_cuda.json").read_text())["architectures"].split()


def cuobjdump(*arguments: str | Path) -> str:
    triton = importlib.util.find_spec("triton")
    assert triton is not None, "Triton's package has the tools that read machine code"
    assert triton.origin is not None
    tools = Path(triton.origin).parent / "backends" / "nvidia" / "bin"
    environment = dict(os.environ, PATH=f"{tools}{os.pathsep}{os.environ.get('PATH', '')}")
    command = [str(tools / "cuobjdump"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    return done.stdout


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
    report = cuobjdump("-res-usage", library)
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
        r"^\s*Function : ", cuobjdump("-sass", "-arch", "sm_90", library), flags=re.MULTILINE
    )
    code = dict(function.split("\n", 1) for function in functions)
    return {kernel: code[name] for name, kernel in demangle(list(code)).items()}


def budget(name: str) -> int:
    match = re.search(rf"^inline constexpr int {name} = (\d+);", LAUNCH.read_text(), re.MULTILINE)
    assert match is not None, f"{LAUNCH} has no `inline constexpr int {name} = ...;`"
    return int(match[1])


def register_budget(kernel: Kernel) -> int:
    wide = (
        kernel.name == "ueo_one_pass"
        or kernel.first == "double"
        or WIDE.search(kernel.signature) is not None
    )
    return budget("kMaxRegistersWide" if wide else "kMaxRegisters")


def test_every_architecture_is_there(library, architectures):
    build = setup_script.load().cuda_of_this_build(os.environ, in_place=True)
    if isinstance(build, str) or build.architectures:
        pytest.skip("this build is for other architectures; CUDA=1 make test compiles all")
    assert tuple(architectures) == ARCHITECTURES
    # The last one's PTX serves GPUs that are still to come.
    assert set(re.findall(r"\.sm_(\w+)\.ptx", cuobjdump("-lptx", library))) == {ARCHITECTURES[-1]}


def test_every_architecture_has_every_kernel(resources, architectures):
    assert set(resources) == set(architectures)
    first, *others = resources.values()
    for other in others:
        assert set(other) == set(first)


@pytest.mark.parametrize("name", LOADS)
def test_every_storage_type_has_its_kernels(resources, name):
    for architecture, kernels in resources.items():
        storages = {kernel.first for kernel in kernels if kernel.name == name}
        assert storages == set(STORAGES), f"{name} on sm_{architecture}"


def test_kernels_keep_to_their_budgets(resources):
    stack, shared = budget("kMaxStackBytes"), budget("kMaxStaticSharedBytes")
    over = [
        f"sm_{architecture} {kernel.signature}: {used}"
        for architecture, kernels in resources.items()
        for kernel, used in kernels.items()
        if used.registers > register_budget(kernel)
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
