"""Builds ueo_fast/_cpu.so and _cuda.so with CMake + ninja; tags the wheel py3-none-<platform>.

Environment (CONTRIBUTING.md, "Building"): UEO_FAST_BUILD=0 installs without the binaries (the pure
PyTorch reference runs instead), CUDA=auto|0|1 chooses whether _cuda.so is built,
UEO_FAST_CUDA_ARCHITECTURES for which GPUs, MAX_JOBS limits parallel compilers.
"""

from __future__ import annotations

import importlib.util
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ModuleNotFoundError as error:
    raise SystemExit(
        "ueo_fast builds with setuptools >= 77: `pip install -U setuptools wheel cmake ninja`"
    ) from error

ROOT = Path(__file__).resolve().parent
# One folder for every way to build: `make` goes on where `pip install -e .` ended.
BUILD = ROOT / "build" / "cmake"
CPU_FILES = ("_cpu.so",)
CUDA_FILES = ("_cuda.so", "_cuda.json")
USUAL_CUDA_HOME = "/usr/local/cuda"
NO_TORCH = (
    "ueo_fast builds against the headers of the installed torch, which was not found. "
    "Install torch first and build with `pip install --no-build-isolation .`, "
    "or set UEO_FAST_BUILD=0 to install without the binaries."
)
FAILED = (
    "The C++ library of ueo_fast could not be built (see above). It needs a C++20 compiler "
    "(g++ >= 11 or clang >= 14), cmake >= 3.24 and ninja; `pip install cmake ninja` brings the "
    "last two. UEO_FAST_BUILD=0 installs without it."
)
CUDA_FAILED = (
    "The CUDA library was to be built as well, with {nvcc} (CUDA {version}): if that is what "
    "failed, CUDA=0 builds without it."
)


class Toolkit(NamedTuple):
    nvcc: str  # the toolkit's own, not a wrapper script
    version: str  # "13.0"


class Build(NamedTuple):
    toolkit: Toolkit
    architectures: str  # in the words of CMAKE_CUDA_ARCHITECTURES; empty: all that CMakeLists names


def toolkit_of(nvcc: str) -> Toolkit | None:
    """What stands behind ``nvcc``; None if it does not run.

    CMake looks for headers and libraries beside the compiler, where a wrapper script on PATH has
    none; nvcc itself tells where it lives.
    """
    command = [nvcc, "--dryrun", "-x", "cu", "-c", os.devnull]
    try:
        told = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    except (OSError, subprocess.CalledProcessError):
        return None
    folder = re.search(r"^#\$ _HERE_=(.+)$", told, re.MULTILINE)
    major = re.search(r"__CUDACC_VER_MAJOR__=(\d+)", told)
    minor = re.search(r"__CUDACC_VER_MINOR__=(\d+)", told)
    if folder is None or major is None or minor is None:
        return None
    return Toolkit(os.path.realpath(f"{folder[1]}/nvcc"), f"{major[1]}.{minor[1]}")


def find_toolkit(environment: Mapping[str, str]) -> Toolkit | None:
    """The first that runs, in the order of CMake's and torch's own variables."""
    if environment.get("CUDACXX"):
        return toolkit_of(environment["CUDACXX"])  # said outright: nothing else will do
    homes = [environment.get("CUDA_HOME"), environment.get("CUDA_PATH")]
    candidates = [f"{home}/bin/nvcc" for home in homes if home]
    candidates += [shutil.which("nvcc", path=environment.get("PATH", "")) or ""]
    candidates += [f"{USUAL_CUDA_HOME}/bin/nvcc"]
    return next(filter(None, map(toolkit_of, filter(None, candidates))), None)


def choose_cuda(environment: Mapping[str, str], torch_cuda: str | None) -> Toolkit | str:
    """The toolkit to build _cuda.so with, or the reason why it is left out.

    Raises:
        SystemExit: CUDA=1 cannot be met, or CUDA has an unknown value.
    """
    choice = environment.get("CUDA") or "auto"
    if choice not in ("auto", "0", "1"):
        raise SystemExit(
            f"CUDA={choice!r} is unknown: choose auto (builds the CUDA library where nvcc is "
            "found), 0 (never) or 1 (always, or fails)"
        )
    if choice == "0":
        return "CUDA=0"
    toolkit = find_toolkit(environment)
    major = (torch_cuda or "").split(".")[0]
    if torch_cuda is None:
        reason = "the installed torch is built without CUDA"
        remedy = "install one with CUDA (https://pytorch.org/get-started)"
    elif toolkit is None and environment.get("CUDACXX"):
        reason = f"CUDACXX={environment['CUDACXX']} is not an nvcc that runs"
        remedy = f"set it to the nvcc of a CUDA {major} toolkit"
    elif toolkit is None:
        reason = f"no nvcc in CUDA_HOME, CUDA_PATH, PATH or {USUAL_CUDA_HOME}"
        remedy = f"install a CUDA {major} toolkit, or set CUDACXX to its nvcc"
    elif toolkit.version.split(".")[0] != major:
        reason = f"{toolkit.nvcc} is of CUDA {toolkit.version}, torch is built for {torch_cuda}"
        remedy = f"set CUDACXX to the nvcc of a CUDA {major} toolkit"
    else:
        return toolkit
    if choice == "1":
        raise SystemExit(f"CUDA=1, but {reason}: {remedy}, or build without: CUDA=0")
    return reason


def torch_cuda_version() -> str | None:
    """``torch.version.cuda``, without the seconds that importing torch takes."""
    torch = importlib.util.find_spec("torch")
    if torch is None or torch.origin is None:
        raise SystemExit(NO_TORCH)
    version: str | None = runpy.run_path(str(Path(torch.origin).with_name("version.py")))["cuda"]
    return version


def gpu_architectures() -> list[str]:
    """The architectures of this machine's GPUs, e.g. ``["90-real"]``; asked of the driver's tool,
    because importing torch takes seconds."""
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return []
    return [
        f"{major}{minor}-real"
        for major, minor in sorted(set(re.findall(r"^(\d+)\.(\d+)$", told.stdout, re.MULTILINE)))
        if int(major) >= 8
    ]


def cuda_of_this_build(environment: Mapping[str, str], in_place: bool) -> Build | str:
    """What to compile of CUDA, or the reason why nothing.

    An in-place build serves this machine alone, so without an explicit wish it compiles for the
    GPUs that are here, and nothing where there are none: all architectures take minutes.
    """
    toolkit = choose_cuda(environment, torch_cuda_version())
    if isinstance(toolkit, str):
        return toolkit
    wanted = environment.get("UEO_FAST_CUDA_ARCHITECTURES", "")
    if wanted or environment.get("CUDA") == "1" or not in_place:
        return Build(toolkit, wanted)
    here = gpu_architectures()
    if not here:
        return (
            "this machine has no GPU of compute capability 8.0 or newer, and an in-place build "
            "compiles for this machine only (CUDA=1 compiles for all architectures)"
        )
    return Build(toolkit, ";".join(here))


class BuildWithCMake(build_ext):
    """Runs CMake once; the results are plain shared libraries, not Python modules."""

    built: tuple[str, ...] = ()
    serves_this_machine = False

    def run(self) -> None:
        # Here, because setuptools hides `inplace` from what it runs next.
        self.serves_this_machine = bool(self.inplace or getattr(self, "editable_mode", False))
        super().run()

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"

    def build_extensions(self) -> None:
        cuda = cuda_of_this_build(os.environ, self.serves_this_machine)
        if isinstance(cuda, str):
            print(f"ueo_fast: the CUDA library is left out: {cuda}", flush=True)
        self._compile(None if isinstance(cuda, str) else cuda)
        self.built = CPU_FILES + (() if isinstance(cuda, str) else CUDA_FILES)
        self._copy_what_was_built()

    def copy_extensions_to_source(self) -> None:  # setuptools calls it for installs in place
        self._copy_what_was_built()

    def _copy_what_was_built(self) -> None:
        """Into the package; what an earlier build left there goes."""
        package = Path(self.get_ext_fullpath("ueo_fast._cpu")).parent
        package.mkdir(parents=True, exist_ok=True)
        for name in CPU_FILES + CUDA_FILES:
            # Never written over in place: a running process may have it loaded.
            (package / name).unlink(missing_ok=True)
            if name in self.built:
                shutil.copy(BUILD / name, package)

    def _compile(self, cuda: Build | None) -> None:
        toolkit = None if cuda is None else cuda.toolkit
        configure = [
            *("cmake", "-S", str(ROOT), "-B", str(BUILD), "-GNinja"),
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DUEO_FAST_CUDA={'OFF' if toolkit is None else 'ON'}",
            "-DUEO_FAST_TEST_MODULE=OFF",  # the tests build theirs in the same folder
        ]
        environment = dict(os.environ)
        if cuda is not None:
            configure.append(f"-DCMAKE_CUDA_ARCHITECTURES={cuda.architectures}")
            configure.append(f"-DCMAKE_CUDA_COMPILER={cuda.toolkit.nvcc}")
            # Four compilers run, one per storage type; each may take some architectures at a time.
            # By environment: another number is no reason to compile anew.
            cores = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
            flags = [f"--threads={max(1, cores // 4)}", os.environ.get("NVCC_PREPEND_FLAGS", "")]
            environment["NVCC_PREPEND_FLAGS"] = " ".join(flags).strip()
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        try:
            self._configure(configure, toolkit)
            subprocess.check_call(["cmake", "--build", str(BUILD), *jobs], env=environment)
        except (OSError, subprocess.CalledProcessError) as error:
            hint = "" if toolkit is None else "\n" + CUDA_FAILED.format_map(toolkit._asdict())
            raise SystemExit(f"{error}\n{FAILED}{hint}") from error

    @staticmethod
    def _configure(command: list[str], toolkit: Toolkit | None) -> None:
        cache = BUILD / "CMakeCache.txt"
        if toolkit is not None and cache.exists():
            compiler = re.search(r"^CMAKE_CUDA_COMPILER:\w+=(.*)$", cache.read_text(), re.MULTILINE)
            if compiler is not None and compiler[1] != toolkit.nvcc:
                shutil.rmtree(BUILD)  # told of another compiler, CMake forgets the other settings
        try:
            subprocess.check_call(command)
        except subprocess.CalledProcessError:
            # A cache written by another Python or CMake (a new venv, an isolated build).
            shutil.rmtree(BUILD, ignore_errors=True)
            subprocess.check_call(command)


class PlatformWheel(bdist_wheel):
    """The binary is bound to libtorch's stable ABI, not to a Python version."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


def description() -> str:
    """README.md for a package index, which shows neither the repository's files nor its pictures:
    without the picture and its caption, and with links only where they lead somewhere."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    text = re.sub(r"!\[[^\]]*\]\([^)]*\)\n\n\*[^*]*\*\n\n", "", text)
    return re.sub(r"\[([^\]]*)\]\((?!https?:)[^)]*\)", r"\1", text)


# Setuptools knows of one library; the other, which is not always there, is built along with it.
extensions = [Extension("ueo_fast._cpu", sources=[])]
if os.environ.get("UEO_FAST_BUILD") == "0":
    extensions = []
if __name__ == "__main__":  # tests import this file
    setup(
        long_description=description(),
        long_description_content_type="text/markdown",
        ext_modules=extensions,
        cmdclass={"build_ext": BuildWithCMake, "bdist_wheel": PlatformWheel},
    )
