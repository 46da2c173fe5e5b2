"""Loading a CLIP: names, tags, files, folders; the activation fits the weights; errors help."""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

open_clip = pytest.importorskip("open_clip")

from open_clip import factory  # noqa: E402
from tiny_model_folder import WEIGHTS, save_tiny_clip, tiny_model_cfg  # noqa: E402

from ueo_fast.finetune.clip import weights as weights_module  # noqa: E402
from ueo_fast.finetune.clip.base_model import (  # noqa: E402
    activation_of,
    fingerprint,
    named_as_flags,
)
from ueo_fast.finetune.clip.load import load_base, load_clip, load_tokenizer  # noqa: E402
from ueo_fast.finetune.clip.weights import find_source  # noqa: E402
from ueo_fast.finetune.demo.tiny_clip import tiny_clip  # noqa: E402

TAG = {
    "url": "https://example.org/models/0123/tiny.pt",
    "hf_hub": "somebody/tiny/",
    "mean": (0.1, 0.2, 0.3),
    "std": (0.4, 0.5, 0.6),
    "interpolation": "bilinear",
    "resize_mode": "squash",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_clip(tmp_path_factory.mktemp("models") / "tiny bn é", "bn", seed=3)


@pytest.fixture
def named(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Registers ``tiny-bn``, as ``open_clip.add_model_config`` would, and returns its tags."""
    tags = {"openai": {**TAG, "quick_gelu": True}, "plain": dict(TAG)}
    monkeypatch.setitem(factory._MODEL_CONFIGS, "tiny-bn", tiny_model_cfg("bn"))
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "tiny-bn", tags)
    return tags


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(*_: Any, **__: Any) -> None:
        raise AssertionError("asked for a download although nothing answers")

    monkeypatch.setattr(weights_module, "unreachable", lambda url: "Name or service not known")
    monkeypatch.setattr(open_clip, "download_pretrained", asked)
    monkeypatch.setattr(weights_module, "download_pretrained_from_hf", asked)


def images() -> torch.Tensor:
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("spelling", ["folder", "local-dir:", "relative"])
def test_a_folder_is_a_model(folder, spelling, monkeypatch):
    monkeypatch.chdir(folder.parent)
    given = {"folder": f"{folder}", "local-dir:": f"local-dir:{folder}", "relative": folder.name}
    torch.manual_seed(5)
    before = torch.get_rng_state()
    loaded = load_clip(given[spelling])
    assert torch.equal(torch.get_rng_state(), before)
    expected = tiny_clip("bn", 3).state_dict()
    found = loaded.model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert not loaded.model.training
    assert loaded.base.name == f"local-dir:{folder}"
    assert loaded.base.pretrained is None
    assert (loaded.base.activation, loaded.base.embed_dim) == ("gelu", 64)
    assert loaded.preprocess_cfg["mean"] == [0.5] * 3
    assert loaded.preprocess_cfg["interpolation"] == "bilinear"
    assert loaded.tokenizer(["a cat"]).shape == (1, 16)
    assert load_base(loaded.base).base == loaded.base


def test_folders_that_are_no_models_say_what_they_lack(tmp_path, folder):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        load_clip(f"local-dir:{tmp_path / 'nowhere'}")
    with pytest.raises(FileNotFoundError, match=r"has no open_clip_config.json"):
        load_clip(str(tmp_path))
    shutil.copy(folder / "open_clip_config.json", tmp_path)
    with pytest.raises(FileNotFoundError, match="but no weights"):
        load_clip(str(tmp_path))
    (tmp_path / "open_clip_config.json").write_text("{")
    shutil.copy(folder / WEIGHTS, tmp_path)
    with pytest.raises(ValueError, match=r"open_clip_config.json is not valid JSON"):
        load_clip(str(tmp_path))
    with pytest.raises(ValueError, match="brings its own weights; leave it out"):
        load_clip(str(folder), "openai")


@pytest.mark.parametrize(
    ("model", "close"), [("ViT-B32", "ViT-B-32"), ("rn50x5", "RN50x4"), ("vit-b/16", "ViT-B-16")]
)
def test_an_unknown_name_gives_the_closest_and_the_list(model, close):
    with pytest.raises(ValueError, match=rf"did you mean .*\b{close}\b.*list_models") as caught:
        load_clip(model, "openai")
    assert repr(model) in str(caught.value)


def test_a_name_needs_weights_and_lists_its_tags():
    with pytest.raises(ValueError, match=r"RN50: give one of its tags \(openai, yfcc15m, cc12m\)"):
        load_clip("RN50")
    with pytest.raises(ValueError, match=r"'opena1'; did you mean openai\?.*yfcc15m, cc12m"):
        load_clip("RN50", "opena1")
    with pytest.raises(FileNotFoundError, match=r"'weights/RN50.pt': this file does not exist"):
        load_clip("RN50", "weights/RN50.pt")
    with pytest.raises(FileNotFoundError, match=r"elsewhere.pt': this file does not exist"):
        load_clip("RN50", "openai=elsewhere.pt")
    with pytest.raises(ValueError, match="precision='fp8' is unknown: choose one of fp32"):
        load_clip("RN50", "openai", precision="fp8")
    with pytest.raises(ValueError, match="activation='relu' is unknown"):
        load_clip("RN50", "openai", activation="relu")
    assert find_source("ViT-B/32", "none", None).name == "ViT-B-32"


def test_a_folder_given_as_weights_is_told_apart(folder):
    with pytest.raises(FileNotFoundError, match="give the folder as the model"):
        load_clip("RN50", str(folder))


def test_random_weights_are_said_aloud_and_always_the_same(folder, named):
    with pytest.warns(UserWarning, match="tiny-bn has random weights"):
        first = load_clip("tiny-bn", "none")
    torch.manual_seed(77)
    with pytest.warns(UserWarning, match="random weights"):
        second = load_clip("tiny-bn", "none")
    with pytest.warns(UserWarning, match="random weights"):
        of_folder = load_clip(str(folder), "none")
    assert first.base == second.base
    assert not first.model.training
    assert of_folder.base.fingerprint == first.base.fingerprint != fingerprint(tiny_clip("bn", 3))
    with pytest.warns(UserWarning, match="random weights"):
        load_base(first.base)


def test_weights_of_a_tag_get_its_activation_and_preprocessing(folder, named):
    path = folder / WEIGHTS
    quick = load_clip("tiny-bn", f"openai={path}")
    plain = load_clip("tiny-bn", f"plain={path}")
    assert (quick.base.activation, plain.base.activation) == ("quickgelu", "gelu")
    assert quick.base.pretrained == f"openai={path}"
    assert quick.base.fingerprint == plain.base.fingerprint
    assert quick.preprocess_cfg["mean"] == (0.1, 0.2, 0.3)
    assert quick.preprocess_cfg["resize_mode"] == "squash"
    tokens = quick.tokenizer(["a photo of a cat."])
    config = tiny_model_cfg("bn")
    expected = open_clip.CLIP(**config, quick_gelu=True).eval()
    expected.load_state_dict(tiny_clip("bn", 3).state_dict())
    with torch.no_grad():
        truth = expected.encode_text(tokens)
        torch.testing.assert_close(quick.model.encode_text(tokens), truth)
        assert (plain.model.encode_text(tokens) - truth).abs().max() > 1e-4
    with pytest.raises(ValueError, match="were trained with 'quickgelu'; leave it out"):
        load_clip("tiny-bn", f"openai={path}", activation="gelu")
    assert load_base(quick.base).base == quick.base


def test_a_file_whose_activation_is_not_known_is_refused(folder, named):
    path = str(folder / WEIGHTS)
    with pytest.raises(ValueError, match=r"openai: quickgelu, plain: gelu.*pretrained='openai=/"):
        load_clip("tiny-bn", path)
    for activation in ("gelu", "quickgelu"):
        loaded = load_clip("tiny-bn", path, activation=activation)
        assert loaded.base.activation == activation
        assert loaded.base.pretrained == path
        assert load_base(loaded.base).base == loaded.base
    del named["openai"]
    assert load_clip("tiny-bn", path).base.activation == "gelu"
    named["other"] = {**TAG, "mean": (0.0, 0.0, 0.0)}
    with pytest.warns(UserWarning, match="differ in their preprocessing"):
        load_clip("tiny-bn", path)


def test_the_tags_of_open_clip_get_the_activation_that_they_were_trained_with(monkeypatch):
    monkeypatch.setattr(weights_module, "_tag_file", lambda *_: __file__)
    wanted = {
        ("RN50", "openai"): True,  # open_clip builds these two with GELU, and warns
        ("ViT-B-16", "OpenAI"): True,
        ("ViT-B-16", "laion2b_s34b_b88k"): False,
        ("ViT-B-16-quickgelu", "openai"): True,
        ("roberta-ViT-B-32", "laion2b_s12b_b32k"): True,  # its config says so, its tag does not
    }
    for (name, tag), quick in wanted.items():
        assert find_source(name, tag, None).quick_gelu is quick, (name, tag)


def test_without_a_network_the_error_says_which_file_and_where_to(named, offline):
    with pytest.raises(OSError, match="Name or service not known") as caught:
        load_clip("tiny-bn", "openai")
    message = str(caught.value)
    for part in (
        "https://huggingface.co/somebody/tiny (open_clip_model.safetensors or ",
        TAG["url"],
        "pretrained='openai=/path/of/the/file'",
        str(weights_module.constants.HF_HUB_CACHE),
    ):
        assert part in message
    with pytest.raises(OSError, match=r"a/b: not found .*one folder, and give model='/path/of"):
        load_clip("hf-hub:a/b")
    with named_as_flags(), pytest.raises(OSError, match="give --pretrained openai=/path/of/the/f"):
        load_clip("tiny-bn", "openai")
    with named_as_flags(), pytest.raises(OSError, match="give --model /path/of/the/folder"):
        load_clip("hf-hub:a/b")


def test_a_network_that_does_not_answer_costs_one_short_wait(monkeypatch):
    class Silent:
        def head(self, url: str, timeout: float) -> None:
            time.sleep(20)

    class Refusing:
        def head(self, url: str, timeout: float) -> None:
            raise OSError("Connection refused")

    class Answering:
        def head(self, url: str, timeout: float) -> None:
            assert timeout == 0.2

    monkeypatch.setattr(weights_module, "_PATIENCE", 0.2)
    monkeypatch.setattr(weights_module, "get_session", Silent)
    started = time.perf_counter()
    assert "no answer from https://a.b within 0.2 s" in weights_module.unreachable("https://a.b")
    assert time.perf_counter() - started < 5
    monkeypatch.setattr(weights_module, "get_session", Refusing)
    assert weights_module.unreachable("https://a.b") == "https://a.b: Connection refused"
    monkeypatch.setattr(weights_module, "get_session", Answering)
    assert weights_module.unreachable("https://a.b") == ""


def test_weights_in_the_cache_need_no_network(folder, named, offline, monkeypatch):
    asked = []

    def cache(repository: str, file: str) -> str | None:
        asked.append((repository, file))
        return str(folder / WEIGHTS) if file.endswith(".bin") else None

    monkeypatch.setattr(weights_module, "try_to_load_from_cache", cache)
    loaded = load_clip("tiny-bn", "openai")
    assert asked == [
        ("somebody/tiny", "open_clip_model.safetensors"),
        ("somebody/tiny", "open_clip_pytorch_model.bin"),
    ]
    assert loaded.base.pretrained == "openai"
    assert loaded.base.fingerprint == fingerprint(tiny_clip("bn", 3))


class Holder(torch.nn.Module):
    """Tensors by dotted name, without a forward worth mentioning, as an archive holds them."""

    def __init__(self, state: dict[str, torch.Tensor]) -> None:
        super().__init__()
        children: dict[str, dict[str, torch.Tensor]] = {}
        for name, tensor in state.items():
            head, _, tail = name.partition(".")
            if tail:
                children.setdefault(head, {})[tail] = tensor
            else:
                self.register_buffer(name, tensor)
        for head, below in children.items():
            self.add_module(head, Holder(below))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
def test_openai_archives_are_known_by_their_hash(tmp_path, folder, named):
    archive = tmp_path / "tiny.pt"
    state = tiny_clip("bn", 3).half().state_dict()
    state |= {name: torch.tensor(16) for name in ("input_resolution", "context_length")}
    torch.jit.save(torch.jit.script(Holder(state)), archive)
    with pytest.raises(ValueError, match="TorchScript archive, which is a program, and none that"):
        load_clip("tiny-bn", str(archive))
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    named["openai"]["url"] = f"https://example.org/clip/models/{digest}/tiny.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = load_clip("tiny-bn", str(archive))
    assert loaded.base.pretrained == f"openai={archive}"
    assert loaded.base.activation == "quickgelu"
    # Published in float16, the same base as the float32 copy of it.
    assert loaded.base.fingerprint == fingerprint(tiny_clip("bn", 3))
    assert loaded.model.visual.conv1.weight.dtype == torch.float32


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return (open, ("exploded", "w"))


def test_unusable_weights_name_the_file(tmp_path, folder, named, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = (folder / WEIGHTS).read_bytes()
    Path("cut.safetensors").write_bytes(data[: len(data) // 2])
    Path("empty.pt").write_bytes(b"")
    Path("bomb.pt").write_bytes(pickle.dumps({"state_dict": Bomb()}))
    torch.save({"x": Bomb()}, "bomb2.pt")
    state = tiny_clip("vit", 0).state_dict()
    safetensors.torch.save_file(state, "vit.safetensors")
    for name in ("bomb.pt", "bomb2.pt"):
        with pytest.raises(ValueError, match=r"can run any program.*safetensors.torch.save_file"):
            load_clip("tiny-bn", f"plain={name}")
    for name in ("cut.safetensors", "empty.pt", "bomb.pt", "bomb2.pt", "vit.safetensors"):
        with pytest.raises(ValueError, match=f"{name} do not load into tiny-bn: .+"):
            load_clip("tiny-bn", f"plain={name}")
    assert not Path("exploded").exists()


def test_a_tokenizer_comes_by_name(folder):
    assert load_tokenizer(str(folder))(["x"]).shape == (1, 16)
    assert load_tokenizer("RN50")(["x"]).shape == (1, 77)
    with pytest.raises(ValueError, match="neither a folder nor a model of open_clip"):
        load_tokenizer("nothing like it")


def test_a_broken_tokenizer_is_told(folder, monkeypatch):
    def fails(name: str) -> None:
        raise RuntimeError("no such tokenizer\nlong story")

    monkeypatch.setattr(open_clip, "get_tokenizer", fails)
    with pytest.raises(OSError, match=r"tokenizer of RN50.*\(no such tokenizer\).*transformers"):
        load_tokenizer("RN50")


def test_the_tiny_folder_is_complete(folder):
    config = json.loads((folder / "open_clip_config.json").read_text())
    assert config["model_cfg"]["text_cfg"]["context_length"] == 16
    assert activation_of(open_clip.create_model(f"local-dir:{folder}")) == "gelu"


@pytest.mark.parametrize(
    "prefix",
    [
        "module.",
        "_orig_mod.",
        "module._orig_mod.",
        "_orig_mod.module.",
        "model.",
        "model._orig_mod.",
    ],
)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_checkpoints_of_wrapped_models_load(tmp_path, named, prefix, suffix):
    state = tiny_clip("bn", 3).state_dict()
    wrapped = {prefix + name: tensor.contiguous() for name, tensor in state.items()}
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pt":
        torch.save({"epoch": 3, "state_dict": wrapped}, path)
    else:
        safetensors.torch.save_file(wrapped, path)
    loaded = load_clip("tiny-bn", f"plain={path}")
    assert loaded.base.pretrained == f"plain={path}"
    found = loaded.model.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())


def test_a_tower_compiled_by_itself_and_a_folder_of_such_weights_load(tmp_path, folder):
    state = tiny_clip("bn", 3).state_dict()
    wrapped = {
        name.replace("visual.", "visual._orig_mod.", 1): tensor for name, tensor in state.items()
    }
    assert wrapped.keys() != state.keys()
    shutil.copy(folder / "open_clip_config.json", tmp_path)
    torch.save(wrapped, tmp_path / "open_clip_pytorch_model.bin")
    loaded = load_clip(str(tmp_path))
    assert loaded.base.name == f"local-dir:{tmp_path}"
    assert loaded.base.fingerprint == fingerprint(tiny_clip("bn", 3))
    torch.save({**wrapped, **state}, tmp_path / "open_clip_pytorch_model.bin")
    with pytest.raises(ValueError, match=r"has 'visual.*' twice"):
        load_clip(str(tmp_path))


def test_a_training_checkpoint_with_numpy_scalars_loads(tmp_path, named):
    path = tmp_path / "weights.pt"
    state = tiny_clip("bn", 3).state_dict()
    scalars = {"epoch": np.int64(3), "loss": np.float32(0.5), "done": np.bool_(False)}
    scalars |= {"best": np.str_("last"), "note": np.bytes_(b"x")}
    torch.save({**scalars, "state_dict": state}, path)
    assert load_clip("tiny-bn", f"plain={path}").base.fingerprint == fingerprint(tiny_clip("bn", 3))
    torch.save({"module.x": Bomb(), "state_dict": state}, path)
    with pytest.raises(ValueError, match="can run any program"):
        load_clip("tiny-bn", f"plain={path}")
    assert not Path("exploded").exists()


def test_loading_touches_no_generator_of_a_gpu(folder, monkeypatch):
    def seeds(seed: int) -> None:
        raise AssertionError("the generators of GPUs were seeded")

    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeds)
    monkeypatch.setattr(torch.cuda, "manual_seed", seeds)
    before = torch.get_rng_state()
    load_clip(str(folder))
    tiny_clip("vit", 3)
    assert torch.equal(torch.get_rng_state(), before)
