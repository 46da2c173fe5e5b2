"""Deltas: what is saved comes back exactly, on the same base only, and a mismatch says which."""

from __future__ import annotations

import copy
import dataclasses
import errno
import json
import math
import os
from typing import Any

import pytest
import torch
import torch.nn.functional as F

open_clip = pytest.importorskip("open_clip")

from delta_problem import CLASSES, disturb, images, zero_shot  # noqa: E402
from tiny_model_folder import save_tiny_clip, tiny_model_cfg  # noqa: E402

from ueo_fast.finetune.adaptation import adapt  # noqa: E402
from ueo_fast.finetune.clip.base_model import describe_base  # noqa: E402
from ueo_fast.finetune.clip.delta import DeltaError, load_delta, read_delta, save_delta  # noqa: E402
from ueo_fast.finetune.clip.load import load_base, load_clip  # noqa: E402
from ueo_fast.finetune.clip.model import ClipClassifier, adapted_state  # noqa: E402
from ueo_fast.finetune.clip.prompt import PromptLearner  # noqa: E402
from ueo_fast.finetune.demo.tiny_clip import tiny_clip, tiny_tokenizer  # noqa: E402
from ueo_fast.finetune.engine.trainer import TrainerConfig  # noqa: E402
from ueo_fast.finetune.files.tensor_file import read_tensors, write_tensors  # noqa: E402


def saved(path, tower="bn", *, scope="all", name="", pretrained=None, **options: Any):
    classifier = disturb(zero_shot(tower, scope=scope))
    base = describe_base(classifier.model, name, pretrained)
    save_delta(path, classifier, base, method="ueo", **options)
    return classifier


@pytest.mark.parametrize("patch", [True, False])
@pytest.mark.parametrize(("tower", "scope"), [("bn", "all"), ("bn", "authors"), ("vit", "all")])
def test_a_delta_gives_the_adapted_classifier_again(tmp_path, tower, scope, patch):
    path = tmp_path / "delta.safetensors"
    adapted = saved(path, tower, scope=scope)
    loaded = load_delta(tiny_clip(tower, 0), path, tokenizer=tiny_tokenizer(), patch=patch)
    expected, found = adapted_state(adapted), adapted_state(loaded)
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert loaded.scope == scope
    assert loaded.prompt.class_names == adapted.prompt.class_names
    assert not any(module.training for module in loaded.modules())
    assert (loaded.patch_handle is not None) is patch
    with torch.no_grad():
        truth, result = adapted(images()), loaded(images())
        assert (zero_shot(tower)(images()).cosines - truth.cosines).abs().max() > 1e-2
    for one, other in zip(result, truth, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0 if patch else 1e-4)
    assert os.path.getsize(path) < 100_000
    assert os.listdir(tmp_path) == ["delta.safetensors"]


def test_the_metadata_says_what_it_is(tmp_path):
    path = tmp_path / "delta.safetensors"
    saved(path, name="RN50", pretrained="openai", seed=3, extra={"epochs": 50, "who": "é"})
    values = read_tensors(path)[1]
    assert set(values) == {
        *("format", "format_version", "ueo_fast_version", "torch_version", "open_clip_version"),
        *("model", "pretrained", "activation", "embed_dim", "fingerprint", "class_names"),
        *("context_words", "suffix", "scope", "method", "seed", "created", "extra", "checksum"),
    }
    delta = read_delta(path)
    assert (delta.base.name, delta.base.pretrained) == ("RN50", "openai")
    assert delta.base == describe_base(tiny_clip("bn", 0), "RN50", "openai")
    assert delta.class_names == ("cat", "great wall", "t-shirt")
    assert (delta.context_words, delta.suffix) == ("an image of", " !")
    assert (delta.method, delta.seed, delta.scope) == ("ueo", 3, "all")
    assert delta.extra == {"epochs": 50, "who": "é"}
    assert delta.versions["torch"] == torch.__version__.partition("+")[0]
    assert delta.created.endswith("+00:00")
    assert "tensors" not in repr(delta)


def test_a_temperature_that_is_not_the_models_own_is_kept(tmp_path):
    """Else the probabilities of a loaded classifier would be others, without a word."""
    classifier = zero_shot()
    fixed = ClipClassifier(classifier.model, classifier.prompt, logit_scale=30.0)
    with torch.no_grad():
        cosines, logits = fixed(images())
    assert float(fixed.logit_scale) == 30.0 != float(classifier.logit_scale)
    torch.testing.assert_close(logits, 30 * cosines)
    base = describe_base(fixed.model, "", None)
    path = save_delta(tmp_path / "d.safetensors", fixed, base, method="ueo", extra={"a": 1})
    assert read_delta(path).extra == {"a": 1, "logit_scale": 30.0}
    loaded = load_delta(tiny_clip("bn", 0), path, tokenizer=tiny_tokenizer())
    assert float(loaded.logit_scale) == 30.0
    for scale in (0.0, -1.0, math.inf, "hot"):
        rewrite(path, extra=json.dumps({"logit_scale": scale}))
        with pytest.raises(DeltaError, match="logit_scale"):
            read_delta(path)


def test_a_context_learnt_on_one_list_serves_for_another(tmp_path):
    path = tmp_path / "delta.safetensors"
    adapted = saved(path)
    names = ["cat", "teapot"]
    loaded = load_delta(tiny_clip("bn", 0), path, tokenizer=tiny_tokenizer(), class_names=names)
    assert loaded.prompt.class_names == ("cat", "teapot")
    with torch.no_grad():
        torch.testing.assert_close(loaded.text_features()[0], adapted.text_features()[0])
        assert loaded(images()).cosines.shape == (5, 2)


def test_base_and_tokenizer_are_found_by_the_recorded_name(tmp_path):
    folder = save_tiny_clip(tmp_path / "model", "bn", seed=0)
    clip = load_clip(str(folder))
    path = tmp_path / "delta.safetensors"
    adapted = saved(path, name=clip.base.name)
    base = load_base(read_delta(path).base)
    loaded = load_delta(base.model, path, base=base.base)
    with torch.no_grad():
        torch.testing.assert_close(
            loaded(images()).cosines, adapted(images()).cosines, rtol=0, atol=0
        )
    # The folder moved: the same weights under another name are the same base.
    folder.rename(tmp_path / "moved")
    moved = load_clip(str(tmp_path / "moved"))
    load_delta(moved.model, path, base=moved.base)
    with pytest.raises(DeltaError, match=r"tokenizer is not known.*give tokenizer="):
        load_delta(tiny_clip("bn", 0), path)
    with pytest.raises(DeltaError, match=r"name was not recorded.*give tokenizer="):
        load_delta(tiny_clip("bn", 0), saved_path_without_name(tmp_path))


def saved_path_without_name(tmp_path):
    saved(tmp_path / "unnamed.safetensors")
    return tmp_path / "unnamed.safetensors"


class WordBag(torch.nn.Module):
    """A text tower in which no prompt can be learnt."""

    output_dim = 64

    def __init__(self):
        super().__init__()
        self.words = torch.nn.Embedding(49408, 64)

    def forward(self, tokens):
        return self.words(tokens).mean(1)


class Bagged(torch.nn.Module):
    def __init__(self):
        super().__init__()
        model = tiny_clip("bn", 0)
        self.visual, self.logit_scale = model.visual, model.logit_scale
        torch.manual_seed(0)
        self.text = WordBag()

    def encode_image(self, images):
        return self.visual(images)

    def encode_text(self, tokens):
        return self.text(tokens)


def test_a_text_tower_whose_prompt_cannot_be_learnt(tmp_path):
    prompt = PromptLearner(Bagged().eval(), tiny_tokenizer(), CLASSES)
    adapted = disturb(ClipClassifier(prompt._model[0], prompt))
    path = tmp_path / "delta.safetensors"
    save_delta(path, adapted, describe_base(adapted.model), method="ueo")
    loaded = load_delta(Bagged(), path, tokenizer=tiny_tokenizer())
    with torch.no_grad():
        torch.testing.assert_close(
            loaded(images()).cosines, adapted(images()).cosines, rtol=0, atol=0
        )
    budget = TrainerConfig(epochs=1, batch_size=4)
    with pytest.raises(ValueError, match=r"the text tower WordBag has no token.*--train affine"):
        adapt(Bagged(), tiny_tokenizer(), images(), CLASSES, config=budget)
    budget = dataclasses.replace(budget, prompt_lr=0.0)
    trained = adapt(Bagged(), tiny_tokenizer(), images(), CLASSES, config=budget).classifier
    bias = Bagged().visual.bn1.bias
    assert not torch.equal(trained.model.visual.bn1.bias, bias)


def test_a_half_precision_base_is_the_same_base(tmp_path):
    path = tmp_path / "delta.safetensors"
    adapted = saved(path)
    loaded = load_delta(tiny_clip("bn", 0).half(), path, tokenizer=tiny_tokenizer())
    with torch.no_grad():
        cosines = loaded(images()).cosines
        torch.testing.assert_close(cosines, adapted(images()).cosines, rtol=0, atol=5e-3)


def wrong_activation():
    model = open_clip.CLIP(**tiny_model_cfg("bn"), quick_gelu=True)
    model.load_state_dict(tiny_clip("bn", 0).state_dict())
    return model


MISMATCHES = {
    "weights": (
        lambda: (tiny_clip("bn", 1), "RN101", "openai"),
        ["name: recorded 'RN50', found 'RN101'", "fingerprint: recorded '", "load_clip('RN50', 'a"],
    ),
    "tag": (
        lambda: (tiny_clip("bn", 1), "RN50", "b"),
        ["pretrained: recorded 'a', found 'b'", "Load RN50 (a) instead"],
    ),
    "the weights behind the name": (
        lambda: (tiny_clip("bn", 1), "RN50", "a"),
        ["fingerprint: recorded '", "its weights were replaced"],
    ),
    "precision": (
        lambda: (tiny_clip("bn", 0).bfloat16(), "RN50", "a"),
        ["fingerprint", "bfloat16 rounds them"],
    ),
    "activation": (
        lambda: (wrong_activation(), "RN50", "a"),
        ["activation: recorded 'gelu', found 'quickgelu'", "Build it with gelu"],
    ),
    "architecture": (
        lambda: (tiny_clip("vit", 0), "", None),
        ["fingerprint: recorded '", "Load RN50 (a) instead: load_clip('RN50', 'a')"],
    ),
    "size": (
        lambda: (open_clip.CLIP(**{**tiny_model_cfg("bn"), "embed_dim": 32}), "", None),
        ["embed_dim: recorded 64, found 32"],
    ),
}


def snapshot(model):
    state = {name: value.clone() for name, value in model.state_dict().items()}
    flags = {name: value.requires_grad for name, value in model.named_parameters()}
    return state, flags, {name: type(module) for name, module in model.named_modules()}


def assert_untouched(model, before):
    state, flags, types = snapshot(model)
    assert all(torch.equal(value, before[0][name]) for name, value in state.items())
    assert all(value.dtype == before[0][name].dtype for name, value in state.items())
    assert (flags, types) == before[1:]


@pytest.mark.parametrize("kind", MISMATCHES)
def test_another_base_is_refused_and_untouched(tmp_path, kind):
    make, parts = MISMATCHES[kind]
    model, name, pretrained = make()
    path = tmp_path / "delta.safetensors"
    saved(path, name="RN50", pretrained="a")
    before = snapshot(model)
    base = describe_base(model, name, pretrained) if name else None
    with pytest.raises(DeltaError) as caught:
        load_delta(model, path, tokenizer=tiny_tokenizer(), base=base)
    for part in (str(path), *parts):
        assert part in str(caught.value)
    assert_untouched(model, before)


def rewrite(path, **changes: Any) -> None:
    """A delta whose writer did other things than ours, with a checksum that fits."""
    tensors, values = read_tensors(path)
    tensors = changes.pop("tensors", lambda same: same)(tensors)
    values = {key: value for key, value in {**values, **changes}.items() if value is not None}
    write_tensors(path, tensors, values, checked=True)


def with_tensor(name, change):
    return lambda tensors: {**tensors, name: change(tensors[name])}


def without(name):
    return lambda tensors: {key: value for key, value in tensors.items() if key != name}


NORM = "visual.bn1.weight"
ALTERED = {
    "a wrong shape": (with_tensor(NORM, lambda t: t[:-1]), r"'visual.bn1.weight' has shape \(7,\)"),
    "a context of another length": (
        with_tensor("prompt.context", lambda t: torch.cat([t, t])),
        r"'prompt.context' has shape \(6, 64\).*\(3, 64\) in this model",
    ),
    "a missing tensor": (without(NORM), "lacks 'visual.bn1.weight'"),
    "a tensor too many": (lambda t: {**t, "zzz": torch.ones(1)}, "has 'zzz'"),
    "integers": (with_tensor(NORM, lambda t: t.long()), r"'visual.bn1.weight' is torch.int64, exp"),
    "half precision": (with_tensor(NORM, lambda t: t.half()), "is torch.float16, expected torch.f"),
    "a float counter": (
        with_tensor("visual.bn1.num_batches_tracked", lambda t: t.float()),
        "'visual.bn1.num_batches_tracked' is torch.float32, expected torch.int64",
    ),
    "NaN": (with_tensor(NORM, lambda t: t * float("nan")), "'visual.bn1.weight' has NaN"),
    "infinity": (with_tensor(NORM, lambda t: t / 0), "'visual.bn1.weight' has NaN or infinite"),
}


@pytest.mark.parametrize("kind", ALTERED)
def test_tensors_that_do_not_fit_are_named(tmp_path, kind):
    change, message = ALTERED[kind]
    path = tmp_path / "delta.safetensors"
    saved(path)
    rewrite(path, tensors=change)
    model = tiny_clip("bn", 0)
    before = snapshot(model)
    with pytest.raises(DeltaError, match=message) as caught:
        load_delta(model, path, tokenizer=tiny_tokenizer())
    assert str(path) in str(caught.value)
    assert_untouched(model, before)


FIELDS = {
    "format": ("other", "safetensors file but no delta: format is 'other'"),
    "format_version": ("2", r"format_version is '2', and this ueo_fast .* reads '1'"),
    "scope": ("some", "scope is 'some', known are all, authors"),
    "class_names": ('["cat", 3]', "class_names"),
    "pretrained": ("[1]", "pretrained"),
    "embed_dim": ("many", "many"),
    "seed": ("1.5", "seed"),
    "extra": ("{", "no usable value"),
    "context_words": (None, "context_words"),
    "torch_version": (None, "torch_version"),
}


@pytest.mark.parametrize("key", FIELDS)
def test_fields_that_are_missing_or_wrong_are_named(tmp_path, key):
    value, message = FIELDS[key]
    path = tmp_path / "delta.safetensors"
    saved(path)
    rewrite(path, **{key: value})
    with pytest.raises(DeltaError, match=message) as caught:
        read_delta(path)
    assert str(path) in str(caught.value)


def test_another_scope_does_not_fit_the_tensors(tmp_path):
    path = tmp_path / "delta.safetensors"
    saved(path, scope="all")
    rewrite(path, scope="authors")
    with pytest.raises(DeltaError, match="another scope of affine parameters"):
        load_delta(tiny_clip("bn", 0), path, tokenizer=tiny_tokenizer())


def test_another_tokenizer_is_seen_by_its_context(tmp_path):
    path = tmp_path / "delta.safetensors"
    saved(path)

    def halves(texts, context_length):
        """Two tokens a word, where CLIP's tokenizer has one for each of "an image of"."""
        rows = torch.zeros(len(texts), context_length, dtype=torch.int64)
        for row, text in zip(rows, texts, strict=True):
            ids = [1]
            for word in text.split():
                ids += [sum(map(ord, word)), 2000 + len(word)]
            row[: len(ids) + 1] = torch.tensor([*ids, 49407])
        return rows

    with pytest.raises(DeltaError, match=r"'prompt.context' has shape \(3, 64\).*\(6, 64\) in"):
        load_delta(tiny_clip("bn", 0), path, tokenizer=halves)


def test_a_base_that_is_not_the_classifiers_is_not_recorded(tmp_path):
    classifier = disturb(zero_shot())
    path = tmp_path / "delta.safetensors"
    with pytest.raises(ValueError, match="the base model is another one than recorded"):
        save_delta(path, classifier, describe_base(tiny_clip("bn", 1)), method="ueo")
    classifier.prompt.context.data.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"'prompt.context' has NaN"):
        save_delta(path, classifier, describe_base(classifier.model), method="ueo")
    assert not path.exists()


def test_a_full_disk_keeps_the_delta_before(tmp_path, monkeypatch):
    path = tmp_path / "delta.safetensors"
    classifier = saved(path)
    before = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left.*kept.*delta.safetensors") as caught:
        save_delta(path, classifier, describe_base(classifier.model), method="other")
    assert caught.value.errno == errno.ENOSPC
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["delta.safetensors"]


def test_names_that_are_no_unicode_cost_no_result(tmp_path):
    classifier = disturb(zero_shot())
    base = describe_base(classifier.model, "local-dir:/\udcff", "\udcfe.pt")
    path = save_delta(tmp_path / "d", classifier, base, method="ueo")
    assert read_delta(path).base.name == "local-dir:/\\udcff"


def test_a_loaded_classifier_can_be_trained_on_and_saved_again(tmp_path):
    path = tmp_path / "delta.safetensors"
    saved(path, name="RN50", pretrained="a")
    model = copy.deepcopy(tiny_clip("bn", 0))
    loaded = load_delta(model, path, tokenizer=tiny_tokenizer())
    logits = loaded(images()).logits
    F.cross_entropy(logits, torch.arange(5) % len(CLASSES)).backward()
    assert all(parameter.grad is not None for parameter in loaded.affine_parameters())
    again = tmp_path / "again.safetensors"
    save_delta(again, loaded, read_delta(path).base, method="ueo")
    first, second = read_delta(path), read_delta(again)
    assert all(torch.equal(first.tensors[name], value) for name, value in second.tensors.items())
    assert (first.base, first.class_names) == (second.base, second.class_names)


def test_a_model_in_bfloat16_is_told_why_it_is_another(tmp_path):
    classifier = disturb(zero_shot())
    base = describe_base(classifier.model, "RN50", "openai")
    path = save_delta(tmp_path / "delta.safetensors", classifier, base, method="ueo")
    assert load_delta(tiny_clip("bn", 0).half(), path, tokenizer=tiny_tokenizer())
    with pytest.raises(DeltaError, match=r"Load RN50 \(openai\) instead: .* not in bfloat16"):
        load_delta(tiny_clip("bn", 0).bfloat16(), path, tokenizer=tiny_tokenizer())
