"""Builds what runs the CUDA kernels on the host (tests/cpp/cuda_host) and loads it."""

from __future__ import annotations

import fcntl
import functools
import hashlib
import importlib.util
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "tests" / "cpp" / "cuda_host"
BUILD = ROOT / "build" / f"cuda-host-{sys.implementation.cache_tag}"
SCHEDULER = sorted(path for path in FOLDER.glob("*.cpp") if path.name.startswith("scheduler"))
"""Compiled without -fsanitize=thread, always: fiber.h says why."""

FLAGS = (
    *("-std=c++20", "-fPIC", "-pthread", "-g1", "-Wall", "-Wextra"),
    # Kernels read arrays through vectors and have nvcc's pragmas.
    *("-fno-strict-aliasing", "-Wno-unknown-pragmas", "-Wno-unused-function"),
    *(f"-I{FOLDER}", f"-I{ROOT / 'csrc' / 'cuda'}"),
)


def _digest(flags: list[str], with_kernels: bool) -> str:
    """Of everything that may be compiled in, and of the compiler."""
    digest = hashlib.sha256(" ".join([os.environ.get("CXX", "g++"), *FLAGS, *flags]).encode())
    csrc = ROOT / "csrc"
    sources = [*FOLDER.iterdir(), csrc / "cuda" / "device.cuh", csrc / "cpu" / "half.h"]
    if with_kernels:
        sources += [*csrc.glob("*.h"), *(csrc / "cuda").iterdir()]
    for path in sorted(path for path in sources if path.is_file()):
        digest.update(path.name.encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"


def build(name: str, source: str, flags: list[str], suffix: str, with_kernels: bool) -> Path:
    """Compile ``source`` with ``flags``, and the scheduler without, into ``BUILD`` if need be.

    Several processes may ask for the same at once: one builds, the others wait for it.
    """
    path = BUILD / f"{name}-{_digest(flags, with_kernels)}{suffix}"
    BUILD.mkdir(parents=True, exist_ok=True)
    with open(BUILD / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if path.exists():
            return path
        compiler = os.environ.get("CXX", "g++")
        objects = []
        for file in [*SCHEDULER, FOLDER / source]:
            target = BUILD / f"{path.name}.{file.stem}.o"
            extra = ["-O2"] if file in SCHEDULER else flags
            _run([compiler, *FLAGS, *extra, "-c", str(file), "-o", str(target)])
            objects.append(target)
        partial = BUILD / f"{path.name}.partial"
        link = [flag for flag in flags if flag.startswith("-fsanitize")]
        link += ["-shared"] if suffix == ".so" else ["-rdynamic"]
        _run([compiler, "-pthread", *link, *map(str, objects), "-o", str(partial), "-ldl"])
        for old in BUILD.glob(f"{name}-*"):
            if old != partial:
                old.unlink()
        partial.rename(path)
    return path


STORAGES = {
    "float32": ("float", "kFloat"),
    "float64": ("double", "kDouble"),
    "float16": ("cuda::Half", "kHalf"),
    "bfloat16": ("cuda::BFloat16", "kBFloat16"),
}


def build_sanitized(source: str, dtype: str | None = None) -> Path:
    """A program under ThreadSanitizer; with ``dtype`` one of the kernels, for this one only,
    because compiling all four takes longer than running one."""
    name, flags = Path(source).stem, ["-O1", "-fsanitize=thread"]
    if dtype is not None:
        storage, storage_name = STORAGES[dtype]
        flags += [f"-DUEO_FAST_STORAGE={storage}", f"-DUEO_FAST_STORAGE_NAME={storage_name}"]
        name = f"{name}_{dtype}"
    return build(name, source, flags, "", with_kernels=dtype is not None)


def run_sanitized(
    program: Path, *arguments: str, timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    """ThreadSanitizer's shadow memory wants the addresses that programs have without ASLR."""
    return subprocess.run(
        ["setarch", "-R", str(program), *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        env=dict(os.environ, TSAN_OPTIONS="atexit_sleep_ms=0"),
    )


@functools.cache
def load(name: str, source: str, with_kernels: bool) -> ModuleType:
    """A pybind11 module."""
    import pybind11

    includes = (pybind11.get_include(), sysconfig.get_path("include"))
    # Symbols stay visible, so that messages can name kernels; pybind11 would rather hide its own.
    flags = ["-Og", "-Wno-attributes", *(f"-isystem{path}" for path in includes)]
    spec = importlib.util.spec_from_file_location(
        name, build(name, source, flags, ".so", with_kernels)
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def cuda_on_host() -> ModuleType:
    """The kernels of the loss."""
    return load("cuda_on_host", "module.cpp", with_kernels=True)


def cuda_affine_on_host() -> ModuleType:
    """The kernels of channel_affine and layer_norm."""
    return load("cuda_affine_on_host", "affine_module.cpp", with_kernels=True)


def samples() -> ModuleType:
    """Sample kernels, for the tests of the machinery itself."""
    return load("cuda_host_samples", "samples_module.cpp", with_kernels=False)
