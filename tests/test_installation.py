"""`import ueo_fast` works with the binary missing, broken or forced down; info tells the reason."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ueo_fast
from ueo_fast import _extension, backends

PACKAGE = Path(ueo_fast.__file__).parent
LOSS = "import torch; from ueo_fast import *; print(float(ueo_loss(torch.eye(3), {})))"


def run(*arguments, cwd=None, **environment):
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        env=dict(os.environ, **environment),
        cwd=cwd,  # `python -c` and `-m` look for packages there first
        check=False,
    )


@pytest.fixture
def copied(tmp_path):
    """A copy of the package without its binary, found before the installed one."""
    ignore = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(PACKAGE, tmp_path / "ueo_fast", ignore=ignore)
    return tmp_path


def run_copy(copied, *arguments, **environment):
    return run(*arguments, cwd=copied, PYTHONPATH=str(copied), **environment)


def test_missing_binary(copied):
    done = run_copy(copied, "-c", LOSS.format(""))
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == pytest.approx(float(ueo_fast.ueo_loss(torch.eye(3))))
    done = run_copy(copied, "-c", LOSS.format("backend='cpp'"))
    assert (
        "RuntimeError: backend='cpp' cannot run: _cpu.so was not built: pip install" in done.stderr
    )
    done = run_copy(copied, "-m", "ueo_fast.info")
    assert "backend auto       reference on cpu" in done.stdout
    assert "backend cpp        unavailable: _cpu.so was not built" in done.stdout
    assert "instruction set    none: the C++ library is not there" in done.stdout


def test_broken_binary(copied):
    (copied / "ueo_fast" / "_cpu.so").write_bytes(b"not a library")
    done = run_copy(copied, "-m", "ueo_fast.info")
    assert done.returncode == 0, done.stderr
    assert "backend cpp        unavailable: _cpu.so did not load (" in done.stdout
    assert "backend reference  ready" in done.stdout


def test_stale_binary(copied):
    # What an editable install has after `git pull` without a rebuild.
    shutil.copy(PACKAGE / "_cpu.so", copied / "ueo_fast")
    source = copied / "ueo_fast" / "_extension.py"
    source.write_text(
        source.read_text().replace(f"INTERFACE = {_extension.INTERFACE}", "INTERFACE = -1")
    )
    done = run_copy(copied, "-m", "ueo_fast.info")
    assert done.returncode == 0, done.stderr
    assert "unavailable: _cpu.so was built from another version of the sources" in done.stdout


def test_the_binary_names_no_folder_of_the_build_machine():
    binary = (PACKAGE / "_cpu.so").read_bytes()
    assert str(PACKAGE.parent).encode() not in binary
    assert str(Path(torch.__file__).parent).encode() not in binary


def test_nothing_optional_is_imported():
    script = (
        "import sys, ueo_fast; "
        "print([m for m in ('open_clip', 'triton', 'sklearn', 'matplotlib', 'torchvision', "
        "'torchmetrics', 'jsonargparse', 'tqdm') if m in sys.modules])"
    )
    bare = "import sys, torch; " + script.split("; ", 1)[1]
    assert run("-c", script).stdout == run("-c", bare).stdout


def test_info_of_this_installation():
    done = run("-m", "ueo_fast.info")
    assert done.returncode == 0, done.stderr
    lines = dict(line.split("  ", 1) for line in done.stdout.splitlines())
    facts = {name: value.strip() for name, value in lines.items()}
    assert facts["ueo_fast"] == ueo_fast.__version__
    assert facts["backend cpp"] == "ready"
    assert facts["backend auto"] == "cpp on cpu"
    assert facts["instruction set"] in backends.CAPABILITIES
    assert int(facts["threads"]) >= 1


@pytest.mark.parametrize("wanted", backends.CAPABILITIES)
def test_capability_can_be_forced_down(wanted):
    best = backends.CAPABILITIES.index(backends.cpu_capability())
    expected = backends.CAPABILITIES[min(best, backends.CAPABILITIES.index(wanted))]
    done = run("-m", "ueo_fast.info", UEO_FAST_CPU_CAPABILITY=wanted)
    assert f"instruction set    {expected}" in done.stdout
    done = run("-c", LOSS.format(""), UEO_FAST_CPU_CAPABILITY=wanted)
    assert float(done.stdout) == pytest.approx(float(ueo_fast.ueo_loss(torch.eye(3))))


def test_an_unknown_capability_is_reported():
    done = run("-m", "ueo_fast.info", UEO_FAST_CPU_CAPABILITY="sse9")
    assert "(UEO_FAST_CPU_CAPABILITY=sse9 ignored: not one of base, avx2, avx512)" in done.stdout
