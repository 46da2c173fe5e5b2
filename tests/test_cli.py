"""The command line: help, errors, exit codes, and imports only where they are needed."""

from __future__ import annotations

import errno
import io
import json
import os
import signal
import subprocess
import sys
import types
from dataclasses import fields

import pytest

import ueo_fast
from ueo_fast.cli import INTERRUPTED, main
from ueo_fast.finetune.demo import run as demo_run
from ueo_fast.finetune.demo.config import DemoConfig
from ueo_fast.finetune.engine.trainer import NonFiniteLossError

# Finds the package from another folder, whether it is installed or not.
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join(sys.path),
    "PYTHONUNBUFFERED": "1",
}


@pytest.fixture
def configs(monkeypatch) -> list[DemoConfig]:
    """Replaces the demonstration by a list of the configs that it was asked for."""
    seen: list[DemoConfig] = []
    monkeypatch.setattr(demo_run, "run_demo", seen.append)
    return seen


def test_usage_lists_the_commands(capsys):
    assert main(["--help"]) == 0
    usage = capsys.readouterr().out
    assert "usage: ueo-fast COMMAND" in usage
    assert "demo" in usage
    assert "info" in usage
    assert main([]) == 2
    assert main(["--version"]) == 0
    assert ueo_fast.__version__ in capsys.readouterr().out


def test_unknown_command_names_the_choices(capsys):
    assert main(["dmeo"]) == 2
    assert (
        "no command 'dmeo': choose one of demo, finetune, evaluate, score, report, compare, info"
        in capsys.readouterr().err
    )


def test_demo_help_explains_every_option(capsys):
    assert main(["demo", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for field in fields(DemoConfig):
        assert "--" + field.name.replace("_", "-") in text
        assert field.metadata["help"].split(";")[0][:40] in text
    for option in ("--config", "--print_config", "{bn,vit}", "{CSDA,CDA,PDA,ODA,OPDA}"):
        assert option in text


def test_flags_become_the_config(configs):
    words = "demo --tower vit --shift noise --scenario ODA --seeds 3 4 --out x --affine-lr 0.5"
    assert main(words.split()) == 0
    assert main(["demo"]) == 0
    expected = DemoConfig(
        tower="vit", shift="noise", scenario="ODA", seeds=(3, 4), out="x", affine_lr=0.5
    )
    assert configs == [expected, DemoConfig()]


@pytest.mark.parametrize(
    ("words", "value"),
    [
        ("", True),
        ("--patch", True),
        ("--patch true", True),
        ("--patch false", False),
        ("--no-patch", False),
        ("--no-patch --patch", True),
    ],
)
def test_a_switch_needs_no_value_and_takes_one(configs, words, value):
    assert main(["demo", *words.split()]) == 0
    assert configs == [DemoConfig(patch=value)]


def test_a_saved_config_is_read_back(configs, tmp_path, capsys):
    wanted = DemoConfig(tower="vit", seeds=(8, 9), severity=0.25, epochs=3)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(wanted.as_dict()))
    assert main(["demo", "--config", str(path)]) == 0
    assert main(["demo", "--config", str(path), "--epochs", "4"]) == 0
    assert configs[0] == wanted
    assert configs[1].epochs == 4
    assert main(["demo", "--config", str(path), "--print_config"]) == 0
    printed = capsys.readouterr().out
    (tmp_path / "printed.yaml").write_text(printed)
    assert main(["demo", "--config", str(tmp_path / "printed.yaml")]) == 0
    assert configs[2] == wanted


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--tower mlp", "Got value: mlp"),
        ("--seeds", "expected at least one argument"),
        ("--severity 3", "severity must lie in [0, 1], got 3.0"),
        ("--epochs 0", "epochs must be at least 1, got 0"),
        ("--wrong 1", "--wrong"),
        ("--eps=-1", "eps must be finite and not negative, got -1.0"),
        ("--seeds -1", "seeds must lie in 0..2**63-1, got -1"),
        ("--out=", "out is empty: name a folder"),
    ],
)
def test_wrong_options_exit_with_2_and_a_reason(configs, capsys, words, message):
    assert main(["demo", *words.split()]) == 2
    assert message in capsys.readouterr().err
    assert configs == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--epochs many", "--epochs: expected a whole number. Got value: many"),
        ("--method uoe", "--method: expected one of zeroshot, ueo, infomax"),
        ("--early-stop soon", "--early-stop: expected a whole number. Got value: soon"),
        ("--affine-lr nan", "--affine-lr: expected a finite number"),
        ("--wrong 1", "unrecognized arguments: --wrong 1"),
    ],
)
def test_a_wrong_option_is_told_in_two_lines_of_plain_words(capsys, words, message):
    assert main(["finetune", *words.split()]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert message in first
    assert second == "(ueo-fast finetune --help explains)"


def test_a_folder_with_content_is_refused(tmp_path, capsys):
    (tmp_path / "results.md").write_text("mine")
    assert main(["demo", "--out", str(tmp_path)]) == 2
    assert "is not empty, and nothing is overwritten" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["results.md"]


@pytest.mark.parametrize(
    "error",
    [
        PermissionError(errno.EACCES, "Permission denied", "runs"),
        OSError(errno.ENOSPC, "No space left on device"),
        NonFiniteLossError("the loss became nan at step 2 of 6"),
    ],
)
def test_what_stops_a_run_is_said_in_one_line(monkeypatch, capsys, error):
    def fails(config):
        raise error

    monkeypatch.setattr(demo_run, "run_demo", fails)
    assert main(["demo"]) == 1
    assert capsys.readouterr().err == f"ueo-fast demo: {error}\n"


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


def test_a_broken_pipe_in_the_demonstration_is_not_reported_either(monkeypatch, capfd):
    def fails(config):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr(demo_run, "run_demo", fails)
    monkeypatch.setattr(sys, "stdout", io.StringIO())  # without a file descriptor to redirect
    assert main(["demo"]) == 1
    assert capfd.readouterr().err == ""


def test_an_ascii_terminal_does_not_stop_a_run(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    monkeypatch.setattr(demo_run, "run_demo", lambda config: print("90.1 ± 3.9"))
    assert main(["demo"]) == 0
    assert raw.getvalue() == b"90.1 ? 3.9\n"


@pytest.mark.parametrize("module", ["jsonargparse", "open_clip", "sklearn"])
def test_a_missing_extra_is_named_with_the_way_out(module, tmp_path):
    """In a fresh process, where nothing has imported the module yet."""
    code = (
        f"import sys; sys.modules[{module!r}] = None\n"
        "from ueo_fast.cli import main\n"
        "sys.exit(main(['demo', '--seeds', '0', '--pretrain-steps', '1', '--epochs', '1']))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert not list(tmp_path.iterdir())
    assert result.returncode == 1, result.stderr
    assert f"needs the module '{module}', which is not installed" in result.stderr
    assert "In a clone of the repository" in result.stderr  # the package is on no index
    assert 'pip install ".[recipe]"' in result.stderr
    assert "make setup" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_bug_in_the_package_is_not_called_a_missing_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "ueo_fast.finetune.demo.config", None)
    with pytest.raises(ModuleNotFoundError, match=r"ueo_fast\.finetune\.demo\.config"):
        main(["demo"])


def test_info_needs_no_extra(monkeypatch, capsys):
    info = types.ModuleType("ueo_fast.info")
    info.main = lambda: print("all is well")
    monkeypatch.setitem(sys.modules, "ueo_fast.info", info)
    for module in ("jsonargparse", "open_clip", "sklearn", "matplotlib", "tqdm"):
        monkeypatch.setitem(sys.modules, module, None)
    assert main(["info"]) == 0
    assert capsys.readouterr().out == "all is well\n"
    assert main(["info", "--all"]) == 2
    assert "takes no options, got '--all'" in capsys.readouterr().err


def test_importing_the_command_line_imports_no_extra():
    code = (
        "import sys, ueo_fast.cli\n"
        "extras = {'jsonargparse', 'open_clip', 'sklearn', 'matplotlib', 'torchmetrics'}\n"
        "print(sorted(extras & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


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
