"""`import ueo_fast` works with the binary missing, broken or forced down; info tells the reason."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import setup_script
import torch
from setuptools import Distribution, Extension

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
    """A copy of the package without its binaries, found before the installed one."""
    ignore = shutil.ignore_patterns("*.so", "_cuda.json", "__pycache__")
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
    assert "instruction set    none: the C++ library could not be loaded" in done.stdout


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


# ---- The CUDA library: it is loaded only where it can work, and says why where it cannot --------

FOR_CUDA_13 = "import torch; torch.version.cuda = '13.2'"
# As if `_cuda.so` held the op of an older version, and nothing else.
WITH_OLD_CUDA_SO = (
    FOR_CUDA_13
    + """
load = torch.ops.load_library
def load_library(path):
    if path.endswith("_cuda.so"):
        op = "ueo_fast::cuda_interface_number"
        torch.library.impl(op, "CompositeExplicitAutograd")(lambda: -1)
    else:
        load(path)
torch.ops.load_library = load_library
"""
)


def put_cuda(copied, toolkit="13.0", library=b"not a library"):
    """A build for CUDA ``toolkit`` whose library breaks as soon as somebody loads it."""
    package = copied / "ueo_fast"
    shutil.copy(PACKAGE / "_cpu.so", package)
    (package / "_cuda.so").write_bytes(library)
    (package / "_cuda.json").write_text(json.dumps({"cuda": toolkit, "architectures": "80 90"}))


def cuda_facts(copied, preparation="import torch"):
    """(what is said of the CUDA library, of the backend) after what is done to torch."""
    script = f"{preparation}\nfrom ueo_fast import info; raise SystemExit(info.main())"
    done = run_copy(copied, "-c", script)
    assert done.returncode == 0, done.stderr
    lines = dict(line.split("  ", 1) for line in done.stdout.splitlines())
    assert lines["backend cpp"].strip() == "ready"
    return lines["CUDA library"].strip(), lines["backend cuda"].strip()


def test_cuda_library_not_built(copied):
    shutil.copy(PACKAGE / "_cpu.so", copied / "ueo_fast")
    library, backend = cuda_facts(copied)
    assert library == "not built"
    assert backend.startswith("unavailable: _cuda.so was not built (an in-place build needs nvcc")
    done = run_copy(copied, "-c", LOSS.format("backend='cuda'"))
    assert "RuntimeError: backend='cuda' cannot run: _cuda.so was not built" in done.stderr


def test_cuda_library_of_another_major_is_not_even_loaded(copied):
    put_cuda(copied, toolkit="12.9")
    library, backend = cuda_facts(copied, FOR_CUDA_13)
    assert library == "built with CUDA 12.9 for 80 90"
    assert backend.startswith(
        "unavailable: _cuda.so was built for CUDA 12.9, torch for CUDA 13.2: "
        "rebuild it with a CUDA 13 toolkit: pip install"
    )


def test_broken_cuda_library(copied):
    put_cuda(copied)
    _, backend = cuda_facts(copied, FOR_CUDA_13)
    assert backend.startswith("unavailable: _cuda.so did not load (")


def test_stale_cuda_library(copied):
    put_cuda(copied)
    _, backend = cuda_facts(copied, WITH_OLD_CUDA_SO)
    assert "unavailable: _cuda.so was built from another version of the sources" in backend


@pytest.fixture
def cuda_reason(copied, monkeypatch):
    """Why the CUDA library of the copy is not loaded, asked in this process."""

    def reason():
        monkeypatch.setattr(_extension, "_FOLDER", copied / "ueo_fast")
        monkeypatch.setattr(_extension, "cuda_build", _extension._cuda_build())
        return _extension._load_cuda()

    return reason


def test_cuda_library_lost(copied, cuda_reason, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.2")
    put_cuda(copied)
    (copied / "ueo_fast" / "_cuda.so").unlink()
    assert cuda_reason().startswith("_cuda.so was not built: pip install")


def test_cuda_library_with_a_torch_without_cuda(copied, cuda_reason, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    put_cuda(copied)
    assert cuda_reason() == (
        f"_cuda.so was built for CUDA 13.0, torch {torch.__version__} without CUDA"
    )


def test_cuda_library_without_the_other(copied, cuda_reason, monkeypatch):
    monkeypatch.setattr(_extension, "cpu_error", "_cpu.so was not built")
    put_cuda(copied)
    assert cuda_reason() == "it needs _cpu.so: _cpu.so was not built"


@pytest.fixture
def built_with_cuda():
    if not _extension.cuda_build:
        pytest.skip("_cuda.so was not built")


@pytest.mark.usefixtures("built_with_cuda")
def test_the_cuda_library_loads_without_a_gpu():
    assert _extension.cuda_error is None
    done = run("-m", "ueo_fast.info", CUDA_VISIBLE_DEVICES="")
    assert "backend cuda       unavailable: no GPU is present that torch can use" in done.stdout
    assert "backend auto       cpp on cpu" in done.stdout


@pytest.mark.usefixtures("built_with_cuda")
def test_backend_cuda_refuses_cpu_tensors():
    with pytest.raises(ValueError, match=r"move with logits.cuda\(\), or use backend='auto'"):
        ueo_fast.ueo_loss(torch.eye(3), backend="cuda")


@pytest.mark.parametrize("name", ["_cpu.so", "_cuda.so"])
def test_the_binary_names_no_folder_of_the_build_machine(name):
    if name == "_cuda.so" and not _extension.cuda_build:
        pytest.skip("_cuda.so was not built")
    binary = (PACKAGE / name).read_bytes()
    assert str(PACKAGE.parent).encode() not in binary
    assert str(Path(torch.__file__).parent).encode() not in binary


# ---- CUDA=auto|0|1: what setup.py decides --------------------------------------------------------


def put_nvcc(home, version="13.0", lives_in=None):
    """An nvcc that tells what the real one tells of itself; a wrapper script with ``lives_in``."""
    nvcc = home / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True, exist_ok=True)
    major, minor = version.split(".")
    nvcc.write_text(
        "#!/bin/sh\n"
        f"echo '#$ _HERE_={(lives_in or home) / 'bin'}' >&2\n"
        f"echo '#$ gcc -D__CUDACC_VER_MAJOR__={major} -D__CUDACC_VER_MINOR__={minor}' >&2\n"
    )
    nvcc.chmod(0o755)
    return str(nvcc)


@pytest.fixture
def script(monkeypatch, tmp_path):
    """setup.py on a machine whose usual folders hold no CUDA toolkit."""
    module = setup_script.load()
    monkeypatch.setattr(module, "USUAL_CUDA_HOME", str(tmp_path / "usual"))
    return module


def test_cuda_0_leaves_it_out(script, tmp_path):
    nvcc = put_nvcc(tmp_path / "a")
    assert script.choose_cuda({"CUDA": "0", "CUDACXX": nvcc}, "13.2") == "CUDA=0"


@pytest.mark.parametrize("value", ["yes", "13.0", "/usr/local/cuda"])
def test_an_unknown_choice_is_refused(script, value):
    with pytest.raises(SystemExit, match=rf"CUDA='{value}' is unknown: choose auto .*, 0 .* or 1"):
        script.choose_cuda({"CUDA": value}, "13.2")


@pytest.mark.parametrize("choice", [{}, {"CUDA": ""}, {"CUDA": "auto"}, {"CUDA": "1"}])
def test_a_toolkit_of_torchs_major_is_taken(script, tmp_path, choice):
    nvcc = put_nvcc(tmp_path / "a", "13.0")
    assert script.choose_cuda({"CUDACXX": nvcc, **choice}, "13.2") == (nvcc, "13.0")


@pytest.mark.parametrize(
    ("variables", "torch_cuda", "reason", "remedy"),
    [
        ({}, "13.2", "no nvcc in CUDA_HOME, CUDA_PATH, PATH or ", "install a CUDA 13 toolkit, or"),
        ({"CUDACXX": "/bin/false"}, "13.2", "CUDACXX=/bin/false is not an nvcc", "set it to the"),
        ({"CUDACXX": "{old}"}, "13.2", "{old} is of CUDA 12.9, torch is built for 13.2", "CUDACXX"),
        ({"CUDACXX": "{old}"}, None, "the installed torch is built without CUDA", "pytorch.org"),
    ],
)
def test_why_it_cannot_be_built(script, tmp_path, variables, torch_cuda, reason, remedy):
    old = put_nvcc(tmp_path / "old", "12.9")
    variables = {name: value.format(old=old) for name, value in variables.items()}
    reason = reason.format(old=old)
    assert script.choose_cuda(variables, torch_cuda).startswith(reason)
    with pytest.raises(SystemExit) as error:
        script.choose_cuda({"CUDA": "1", **variables}, torch_cuda)
    assert str(error.value).startswith(f"CUDA=1, but {reason}")
    assert remedy in str(error.value)
    assert str(error.value).endswith("or build without: CUDA=0")


def test_where_nvcc_is_looked_for(script, tmp_path):
    usual, on_path, home, said = (
        put_nvcc(tmp_path / name, f"13.{minor}")
        for minor, name in enumerate(("usual", "on_path", "home", "said"))
    )
    environment: dict[str, str] = {}
    for nvcc, variable in (
        (usual, {}),
        (on_path, {"PATH": str(Path(on_path).parent)}),
        (home, {"CUDA_PATH": str(Path(home).parent.parent)}),
        (home, {"CUDA_HOME": str(Path(home).parent.parent), "CUDA_PATH": "/nowhere"}),
        (said, {"CUDACXX": said}),
    ):
        environment.update(variable)
        assert script.find_toolkit(environment).nvcc == nvcc
    environment["CUDACXX"] = "/nowhere"
    assert script.find_toolkit(environment) is None, "CUDACXX is meant"


def test_a_wrapper_script_is_not_the_toolkit(script, tmp_path):
    nvcc = put_nvcc(tmp_path / "toolkit")
    wrapper = put_nvcc(tmp_path / "local", lives_in=tmp_path / "toolkit")
    link = tmp_path / "link"
    link.symlink_to(wrapper)
    for found in (wrapper, str(link)):
        assert script.toolkit_of(found).nvcc == nvcc


ALL = "what CMakeLists.txt names"


@pytest.mark.parametrize(
    ("driver", "environment", "in_place", "architectures"),
    [
        ("9.0", {}, True, "90-real"),
        ("9.0\n8.0\n9.0", {}, True, "80-real;90-real"),
        ("7.5\n8.6", {}, True, "86-real"),
        ("12.0", {}, True, "120-real"),
        ("7.5", {}, True, None),
        ("NVIDIA-SMI has failed", {}, True, None),
        (None, {}, True, None),
        (None, {"CUDA": "1"}, True, ALL),
        (None, {}, False, ALL),
        ("9.0", {"CUDA": "1"}, True, ALL),
        (None, {"UEO_FAST_CUDA_ARCHITECTURES": "90"}, True, "90"),
        ("8.0", {"UEO_FAST_CUDA_ARCHITECTURES": "90"}, False, "90"),
    ],
)
def test_an_in_place_build_compiles_for_the_gpus_of_this_machine(
    script, tmp_path, monkeypatch, driver, environment, in_place, architectures
):
    tools = tmp_path / "tools"
    tools.mkdir()
    if driver is not None:
        (tools / "nvidia-smi").write_text(f"#!/bin/sh\nprintf '{driver}\\n'\n")
        (tools / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:/bin")
    monkeypatch.setattr(script, "torch_cuda_version", lambda: "13.2")
    nvcc = put_nvcc(tmp_path / "toolkit")
    build = script.cuda_of_this_build({"CUDACXX": nvcc, **environment}, in_place)
    if architectures is None:
        assert "no GPU" in build
        assert "CUDA=1" in build
    else:
        assert build.toolkit.nvcc == nvcc
        assert build.architectures == ("" if architectures is ALL else architectures)


@pytest.mark.parametrize(
    ("options", "in_place"),
    [({"inplace": 1}, True), ({"editable_mode": True}, True), ({}, False)],
    ids=["setup.py build_ext --inplace", "pip install -e", "wheel"],
)
def test_which_builds_serve_this_machine_alone(script, tmp_path, monkeypatch, options, in_place):
    class AskedError(Exception):
        pass

    def cuda_of_this_build(environment, in_place):
        raise AskedError(in_place)

    monkeypatch.setattr(script, "cuda_of_this_build", cuda_of_this_build)
    monkeypatch.chdir(tmp_path)
    distribution = Distribution({"name": "x", "ext_modules": [Extension("x", sources=[])]})
    command = script.BuildWithCMake(distribution)
    command.build_lib = command.build_temp = str(tmp_path)
    for name, value in options.items():
        setattr(command, name, value)
    command.ensure_finalized()
    with pytest.raises(AskedError) as asked:
        command.run()
    assert asked.value.args == (in_place,)


def test_what_torch_was_built_for_is_known_without_importing_it():
    assert setup_script.load().torch_cuda_version() == torch.version.cuda


# ---- The rest -----------------------------------------------------------------------------------


def test_nothing_optional_is_imported():
    script = (
        "print([m for m in ('open_clip', 'triton', 'sklearn', 'matplotlib', 'torchvision', 'yaml', "
        "'tqdm') if m in sys.modules])"
    )
    ours = run("-c", f"import sys; from ueo_fast import *; {script}")
    assert ours.stdout == run("-c", f"import sys, torch; {script}").stdout


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
    script = f"from ueo_fast import info; info.main(); {LOSS.format('')}"
    *facts, loss = run("-c", script, UEO_FAST_CPU_CAPABILITY=wanted).stdout.splitlines()
    assert f"instruction set    {expected}" in "\n".join(facts)
    assert float(loss) == pytest.approx(float(ueo_fast.ueo_loss(torch.eye(3))))


def test_an_unknown_capability_is_reported():
    done = run("-m", "ueo_fast.info", UEO_FAST_CPU_CAPABILITY="sse9")
    assert "(UEO_FAST_CPU_CAPABILITY=sse9 ignored: not one of base, avx2, avx512)" in done.stdout


@pytest.mark.parametrize(
    ("capability", "error"),
    [
        ((7, 5), "it needs a GPU of compute capability 8.0 or newer, cuda:0 has 7.5"),
        ((8, 0), None),
        ((8, 6), None),  # which runs the machine code for 8.0, as 8.9 does
        ((8, 9), None),
        ((12, 1), None),
    ],
)
def test_gpus_from_8_0_on_are_accepted(monkeypatch, capability, error):
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    assert backends._device_error.__wrapped__("cuda", 0) == error
