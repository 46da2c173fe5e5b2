"""What benchmarks/gpu.sh needs of a machine: `python -m benchmarks.gpu_requirements STAGE...`.

Prints the CUDA architecture to build for; or, on stderr, everything that is missing at once.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from pathlib import Path

PROGRAMS = {"build": ("nvcc", "cmake", "ninja", "c++")}
PACKAGES = {
    "build": ("torch", "setuptools", "wheel"),
    "test": ("torch", "pytest", "pytest_benchmark", "pybind11", "hypothesis"),
}


def _program_missing(name: str) -> bool:
    compiler = {"nvcc": os.environ.get("CUDACXX"), "c++": os.environ.get("CXX")}.get(name)
    # Python's own folder as well: cmake and ninja may be packages of it.
    path = os.pathsep.join([os.environ.get("PATH", ""), str(Path(sys.executable).parent)])
    return shutil.which(compiler or name, path=path) is None


def missing(stages: list[str]) -> list[str]:
    programs = {name for stage in stages for name in PROGRAMS.get(stage, ())}
    packages = {name for stage in stages for name in PACKAGES.get(stage, ("torch",))}
    found = [name for name in sorted(programs) if _program_missing(name)]
    found += [
        f"Python package {name}"
        for name in sorted(packages)
        if importlib.util.find_spec(name) is None
    ]
    return found


def architecture() -> str:
    """Of the present GPU, as CMake writes it: 90-real. Raises RuntimeError without a GPU."""
    import torch

    if torch.version.cuda is None:
        raise RuntimeError(f"a torch with CUDA (torch {torch.__version__} is without)")
    if not torch.cuda.is_available():
        raise RuntimeError("a GPU (torch.cuda.is_available() is False)")
    major, minor = torch.cuda.get_device_capability()
    return f"{major}{minor}-real"


def main(stages: list[str]) -> int:
    found = missing(stages)
    target = ""
    if "Python package torch" not in found:
        try:
            target = architecture()
        except RuntimeError as error:
            found.append(str(error))
    if found:
        print(f"benchmarks/gpu.sh: missing here: {', '.join(found)}", file=sys.stderr)
        return 2
    print(target)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
