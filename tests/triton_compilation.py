"""Triton kernels compiled for GPUs that are not here: every variant that a launcher launches.

The compilation runs in another process, without the interpreter: there, launches are recorded
instead of run, so that what is compiled is what a user's call would compile. A test module gives
``launches(dtype, shape, count)``, where ``count`` is how many of its options are taken (None: all),
and calls ``main`` when it is run as a script.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

NVIDIA = ("sm_80", "sm_90", "sm_100", "sm_120")
AMD = "gfx942"
PROCESSORS = 132  # an H100's
DTYPES = ("float32", "float16", "bfloat16", "float64")

Launch = tuple[Any, tuple[Any, ...], dict[str, Any]]  # kernel, arguments, keywords

# ---- in the other process ------------------------------------------------------------------------


def record_launches(*modules: Any) -> list[Launch]:
    """A list that every launch from now on is appended to; launchers see an H100."""
    from triton.runtime import jit

    found: list[Launch] = []
    jit.JITFunction.run = lambda kernel, *args, grid, warmup, **keywords: found.append(
        (kernel, args, keywords)
    )
    for module in modules:
        module.processors_of = lambda device: PROCESSORS
    return found


def source_of(kernel: Any, args: tuple[Any, ...], keywords: dict[str, Any]) -> tuple[Any, Any]:
    """What the just-in-time compiler would make of a launch, and the options for it."""
    from triton.compiler import ASTSource

    names = {"float32": "fp32", "float64": "fp64", "float16": "fp16", "bfloat16": "bf16"}
    names |= {"int32": "i32", "uint8": "u8"}
    signature, constants, attributes = {}, {}, {}
    values = {**dict(zip(kernel.arg_names, args, strict=False)), **keywords}
    for index, name in enumerate(kernel.arg_names):
        value = values.pop(name)
        divisible = [["tt.divisibility", 16]]
        if isinstance(value, torch.Tensor):
            signature[name] = "*" + names[str(value.dtype).removeprefix("torch.")]
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


def target_of(arch: str) -> Any:
    from triton.backends.compiler import GPUTarget

    if arch == AMD:
        return GPUTarget("hip", arch, 64)
    return GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)


def variants_of(launches: list[Launch]) -> Iterator[tuple[dict[str, Any], Any, Any]]:
    """What to call each launch that is compiled on its own, its source and its options."""
    done = set()
    for kernel, args, keywords in launches:
        source, options = source_of(kernel, args, keywords)
        name = f"{kernel.fn.__module__.rpartition('.')[2]}.{kernel.__name__}"
        key = (name, str(source.signature), str(source.constants), str(source.attrs))
        if key not in done:
            done.add(key)
            yield {"kernel": name, "parameters": keywords}, source, options


def intermediate_code(source: Any, options: Any) -> str:
    """What Triton's frontend makes of a kernel, before anything is optimised."""
    from triton._C.libtriton import ir
    from triton.compiler.compiler import make_backend

    target = target_of("sm_90")
    backend = make_backend(target)
    parsed = backend.parse_options(dict(options))
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    functions = backend.get_codegen_implementation(parsed)
    return str(source.make_ir(target, parsed, functions, backend.get_module_map(), context))


def double_arithmetic(code: str) -> list[str]:
    """The operations on float64 numbers, each once; of constants those that are not 0."""
    found = set()
    for line in code.splitlines():
        operation = re.search(r"= \"?((?:arith|math|tt\.extern)\S*?)\"? .*f64", line)
        if operation is None:
            continue
        zero = re.search(r"constant (dense<)?0\.0+e\+00", line)
        if zero is None:
            found.add(operation.group(1))
    return sorted(found)


def nvidia_tool(tool: str, *arguments: str | Path) -> str:
    """Run one of the tools in Triton's package and return what it prints."""
    triton = importlib.util.find_spec("triton")
    assert triton is not None, "Triton's package has the tools that read machine code"
    assert triton.origin is not None
    tools = Path(triton.origin).parent / "backends" / "nvidia" / "bin"
    # `cuobjdump -sass` runs nvdisasm.
    environment = dict(os.environ, PATH=f"{tools}{os.pathsep}{os.environ.get('PATH', '')}")
    command = [tools / tool, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    return done.stdout


def resources_of(compiled: Any, arch: str, folder: Path) -> dict[str, int]:
    """Registers per thread, bytes spilled or kept on a stack, shared bytes per program."""
    shared = compiled.metadata.shared
    if arch == AMD:
        text = compiled.asm["amdgcn"]

        def number(name: str) -> int:
            return max(int(found) for found in re.findall(rf"\.{name}:\s+(\d+)", text))

        spilled = number("vgpr_spill_count") + number("sgpr_spill_count")
        spilled += number("private_segment_fixed_size")
        return {"registers": number("vgpr_count"), "spilled": spilled, "shared": shared}
    binary = folder / "kernel.cubin"
    binary.write_bytes(compiled.asm["cubin"])
    usage = nvidia_tool("cuobjdump", "-res-usage", binary)
    (registers,) = re.findall(r" REG:(\d+)", usage)
    (stack,) = re.findall(r" STACK:(\d+)", usage)
    (local,) = re.findall(r" LOCAL:(\d+)", usage)
    return {"registers": int(registers), "spilled": int(stack) + int(local), "shared": shared}


def innermost_loops(binary: Path) -> list[list[str]]:
    """The instructions of each loop that has no loop inside, from the machine code."""
    instructions: list[str] = []
    labels: dict[str, int] = {}
    for line in nvidia_tool("nvdisasm", "-c", binary).splitlines():
        if label := re.match(r"(\.L_x_\d+):", line.strip()):
            labels[label.group(1)] = len(instructions)
        elif code := re.match(r"\s+/\*[0-9a-f]+\*/\s+(.*?);", line):
            instructions.append(code.group(1))
    loops = []
    for index, instruction in enumerate(instructions):
        target = re.search(r"BRA.*?(\.L_x_\d+)", instruction)
        # The last instruction jumps to itself.
        if target and labels[target.group(1)] < index:
            loops.append((labels[target.group(1)], index))
    return [
        instructions[begin : end + 1]
        for begin, end in loops
        if not any(begin <= other and last < end for other, last in loops if last != end)
    ]


def main(launches: Callable[[str, str, int | None], list[Launch]]) -> None:
    """One line of JSON per case of the command line: the variants that it compiles."""
    task, cases = json.loads(sys.argv[1])
    for case in cases:
        variants = precision_of if task == "precision" else compiled_for
        print(json.dumps(list(variants(launches, task, *case))), flush=True)


def precision_of(
    launches: Callable[..., list[Launch]], task: str, dtype: str, shapes: list[str]
) -> Iterator[dict[str, Any]]:
    for shape in shapes:
        for found, source, options in variants_of(launches(dtype, shape, None)):
            yield found | {"double": double_arithmetic(intermediate_code(source, options))}


def compiled_for(
    launches: Callable[..., list[Launch]], task: str, arch: str, *case: Any
) -> Iterator[dict[str, Any]]:
    import triton

    folder = Path(os.environ["TRITON_CACHE_DIR"])
    for found, source, options in variants_of(launches(*case)):
        compiled = triton.compile(source, target=target_of(arch), options=options)
        found |= {"arch": arch, **resources_of(compiled, arch, folder)}
        if task == "loops":
            found["loops"] = innermost_loops(folder / "kernel.cubin")
        yield found


# ---- in the test's process -----------------------------------------------------------------------


def run(script: str, task: str, *cases: Any, folder: Path) -> list[list[dict[str, Any]]]:
    """What ``main`` of a test module finds in each case; one process for all, because starting one
    takes as long as compiling a case."""
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    environment = dict(os.environ, TRITON_CACHE_DIR=str(folder), PYTHONPATH=path)
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, script, json.dumps([task, cases])],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def check_cases(
    script: str, cases: Sequence[Sequence[Any]], kernels: set[str], folder: Path, count: int | None
) -> None:
    """Compile cases (architecture, dtype, shape): each needs these kernels, within their budgets.

    Args:
        script: the test module that launches them.
        cases: what to compile.
        kernels: their names; a kernel and its tiled form have one.
        folder: for Triton's cache.
        count: of the options that are tried; ``None``: all.
    """
    found = run(script, "resources", *((*case, count) for case in cases), folder=folder)
    for (arch, dtype, shape), variants in zip(cases, found, strict=True):
        compiled = {v["kernel"].partition(".")[2].replace("_tiled", "") for v in variants}
        assert compiled == kernels, (arch, dtype, shape)
        check_budgets(variants, arch, dtype)


def check_budgets(variants: list[dict[str, Any]], arch: str, dtype: str) -> None:
    from ueo_fast.triton import affine_tuning, tuning

    budgets = tuning.BUDGETS | affine_tuning.BUDGETS
    for variant in variants:
        registers, spilled = variant["registers"], variant["spilled"]
        assert variant["shared"] <= tuning.TUNING.max_shared_bytes, variant
        if arch == AMD:
            assert spilled == 0, variant
            assert dtype == "float64" or registers <= tuning.TUNING.max_vector_registers, variant
            continue
        budget = budgets[variant["kernel"]]
        double = dtype == "float64"
        assert registers <= (budget.registers_double if double else budget.registers), variant
        most = min(65536 // (32 * variant["parameters"]["num_warps"]), 255)
        allowed = tuning.TUNING.max_spilled_bytes if registers < most else 0
        assert spilled <= allowed, variant


def check_precision(
    variants: list[dict[str, Any]], meant: dict[str, set[str]], kernels: set[str]
) -> None:
    """Holds kernels to the float64 arithmetic that is meant; those not in ``meant`` have none."""
    assert {variant["kernel"] for variant in variants} == kernels
    for variant in variants:
        assert set(variant["double"]) == meant.get(variant["kernel"], set()), variant
