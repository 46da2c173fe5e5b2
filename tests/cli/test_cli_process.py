"""The command as a process: what it imports, its streams, its locale, and Ctrl-C."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from ueo_fast.cli import INTERRUPTED

# Finds the package from another folder, whether it is installed or not.
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join(sys.path),
    "PYTHONUNBUFFERED": "1",
}


SHELL = f"{sys.executable} -m ueo_fast.cli"


def ran(words: Sequence[str], folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """A program that ran in ``folder``, and what it printed."""
    return subprocess.run(
        words,
        cwd=folder,
        env={**ENVIRONMENT, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.skipif(os.name != "posix", reason="pipes are closed differently elsewhere")
def test_a_reader_that_leaves_is_no_error_message(tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    try:
        result = subprocess.run(
            [sys.executable, "-m", "ueo_fast.cli", "--help"],
            cwd=tmp_path,
            env={**ENVIRONMENT, "PYTHONUNBUFFERED": ""},
            stdout=writer,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    finally:
        os.close(writer)
    assert (result.returncode, result.stderr) == (1, "")


@pytest.mark.parametrize("module", ["open_clip", "sklearn"])
def test_a_missing_extra_is_named_with_the_way_out(module, tmp_path):
    """In a fresh process, where nothing has imported the module yet."""
    code = (
        f"import sys; sys.modules[{module!r}] = None\n"
        "from ueo_fast.cli import main\n"
        "sys.exit(main(['demo', '--seeds', '0', '--pretrain-steps', '1', '--epochs', '1']))"
    )
    result = ran([sys.executable, "-c", code], tmp_path)
    assert not list(tmp_path.iterdir())
    assert result.returncode == 1, result.stderr
    assert f"needs the Python package '{module}', which is not installed" in result.stderr
    assert "from a clone of the repository" in result.stderr  # the package is on no index
    assert 'pip install ".[recipe]"' in result.stderr
    assert "make setup" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("words", "status"),
    [
        ("--version", 0),
        ("--help", 0),
        ("dmeo", 2),
        ("info --help", 0),
        ("demo --help", 0),
        ("finetune --help", 0),
        ("finetune --epochs many", 2),
        ("finetune --data photos --classes names.txt --method tent --trade-off 2", 2),
        ("finetune --data photos --classes names.txt --batch-size 1e29", 2),
        ("finetune --data missing --classes names.txt", 1),
        ("finetune --data photos --classes missing.txt", 1),
        ("finetune --data photos --classes names.txt --out names.txt", 2),
        ("finetune --dataset officehome --domain artt --root photos", 2),
        ("finetune --dataset officehome --domain art --root missing", 1),
        ("finetune --data photos --classes names.txt --print_config", 0),
        ("finetune --resume --out missing", 1),
        ("evaluate --run missing", 1),
        ("score --run missing --data photos --out s.csv", 1),
        ("score --run photos --data missing --out s.csv", 1),
        ("score --run photos --data photos --out s.csv --threshold high", 2),
        ("report missing", 1),
        ("compare missing", 1),
    ],
)
def test_what_needs_no_pytorch_does_not_import_it(words, status, tmp_path):
    """In a fresh process; nor the extras, but for Pillow, which knows what an image file is."""
    (tmp_path / "photos").mkdir()
    (tmp_path / "names.txt").write_text("cup\nlamp\n")
    code = (
        "import sys, ueo_fast.cli\n"
        f"status = ueo_fast.cli.main({words.split()!r})\n"
        "heavy = {'torch', 'open_clip', 'sklearn', 'matplotlib', 'torchvision'}\n"
        "sys.exit(f'imported {heavy & set(sys.modules)}' if heavy & set(sys.modules) else status)"
    )
    result = ran([sys.executable, "-c", code], tmp_path)
    assert result.returncode == status, result.stderr
    assert "imported" not in result.stderr
    assert "Traceback" not in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["names.txt", "photos"]


def test_the_public_names_are_there_before_they_are_imported():
    code = (
        "import sys, ueo_fast\n"
        "assert 'torch' not in sys.modules\n"
        "assert set(ueo_fast.__all__) <= set(dir(ueo_fast))\n"
        "assert not hasattr(ueo_fast, 'ueo_los')\n"
        "from ueo_fast import *\n"
        "import torch\n"
        "assert ueo_loss is ueo_fast.ueo_loss is ueo_fast.functional.ueo_loss\n"
        "assert all(getattr(ueo_fast, name).__name__ == name for name in ueo_fast.__all__)\n"
        "assert ueo_fast.reference.ueo_loss\n"
        "assert hasattr(torch.ops.ueo_fast, 'ueo_loss_forward')"
    )
    subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, check=True)


def test_the_operators_are_registered_at_once_where_pytorch_is_there():
    """What loading an exported program needs, which names nothing of the package."""
    code = "import torch, ueo_fast; assert hasattr(torch.ops.ueo_fast, 'ueo_loss_forward')"
    subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, check=True)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux's full device")
@pytest.mark.parametrize(
    ("line", "status", "error"),
    [
        (f"{SHELL} --version >&- 2>&- <&-", 0, ""),
        (f"{SHELL} dmeo >&- 2>&- <&-", 2, ""),
        (f"{SHELL} demo --epochs 0 2>&-", 2, ""),
        (f"{SHELL} --help >/dev/full", 1, "No space left on device: 'standard output'"),
        (f"{SHELL} demo --help >/dev/full", 1, "No space left on device: 'standard output'"),
        (f"{SHELL} dmeo 2>/dev/full", 2, ""),
        (f"{SHELL} demo --epochs 0 2>/dev/full", 2, ""),
        (f"{SHELL} --help >/dev/full 2>/dev/full", 1, ""),
    ],
)
def test_streams_that_are_closed_or_full(line, status, error, tmp_path):
    result = ran(["sh", "-c", line], tmp_path, PYTHONUNBUFFERED="")
    assert result.returncode == status, result.stderr
    assert error in result.stderr
    assert result.stderr.count("\n") == (1 if error else 0)
    assert "Traceback" not in result.stderr


@pytest.mark.skipif(os.name != "posix", reason="descriptors are closed differently elsewhere")
def test_a_file_never_gets_the_number_of_a_closed_stream(tmp_path):
    """Else what a library prints to standard error would be written into it."""
    code = (
        "import os, sys, ueo_fast.cli\n"
        "ueo_fast.cli.main(['--version'])\n"
        "sys.exit(os.open('x', os.O_CREAT | os.O_WRONLY))"
    )
    line = f'{sys.executable} -c "{code}" >&- 2>&- <&-'
    number = subprocess.run(["sh", "-c", line], cwd=tmp_path, env=ENVIRONMENT, check=False)
    assert number.returncode > 2


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere names of files are Unicode")
def test_an_ascii_locale_finds_files_with_other_names(tmp_path):
    (tmp_path / "größe").mkdir()
    (tmp_path / "größe" / "mine").touch()
    (tmp_path / "c.yaml").write_text("{data: d, classes: c, out: größe}", encoding="utf-8")
    ascii_only = {
        "LC_ALL": "C",
        "PYTHONIOENCODING": "ascii",
        "PYTHONUTF8": "0",
        "PYTHONCOERCECLOCALE": "0",
    }
    words = [sys.executable, "-m", "ueo_fast.cli", "finetune", "--config", "c.yaml"]
    result = ran(words, tmp_path, **ascii_only)
    assert result.returncode == 2, result.stderr
    assert "gr??e is not empty" in result.stderr


@pytest.mark.skipif(os.name != "posix", reason="sends a POSIX signal")
def test_ctrl_c_exits_with_130_and_no_traceback(tmp_path):
    # A shell script that starts tests in the background has SIGINT ignored, and children inherit
    # that: the child asks for Python's handler itself.
    script = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from ueo_fast.cli import main; sys.exit(main())"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, "demo", "--pretrain-steps", "2000"],
        cwd=tmp_path,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        first_line = process.stdout.readline()
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert "tiny CLIP (bn)" in first_line
    assert process.returncode == INTERRUPTED
    assert "interrupted" in errors
    assert "Traceback" not in errors
    (run,) = (tmp_path / "runs").iterdir()
    assert (run / "config.json").is_file()
