"""Builds ueo_fast/_cpu.so with CMake + ninja, and tags the wheel py3-none-<platform>.

Environment: UEO_FAST_BUILD=0 installs without the binary (the pure PyTorch reference runs
instead), MAX_JOBS limits parallel compilers.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ModuleNotFoundError as error:
    raise SystemExit(
        "ueo_fast builds with setuptools >= 77: `pip install -U setuptools wheel cmake ninja`"
    ) from error

ROOT = Path(__file__).resolve().parent
NO_TORCH = (
    "ueo_fast builds against the headers of the installed torch, which was not found. "
    "Install torch first and build with `pip install --no-build-isolation .`, "
    "or set UEO_FAST_BUILD=0 to install without the binary."
)
FAILED = (
    "The C++ library of ueo_fast could not be built (see above). It needs a C++20 compiler "
    "(g++ >= 11 or clang >= 14), cmake >= 3.24 and ninja; `pip install cmake ninja` brings the "
    "last two. UEO_FAST_BUILD=0 installs without it."
)


class BuildWithCMake(build_ext):
    """Runs CMake once; the result is a plain shared library, not a Python module."""

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"

    def build_extension(self, ext: Extension) -> None:
        if importlib.util.find_spec("torch") is None:
            raise SystemExit(NO_TORCH)
        output = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = Path(self.build_temp).resolve() / "cmake"
        configure = [
            *("cmake", "-S", str(ROOT), "-B", str(build), "-GNinja"),
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={output}",
        ]
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        try:
            self._configure(configure, build)
            subprocess.check_call(["cmake", "--build", str(build), *jobs])
        except (OSError, subprocess.CalledProcessError) as error:
            raise SystemExit(f"{error}\n{FAILED}") from error

    @staticmethod
    def _configure(command: list[str], build: Path) -> None:
        try:
            subprocess.check_call(command)
        except subprocess.CalledProcessError:
            # A cache written by another Python or CMake (a new venv, an isolated build).
            shutil.rmtree(build, ignore_errors=True)
            subprocess.check_call(command)


class PlatformWheel(bdist_wheel):
    """The binary is bound to libtorch's stable ABI, not to a Python version."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


extensions = [Extension("ueo_fast._cpu", sources=[])]
if os.environ.get("UEO_FAST_BUILD") == "0":
    extensions = []
setup(
    ext_modules=extensions,
    cmdclass={"build_ext": BuildWithCMake, "bdist_wheel": PlatformWheel},
)
