"""Fixtures that several test files share."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def loops() -> ModuleType:
    """The pybind11 module that runs raw CPU kernels; built by CMake on first use."""
    import pybind11

    build = ROOT / "build" / f"tests-{sys.implementation.cache_tag}"
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    environment = dict(os.environ, PATH=path)
    configure = [
        *("cmake", "-S", str(ROOT), "-B", str(build), "-GNinja", "-DUEO_FAST_TEST_MODULE=ON"),
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
    ]
    for command in (configure, ["cmake", "--build", str(build), "--target", "ueo_fast_loops"]):
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    (library,) = build.glob("ueo_fast_loops*.so")
    spec = importlib.util.spec_from_file_location("ueo_fast_loops", library)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
