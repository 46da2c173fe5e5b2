"""A shared model, run or delta: its code never runs, and it opens nothing that is not known here.

The attacks of SECURITY.md, one test per way in. A stand-in for transformers runs the Python file of
a tokenizer exactly where the real one would.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import sys
import types
from pathlib import Path
from typing import Any

import pytest

open_clip = pytest.importorskip("open_clip")

from commands_place import finetune  # noqa: E402
from delta_problem import disturb, zero_shot  # noqa: E402
from photo_folder import KNOWN, photo_folder  # noqa: E402
from tiny_model_folder import save_tiny_clip, tiny_model_cfg  # noqa: E402

from ueo_fast.cli import main  # noqa: E402
from ueo_fast.finetune.clip import base_model  # noqa: E402
from ueo_fast.finetune.clip import load as load_module  # noqa: E402
from ueo_fast.finetune.clip import weights as weights_module  # noqa: E402
from ueo_fast.finetune.clip.base_model import BaseModel, describe_base  # noqa: E402
from ueo_fast.finetune.clip.delta import (  # noqa: E402
    DeltaError,
    load_delta,
    read_delta,
    save_delta,
)
from ueo_fast.finetune.clip.load import load_base, load_clip, load_tokenizer  # noqa: E402
from ueo_fast.finetune.demo.tiny_clip import tiny_clip, tiny_tokenizer  # noqa: E402
from ueo_fast.finetune.files.run_files import BASE_MODEL  # noqa: E402

REMOTE = {"hf_tokenizer_name": "a/b", "tokenizer_kwargs": {"trust_remote_code": True}}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, photographs and a run of somebody who works on this machine."""
    place = tmp_path_factory.mktemp("place")
    save_tiny_clip(place / "model", seed=3)
    photo_folder(place / "photos")
    (place / "names.txt").write_text("\n".join(KNOWN) + "\n")
    assert finetune(place, "run", "--epochs", "1") == 0
    return place


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that has loaded no model yet."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "another machine"))


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The Python files that the stand-in for transformers has run."""
    ran: list[str] = []

    class AutoTokenizer:
        @staticmethod
        def from_pretrained(source: Any, **options: Any) -> Any:
            if options.get("trust_remote_code"):
                ran.append(str(source))
            elif "trust_remote_code" not in options:
                raise AssertionError("a terminal would be asked whether to run the code")
            return lambda texts, **_: types.SimpleNamespace(input_ids=None)

    module = types.ModuleType("transformers")
    module.AutoTokenizer = AutoTokenizer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "transformers", module)
    return ran


@pytest.fixture
def untouched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing may be opened or downloaded: the refusal comes first."""

    def touched(*arguments: Any, **_: Any) -> None:
        raise AssertionError(f"was used: {arguments}")

    monkeypatch.setattr(load_module, "find_source", touched)
    monkeypatch.setattr(load_module, "text_config", touched)
    forbid_network(monkeypatch)


def forbid_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(*arguments: Any, **_: Any) -> str:
        raise AssertionError(f"the network was asked: {arguments}")

    monkeypatch.setattr(weights_module, "unreachable", asked)
    monkeypatch.setattr(weights_module, "download_pretrained_from_hf", asked)
    monkeypatch.setattr(open_clip, "download_pretrained", asked)


def with_text(folder: Path, **text: Any) -> Path:
    """Set options of the text tower in a model folder's config."""
    path = folder / base_model.CONFIG
    config = json.loads(path.read_text())
    config["model_cfg"]["text_cfg"] |= text
    path.write_text(json.dumps(config))
    return folder


def renamed(run: Path, copy: Path, name: str, pretrained: str | None = None) -> Path:
    """The run as an attacker shares it: whole, but of a model of his choice."""
    shutil.copytree(run, copy)
    delta = read_delta(copy / "delta.safetensors")
    base = dataclasses.replace(delta.base, name=name, pretrained=pretrained)
    adapted = load_delta(tiny_clip("bn", 3), run / "delta.safetensors", tokenizer=tiny_tokenizer())
    save_delta(copy / "delta.safetensors", adapted, base, method=delta.method, seed=delta.seed)
    (copy / BASE_MODEL).write_text(json.dumps(dataclasses.asdict(base)))
    config = json.loads((copy / "config.json").read_text())
    config |= {"model": name.removeprefix("local-dir:"), "pretrained": pretrained}
    (copy / "config.json").write_text(json.dumps(config))
    return copy


def use(command: str, place: Path, run: Path, *more: str) -> int:
    """The exit status of a command on a shared run."""
    if command == "resume":
        (run / "finished.json").unlink()
        return main(["finetune", "--resume", "--out", str(run), *more])
    words = [command, "--run", str(run), "--data", str(place / "photos"), "--workers", "0"]
    if command == "score":
        words += ["--out", str(run / "scores.csv")]
    return main([*words, *more])


COMMANDS = ["score", "evaluate", "resume"]


def test_finetune_runs_no_code_of_a_model_folder(place, tmp_path, ran, capsys):
    shutil.copytree(place / "model", tmp_path / "evil")
    with_text(tmp_path / "evil", **REMOTE)
    assert finetune(place, "no run", "--model", str(tmp_path / "evil")) != 0
    error = capsys.readouterr().err
    assert "text_cfg.tokenizer_kwargs.trust_remote_code=True" in error
    assert base_model.CONFIG in error
    assert not ran
    assert not (place / "no run").exists()


def test_a_tokenizer_in_the_folder_is_loaded_without_its_code(place, tmp_path, ran):
    shutil.copytree(place / "model", tmp_path / "evil")
    with_text(tmp_path / "evil", hf_tokenizer_name="a/b")
    load_tokenizer(str(tmp_path / "evil"))
    assert not ran


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("spelling", ["absolute", "relative"])
def test_a_shared_run_opens_no_folder_that_it_names(
    place, tmp_path, command, spelling, ran, elsewhere, untouched, monkeypatch, capsys
):
    evil = with_text(shutil.copytree(place / "model", tmp_path / "evil"), **REMOTE)
    named = f"local-dir:{evil if spelling == 'absolute' else 'evil'}"
    shared = renamed(place / "run", tmp_path / "run", named)
    monkeypatch.chdir(tmp_path)
    assert use(command, place, shared) != 0
    assert "If you trust the model, name it: --model" in capsys.readouterr().err
    assert not ran


@pytest.mark.parametrize("command", COMMANDS)
def test_the_name_of_a_model_does_not_steer_the_terminal(
    place, tmp_path, command, elsewhere, untouched, capsys
):
    shared = renamed(place / "run", tmp_path / "run", "local-dir:/x\x1b[2J\x07\r é")
    assert use(command, place, shared) != 0
    error = capsys.readouterr().err
    assert "/x\\x1b[2J\\x07\\r é" in error
    assert all(c.isprintable() or c == "\n" for c in error)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_file_of_weights_that_a_shared_run_names_is_not_opened(
    place, tmp_path, command, elsewhere, untouched, capsys
):
    shared = renamed(place / "run", tmp_path / "run", "RN50", f"openai={tmp_path / 'evil.pt'}")
    assert use(command, place, shared) != 0
    assert "--model RN50 --pretrained openai=" in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
def test_a_shared_run_that_names_the_hub_asks_no_network(
    place, tmp_path, command, monkeypatch, capsys
):
    forbid_network(monkeypatch)
    monkeypatch.setattr(weights_module, "_cached", lambda *_: None)
    shared = renamed(place / "run", tmp_path / "run", "hf-hub:evil/model")
    assert use(command, place, shared) != 0
    assert "name it: --model hf-hub:evil/model" in capsys.readouterr().err
    shared = renamed(place / "run", tmp_path / "run 2", "ViT-B-16", "openai")
    assert use(command, place, shared) != 0
    assert "If you trust it, name it: --model ViT-B-16" in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
def test_a_known_folder_that_was_given_code_since_runs_none(place, tmp_path, command, ran, capsys):
    model = shutil.copytree(place / "model", tmp_path / "model")
    load_clip(str(model))
    with_text(model, **REMOTE)
    shared = renamed(place / "run", tmp_path / "run", f"local-dir:{model}")
    assert use(command, place, shared) != 0
    assert "trust_remote_code=True" in capsys.readouterr().err
    assert not ran


@pytest.mark.parametrize("command", COMMANDS)
def test_a_run_of_this_machine_is_used_without_a_word(place, tmp_path, command):
    shared = renamed(place / "run", tmp_path / "run", f"local-dir:{place / 'model'}")
    assert use(command, place, shared) == 0


@pytest.mark.parametrize("command", COMMANDS)
def test_a_model_that_moved_is_named_anew(place, tmp_path, command, elsewhere, capsys):
    model = shutil.copytree(place / "model", tmp_path / "moved")
    other = save_tiny_clip(tmp_path / "other", seed=4)
    shared = renamed(place / "run", tmp_path / "run", f"local-dir:{tmp_path / 'gone'}")
    assert use(command, place, shared, "--model", str(other)) != 0
    error = capsys.readouterr().err
    assert "the base model is another one than recorded" in error
    assert "fingerprint" in error
    if command == "resume":
        (shared / "finished.json").touch()
    assert use(command, place, shared, "--model", str(model)) == 0


@pytest.mark.parametrize("command", COMMANDS)
def test_a_folder_that_is_gone_is_told_with_the_way_out(place, tmp_path, command, capsys):
    model = shutil.copytree(place / "model", tmp_path / "model")
    load_clip(str(model))
    shared = renamed(place / "run", tmp_path / "run", f"local-dir:{model}")
    shutil.rmtree(model)
    assert use(command, place, shared) != 0
    error = capsys.readouterr().err
    assert f"the model's folder {model} does not exist" in error
    assert "say where: --model /where/it/is/now" in error


@pytest.mark.parametrize("command", COMMANDS)
def test_weights_that_were_replaced_are_refused(place, tmp_path, command, capsys):
    model = shutil.copytree(place / "model", tmp_path / "model")
    load_clip(str(model))
    run = renamed(place / "run", tmp_path / "run", f"local-dir:{model}")
    save_tiny_clip(model, seed=4)
    assert use(command, place, run) != 0
    error = capsys.readouterr().err
    assert "the base model is another one than recorded (fingerprint: recorded" in error
    assert "its weights were replaced" in error


def test_resume_sees_what_no_fingerprint_does(place, tmp_path, capsys):
    """Another preprocessing would mix two models in one table."""
    model = shutil.copytree(place / "model", tmp_path / "model")
    load_clip(str(model))
    run = renamed(place / "run", tmp_path / "run", f"local-dir:{model}")
    config = json.loads((model / "open_clip_config.json").read_text())
    kept = json.dumps(config)
    config["preprocess_cfg"] = {**config.get("preprocess_cfg", {}), "mean": [9, 0.3, -9]}
    (model / "open_clip_config.json").write_text(json.dumps(config))
    assert use("resume", place, run) == 2
    error = capsys.readouterr().err
    assert "the model is not the one that the run began with: for " in error
    assert "from those in zero_shot.safetensors. Restore its preprocessing" in error
    (model / "open_clip_config.json").write_text(kept)
    (run / "finished.json").touch()
    assert use("resume", place, run) == 0


def test_resume_before_the_model_was_recorded(place, tmp_path, elsewhere, capsys):
    shared = renamed(place / "run", tmp_path / "run", f"local-dir:{place / 'model'}")
    (shared / BASE_MODEL).unlink()
    assert use("resume", place, shared) != 0
    assert f"name it: --model {place / 'model'}" in capsys.readouterr().err
    load_clip(str(place / "model"))
    (shared / "finished.json").touch()
    assert use("resume", place, shared) == 0


@pytest.mark.parametrize(
    "content", ["[]", "{}", '{"name": 3}', '{"name": "x", "pretrained": 1, "activation": "gelu"}']
)
def test_an_edited_record_of_the_model_is_refused(place, tmp_path, content, capsys):
    shared = renamed(place / "run", tmp_path / "run", f"local-dir:{place / 'model'}")
    (shared / BASE_MODEL).write_text(content)
    assert use("resume", place, shared) != 0
    assert str(shared / BASE_MODEL) in capsys.readouterr().err


def test_in_python_a_delta_opens_nothing_and_runs_nothing(
    tmp_path, ran, elsewhere, untouched, monkeypatch
):
    evil = with_text(save_tiny_clip(tmp_path / "evil", seed=0), **REMOTE)
    adapted = disturb(zero_shot())
    path = tmp_path / "delta.safetensors"
    monkeypatch.chdir(tmp_path)
    for name in (f"local-dir:{evil}", "local-dir:evil", "hf-hub:evil/model"):
        save_delta(path, adapted, describe_base(adapted.model, name), method="ueo")
        with pytest.raises(ValueError, match="If you trust the model, name it: model='"):
            load_base(read_delta(path).base)
        with pytest.raises(DeltaError, match=r"does not know the model .* give tokenizer="):
            load_delta(tiny_clip("bn", 0), path)
    assert not ran


def test_in_python_a_known_model_is_loaded_and_another_place_named(tmp_path, elsewhere):
    base = load_clip(str(save_tiny_clip(tmp_path / "a", seed=0))).base
    assert load_base(base).base == base
    (tmp_path / "a").rename(tmp_path / "b")
    with pytest.raises(FileNotFoundError, match="say where: model='/where/it/is/now'"):
        load_base(base)
    moved = load_base(base, model=str(tmp_path / "b")).base
    assert moved == dataclasses.replace(base, name=f"local-dir:{tmp_path / 'b'}")
    with pytest.raises(ValueError, match="not loaded on this machine before, or had other weights"):
        load_base(dataclasses.replace(moved, fingerprint="0" * 32))


def test_what_is_remembered_is_small_private_and_may_be_lost(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    base = BaseModel("local-dir:/x é", None, "gelu", 64, "0" * 32)
    assert base_model.recall(base.name, None) is None
    base_model.remember(base)
    assert base_model.is_known(base)
    assert not base_model.is_known(dataclasses.replace(base, activation="quickgelu"))
    (path,) = (tmp_path / "ueo_fast" / "models").iterdir()
    assert path.parent.stat().st_mode & 0o077 == 0
    path.write_text("[]")
    assert not base_model.is_known(base)
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    base_model.remember(base)  # nowhere to write: the model has to be named again
    assert not base_model.is_known(base)


PLAIN: list[dict[str, Any]] = [
    {"text_cfg": {"norm_kwargs": {"eps": 1e-6}, "act_kwargs": {"approximate": "tanh"}}},
    {"text_cfg": {"hf_tokenizer_name": "timm/ViT-B-16-SigLIP", "tokenizer_kwargs": None}},
    {"vision_cfg": {"layers": [3, 4, 6, 3], "timm_proj": None, "patch_size": 16}},
    {"init_logit_bias": -10, "quick_gelu": True, "custom_text": True},
]
HOSTILE: list[tuple[dict[str, Any], str]] = [
    ({"text_cfg": {"tokenizer_kwargs": {"trust_remote_code": False}}}, "trust_remote_code"),
    ({"text_cfg": {"tokenizer_kwargs": {"cache_dir": "/evil"}}}, "cache_dir"),
    ({"text_cfg": {"tokenizer_kwargs": {"clean": {"x": 1}}}}, "clean"),
    ({"text_cfg": {"tokenizer_kwargs": "trust_remote_code"}}, "tokenizer_kwargs"),
    ({"text_cfg": {"hf_model_name": "/evil"}}, "hf_model_name"),
    ({"text_cfg": {"hf_model_name": "../evil"}}, "hf_model_name"),
    ({"text_cfg": {"hf_tokenizer_name": "a/../../evil"}}, "hf_tokenizer_name"),
    ({"text_cfg": {"trust_remote_code": True}}, "trust_remote_code"),
    ({"text_cfg": {"pool_type": "/evil"}}, "pool_type"),
    ({"text_cfg": ["evil"]}, "text_cfg"),
    ({"vision_cfg": {"timm_model_name": "hf-hub:evil/model"}}, "timm_model_name"),
    ({"vision_cfg": {"timm_model_name": "local-dir:evil"}}, "timm_model_name"),
    ({"vision_cfg": {"norm_kwargs": {"device": "cuda"}}}, "device"),
    ({"vision_cfg": {"width": "64"}}, "width"),
    ({"vision_cfg": {"width": {"evil": 1}}}, "width"),
    ({"vision_cfg": {"mlp_ratio": float("nan")}}, "mlp_ratio"),
    ({"cast_dtype": "float16"}, "cast_dtype"),
    ({"multimodal_cfg": {"evil": 1}}, "evil"),
]


@pytest.mark.parametrize("changes", PLAIN, ids=str)
def test_plain_options_pass(tmp_path, changes):
    base_model.read_model_config(config_with(tmp_path, changes))


@pytest.mark.parametrize(("changes", "named"), HOSTILE, ids=str)
def test_other_options_are_refused_by_name(tmp_path, changes, named):
    path = config_with(tmp_path, changes)
    with pytest.raises(ValueError, match=rf"{base_model.CONFIG}: model_cfg\..*{named}"):
        base_model.read_model_config(path)


def config_with(folder: Path, changes: dict[str, Any]) -> Path:
    config: dict[str, Any] = {"text_cfg": {}, **tiny_model_cfg("bn")}
    for name, value in changes.items():
        merge = isinstance(value, dict) and isinstance(config.get(name), dict)
        config[name] = {**config[name], **value} if merge else value
    path = folder / base_model.CONFIG
    path.write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {"size": 32, "extra": {}}}))
    return path


def test_every_config_of_open_clip_is_plain(tmp_path):
    for name in open_clip.list_models():
        path = tmp_path / base_model.CONFIG
        path.write_text(json.dumps({"model_cfg": open_clip.get_model_config(name)}))
        base_model.read_model_config(path)


def test_the_tests_that_the_security_page_names_are_there():
    root = Path(__file__).resolve().parents[2]
    page = (root.parent / "SECURITY.md").read_text(encoding="utf-8")
    sources = "".join(path.read_text(encoding="utf-8") for path in root.rglob("test_*.py"))
    named = re.findall(r"`(test_\w+)`", page)
    assert len(named) > 8
    assert [name for name in named if f"def {name}(" not in sources] == []
    files = re.findall(r"`(tests/[\w/]+\.py)`", page)
    assert [file for file in files if not (root.parent / file).is_file()] == []


def test_files_that_are_no_configs_are_refused(tmp_path):
    path = tmp_path / base_model.CONFIG
    for content in ("{", "[]", "{}", '{"model_cfg": 3}', "[" * 100_000, " " * 2**21):
        path.write_text(content)
        with pytest.raises(ValueError, match=base_model.CONFIG):
            base_model.read_model_config(path)
    path.unlink()
    if hasattr(os, "mkfifo"):
        os.mkfifo(path)
        with pytest.raises(FileNotFoundError, match="is not a file"):
            base_model.read_model_config(path)


def test_a_text_tower_of_hugging_face_with_code_of_its_own_is_refused(tmp_path, monkeypatch):
    seen: list[Any] = []

    class AutoConfig:
        @staticmethod
        def from_pretrained(source: str, **options: Any) -> Any:
            seen.append((source, options))
            return types.SimpleNamespace(auto_map={"AutoModel": "evil.Model"})

    module = types.ModuleType("transformers")
    module.AutoConfig = AutoConfig  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "transformers", module)
    evil = with_text(save_tiny_clip(tmp_path / "evil", seed=0), hf_model_name="evil/model")
    with pytest.raises(ValueError, match=r"evil/model of .* brings code of its own"):
        load_clip(str(evil))
    assert seen == [("evil/model", {"trust_remote_code": False})]
