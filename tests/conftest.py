"""Fixtures that several test files share."""

from __future__ import annotations

import atexit
import fcntl
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent

# Read when triton.jit decorates a kernel, so before anything imports triton.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# What load_clip remembers of models is of no use to the user who runs the tests.
os.environ["XDG_STATE_HOME"] = tempfile.mkdtemp(prefix="ueo-fast-tests-")
atexit.register(shutil.rmtree, os.environ["XDG_STATE_HOME"], ignore_errors=True)

# Workers share the processors, and so do the processes that their tests start.
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    share = max(1, processors // int(os.environ["PYTEST_XDIST_WORKER_COUNT"]))
    torch.set_num_threads(share)
    os.environ.setdefault("OMP_NUM_THREADS", str(share))

import cuda_host_build  # noqa: E402
from loss_backends import CUDA_HOST, LossBackend, spared_reason  # noqa: E402

from ueo_fast import backends  # noqa: E402

BACKEND_PARAMETERS = ("backend", "gpu_backend")
TIME_SPENT = "the time for the tests was spent"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--only-backend",
        help="run only this backend's tests, and of those without a backend the GPU files'",
    )
    parser.addoption(
        "--until",
        type=float,
        metavar="TIME",
        help="skip tests that start after this time (seconds since 1970)",
    )


def pytest_runtest_setup(item: pytest.Item) -> None:
    until = item.config.getoption("--until")
    if until is not None and time.time() > until:
        pytest.skip(TIME_SPENT)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Tests that found no time have not passed."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    skipped = [] if reporter is None else reporter.stats.get("skipped", [])
    if any(TIME_SPENT in str(report.longrepr) for report in skipped):
        session.exitstatus = pytest.ExitCode.INTERRUPTED


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    wanted = config.getoption("--only-backend")
    if wanted is None:
        return
    chosen, others = [], []
    for item in items:
        parameters = getattr(getattr(item, "callspec", None), "params", {})
        names = [str(parameters[name]) for name in BACKEND_PARAMETERS if name in parameters]
        needs_gpu = "gpu" in item.path.name and wanted == "cuda"
        (chosen if (wanted in names if names else needs_gpu) else others).append(item)
    config.hook.pytest_deselected(items=others)
    items[:] = chosen


@pytest.fixture(autouse=True)
def _loss_backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the ``backend`` of a test known to the library, or skips what it is spared."""
    parameters = getattr(getattr(request.node, "callspec", None), "params", {})
    backend = parameters.get("backend")
    if not isinstance(backend, LossBackend):
        return
    reason = spared_reason(backend, request.node.nodeid, *parameters.values())
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")
    if backend == CUDA_HOST.name:
        monkeypatch.setitem(backends.COMPILED, CUDA_HOST.name, CUDA_HOST)


@pytest.fixture
def without_charts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports without their charts, for tests of the rest: drawing takes most of a page's time."""
    from ueo_fast.finetune.report import page

    for name in ("score_charts", "training_charts"):
        monkeypatch.setattr(page, name, lambda run: [])


@pytest.fixture(scope="session")
def cuda_on_host() -> ModuleType:
    """The pybind11 module that runs the CUDA kernels on the host; built by g++ on first use."""
    return cuda_host_build.cuda_on_host()


@pytest.fixture(scope="session")
def loops() -> ModuleType:
    """The pybind11 module that runs raw CPU kernels; built by CMake on first use."""
    import pybind11

    # Where the library was built: the loops are the same objects, and compiling them again would
    # take half a minute.
    build = ROOT / "build" / "cmake"
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    environment = dict(os.environ, PATH=path)
    configure = [
        *("cmake", "-S", str(ROOT), "-B", str(build), "-GNinja", "-DUEO_FAST_TEST_MODULE=ON"),
        "-UPYTHON_MODULE_EXTENSION",  # pybind11 remembers that of another Python
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
    ]
    build.mkdir(parents=True, exist_ok=True)
    with open(build / "lock", "w") as lock:  # one of pytest's workers builds, the others wait
        fcntl.flock(lock, fcntl.LOCK_EX)
        for command in (configure, ["cmake", "--build", str(build), "--target", "ueo_fast_loops"]):
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    spec = importlib.util.spec_from_file_location(
        "ueo_fast_loops", build / f"ueo_fast_loops{suffix}"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
