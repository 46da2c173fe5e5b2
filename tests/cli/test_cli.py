"""The command line: help, errors, exit codes, and imports only where they are needed."""

from __future__ import annotations

import errno
import io
import json
import signal
import sys
import types

import pytest
import torch

import ueo_fast
from ueo_fast.cli import commands, main
from ueo_fast.finetune.commands.finetune_config import FinetuneConfig
from ueo_fast.finetune.commands.options import (
    CompareConfig,
    EvaluateConfig,
    ReportConfig,
    ScoreConfig,
)
from ueo_fast.finetune.declared_options import GROUPS, options_of
from ueo_fast.finetune.demo import run as demo_run
from ueo_fast.finetune.demo.config import DemoConfig
from ueo_fast.finetune.engine.trainer import NonFiniteLossError


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


@pytest.mark.parametrize(
    "config", [DemoConfig, FinetuneConfig, EvaluateConfig, ScoreConfig, ReportConfig, CompareConfig]
)
def test_help_explains_every_option(config, capsys):
    """With what its dataclass, or the part of it, says in its docstring."""
    command = config.__name__.removesuffix("Config").lower()
    assert main([command, "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split()).replace("- ", "-")  # broken at a hyphen
    for name, option in options_of(config).items():
        assert "--" + name.replace("_", "-") in text
        assert len(option.help) > 5
        assert option.help.split(";")[0][:40].replace("- ", "-") in text
        assert "``" not in option.help
    for flag in ("--config", "--print_config"):
        assert flag in text


def test_help_is_grouped(capsys):
    assert main(["finetune", "--help"]) == 0
    text = capsys.readouterr().out
    places = [text.index(f"\n{group}:\n") for group in GROUPS]
    assert places == sorted(places)
    groups = dict(zip(GROUPS, map(slice, places, [*places[1:], None]), strict=True))
    for group, flags in {
        "data": ("--data ", "--classes", "--dataset", "--decode", "--strict"),
        "model": ("--model", "--pretrained", "--prompt-template"),
        "method": ("--method", "--mcm-scale", "--top-k"),
        "training": ("--epochs", "--batch-size", "--seed", "--early-stop"),
        "speed": ("--device", "--workers", "--precision", "--patch", "--micro-batch-size"),
        "output": ("--out ", "--resume", "--eval-every", "--wandb"),
    }.items():
        for flag in flags:
            assert f"\n  {flag}" in text[groups[group]]
    assert main(["demo", "--help"]) == 0
    text = capsys.readouterr().out
    for option in ("{bn,vit}", "{CSDA,CDA,PDA,ODA,OPDA}", *(f"\n{group}:\n" for group in GROUPS)):
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
        ("--tower mlp", "--tower: expected one of bn, vit, got 'mlp'"),
        ("--seeds", "expected at least one argument"),
        ("--severity 3", "severity must lie in [0, 1], got 3.0"),
        ("--epochs 0", "epochs must be at least 1, got 0"),
        ("--wrong 1", "--wrong"),
        ("--eps=-1", "eps must be 0 or from 1e-30 to 1e+30, got -1.0"),
        ("--seeds -1", "seeds must be at least 0, got -1"),
        ("--out=", "--out: expected a text that is not empty, got ''"),
    ],
)
def test_wrong_options_exit_with_2_and_a_reason(configs, capsys, words, message):
    assert main(["demo", *words.split()]) == 2
    assert message in capsys.readouterr().err
    assert configs == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--epochs many", "--epochs: expected a whole number, got 'many'"),
        ("--method uoe", "--method: expected one of zeroshot, ueo, infomax"),
        ("--early-stop soon", "--early-stop: expected a whole number, got 'soon'"),
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
    ("error", "message"),
    [
        (
            PermissionError(errno.EACCES, "Permission denied", "runs"),
            "Permission denied: 'runs'",
        ),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (
            NonFiniteLossError("the loss became nan at step 2 of 6"),
            "the loss became nan at step 2 of 6",
        ),
    ],
    ids=["denied", "full", "diverged"],
)
def test_what_stops_a_run_is_said_in_one_line(monkeypatch, capsys, error, message):
    def fails(config):
        raise error

    monkeypatch.setattr(demo_run, "run_demo", fails)
    assert main(["demo"]) == 1
    assert capsys.readouterr().err == f"ueo-fast demo: {message}\n"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried\nmore"), "out of device memory: CUDA"),
        (MemoryError(), "out of memory\n"),
        (MemoryError("Unable to allocate 9 GiB"), "out of memory: Unable to allocate 9 GiB\n"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate"), "out of memory: "),
    ],
    ids=["device", "python", "numpy", "torch"],
)
def test_too_little_memory_is_said_with_the_way_out(monkeypatch, capsys, error, message):
    def fails(config):
        raise error

    monkeypatch.setattr(demo_run, "run_demo", fails)
    assert main(["demo"]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"ueo-fast demo: {message}")
    assert "--batch-size" in said


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


def test_a_bug_in_the_package_is_not_called_a_missing_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "ueo_fast.finetune.demo.config", None)
    with pytest.raises(ModuleNotFoundError, match=r"ueo_fast\.finetune\.demo\.config"):
        main(["demo"])


def test_info_needs_no_extra(monkeypatch, capsys):
    info = types.ModuleType("ueo_fast.info")
    info.main = lambda: print("all is well")
    monkeypatch.setitem(sys.modules, "ueo_fast.info", info)
    for module in ("yaml", "open_clip", "sklearn", "matplotlib", "tqdm"):
        monkeypatch.setitem(sys.modules, module, None)
    assert main(["info"]) == 0
    assert capsys.readouterr().out == "all is well\n"
    assert main(["info", "--all"]) == 2
    assert "takes no options, got '--all'" in capsys.readouterr().err


def test_a_name_that_the_locale_cannot_spell_is_said_with_the_way_out(monkeypatch, capsys):
    def fails(config):
        raise UnicodeEncodeError(sys.getfilesystemencoding(), "größe.jpg", 2, 3, "not in range")

    monkeypatch.setattr(demo_run, "run_demo", fails)
    assert main(["demo"]) == 1
    said = capsys.readouterr().err
    assert "'größe.jpg' cannot be a file name" in said
    assert "PYTHONUTF8=1" in said


def test_ctrl_c_ends_the_process_while_a_command_is_imported(monkeypatch):
    seen = []

    def load(path):
        seen.append(signal.getsignal(signal.SIGINT))
        return lambda config: seen.append(signal.getsignal(signal.SIGINT))

    command = commands.COMMANDS["demo"]
    config = commands._load(command.config)
    monkeypatch.setattr(commands, "_load", lambda path: config if "Config" in path else load(path))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        command.prepared([])()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert seen == [signal.SIG_DFL, signal.default_int_handler]
