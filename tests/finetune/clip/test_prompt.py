"""The prompt learner: equal to encode_text before training, and only its context is trained."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

open_clip = pytest.importorskip("open_clip")

from open_clip.coca_model import CoCa  # noqa: E402
from open_clip.model import (  # noqa: E402
    CLIP,
    CLIPTextCfg,
    CustomTextCLIP,
    convert_weights_to_lp,
)
from small_prompts import (  # noqa: E402
    CONTEXT,
    EMBED,
    NAMES,
    PROMPTS,
    SIZES,
    VISION,
    WIDTH,
    small_clip,
    tokenizer,
)

from ueo_fast.finetune.clip.prompt import PromptLearner  # noqa: E402


def small_coca() -> nn.Module:
    torch.manual_seed(0)
    cfg = CLIPTextCfg(**SIZES, embed_cls=True, output_tokens=True)
    return CoCa(EMBED, SIZES, cfg, VISION).eval().requires_grad_(False)


class WordTokenizer:
    """As SigLIP's: no start token, and one id that both ends the text and pads it.

    With ``end=False`` as CLIPA's: a start token, no end token, padded with 0.
    """

    def __init__(self, end: bool = True) -> None:
        self.ids: dict[str, int] = {}
        self.end = end

    def __call__(self, texts: list[str], context_length: int) -> Tensor:
        pad = 1 if self.end else 0
        tokens = torch.full((len(texts), context_length), pad)
        for row, text in zip(tokens, texts, strict=True):
            words = text.lower().replace(".", " .").split()
            ids = [self.ids.setdefault(word, 10 + len(self.ids)) for word in words]
            ids = ids[: context_length - 1]
            start = 0 if self.end else 1
            row[:start] = 5
            row[start : start + len(ids)] = torch.tensor(ids)
        return tokens


MODELS = {
    "CLIP": lambda: (small_clip(), tokenizer),
    "CustomTextCLIP": lambda: (small_clip(CustomTextCLIP), tokenizer),
    "CoCa": lambda: (small_coca(), tokenizer),
    "SigLIP-like": lambda: (
        small_clip(CustomTextCLIP, no_causal_mask=True, pool_type="last", proj_bias=True),
        WordTokenizer(),
    ),
    "CLIPA-like": lambda: (
        small_clip(no_causal_mask=True, pool_type="last"),
        WordTokenizer(end=False),
    ),
    "eos pooling": lambda: (small_clip(pool_type="eos", eos_id=49407), tokenizer),
}


@pytest.mark.parametrize("kind", MODELS)
def test_untrained_context_equals_encode_text(kind: str) -> None:
    model, tokenize = MODELS[kind]()
    learner = PromptLearner(model, tokenize, NAMES)
    features = learner()
    tokens = tokenize(PROMPTS, context_length=CONTEXT)
    expected = F.normalize(model.encode_text(tokens), dim=-1)
    torch.testing.assert_close(features, expected, rtol=0, atol=2e-6)
    assert features.shape == (4, EMBED)
    assert features.dtype == torch.float32
    assert learner.context.shape == (4, WIDTH)


@pytest.mark.parametrize("kind", MODELS)
def test_context_gradient_equals_that_of_the_uncut_tower(kind: str) -> None:
    """Truth: open_clip's own encode_text on all positions, its embedding replaced by a hook."""
    model, tokenize = MODELS[kind]()
    model.double()
    learner = PromptLearner(model, tokenize, NAMES)
    weights = torch.randn(4, EMBED, generator=torch.Generator().manual_seed(1))
    (learner() * weights).sum().backward()

    context = learner.context.detach().clone().requires_grad_()
    tokens = tokenize(PROMPTS, context_length=CONTEXT)
    first = 0 if kind == "SigLIP-like" else 1

    def insert_context(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        before, after = output[:, :first], output[:, first + 4 :]
        return torch.cat([before, context.double().expand(4, -1, -1), after], dim=1)

    embedding = getattr(model, "text", model).token_embedding
    embedding.register_forward_hook(insert_context)
    expected = F.normalize(model.encode_text(tokens, normalize=False), dim=-1)
    (expected * weights).sum().backward()
    assert context.grad.abs().max() > 1e-3
    torch.testing.assert_close(learner.context.grad, context.grad, rtol=1e-4, atol=1e-6)


def test_the_prompts_are_cut_where_the_tower_allows() -> None:
    longest = int((tokenizer(PROMPTS) != 0).sum(dim=1).max())
    assert PromptLearner(small_clip(), tokenizer, NAMES).tokens.shape == (4, longest)
    assert PromptLearner(small_coca(), tokenizer, NAMES).tokens.shape == (4, CONTEXT)


def test_start_and_context_are_computed_once_and_padding_never() -> None:
    model = small_clip()
    learner = PromptLearner(model, tokenizer, NAMES)
    rows: list[int] = []
    first = model.transformer.resblocks[0]
    first.mlp.register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[:-1].numel()))
    learner()
    used = int((tokenizer(PROMPTS) != 0).sum())
    assert rows == [used - (len(NAMES) - 1) * (1 + len(learner.context))]


@pytest.mark.parametrize("kind", MODELS)
def test_a_double_model_has_a_double_context_and_double_features(kind: str) -> None:
    model, tokenize = MODELS[kind]()
    learner = PromptLearner(model.double(), tokenize, NAMES)
    features = learner()
    assert learner.context.dtype == features.dtype == torch.float64
    tokens = tokenize(PROMPTS, context_length=CONTEXT)
    expected = F.normalize(model.encode_text(tokens), dim=-1)
    torch.testing.assert_close(features, expected, rtol=0, atol=1e-12)


def test_gradients_reach_the_context_only() -> None:
    model = small_clip()
    learner = PromptLearner(model, tokenizer, NAMES)
    learner().square()[:, 0].sum().backward()
    assert learner.context.grad is not None
    assert learner.context.grad.abs().max() > 0
    assert all(parameter.grad is None for parameter in model.parameters())


def test_training_the_context_changes_the_features_of_every_class() -> None:
    learner = PromptLearner(small_clip(), tokenizer, NAMES)
    before = learner().detach()
    with torch.no_grad():
        learner.context.add_(torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(2)))
    moved = (learner() - before).abs().amax(dim=1)
    assert (moved > 1e-4).all()


def test_context_and_suffix_can_be_chosen() -> None:
    model = small_clip()
    learner = PromptLearner(
        model, tokenizer, ["cat", "dog"], context="a blurry satellite photo of a", suffix=", a pet."
    )
    prompts = [f"a blurry satellite photo of a {name}, a pet." for name in ("cat", "dog")]
    expected = F.normalize(model.encode_text(tokenizer(prompts, CONTEXT)), dim=-1)
    torch.testing.assert_close(learner(), expected, rtol=0, atol=2e-6)
    assert learner.context.shape == (6, WIDTH)


def test_names_that_begin_alike_do_not_join_the_context() -> None:
    learner = PromptLearner(small_clip(), tokenizer, ["red dog", "red cat"])
    assert learner.context.shape == (4, WIDTH)


def test_one_class() -> None:
    learner = PromptLearner(small_clip(), tokenizer, ["dog"])
    assert learner.context.shape == (4, WIDTH)
    assert learner().shape == (1, EMBED)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_model_keeps_an_fp32_context(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = CLIP(EMBED, VISION, CLIPTextCfg(**SIZES), cast_dtype=dtype).eval().requires_grad_(False)
    convert_weights_to_lp(model, dtype)
    model.token_embedding.to(dtype)
    learner = PromptLearner(model, tokenizer, NAMES)
    features = learner()
    features[:, 0].sum().backward()
    assert learner.context.dtype == learner.context.grad.dtype == features.dtype == torch.float32
    expected = F.normalize(model.encode_text(tokenizer(PROMPTS, CONTEXT)).float(), dim=-1)
    torch.testing.assert_close(features, expected, rtol=0, atol=2e-2)


def test_state_dict_holds_the_context_alone_and_fits_other_classes() -> None:
    model = small_clip()
    learner = PromptLearner(model, tokenizer, NAMES)
    with torch.no_grad():
        learner.context.normal_()
    assert list(learner.state_dict()) == ["context"]
    assert [name for name, _ in learner.named_parameters()] == ["context"]
    assert list(learner.children()) == []
    file = io.BytesIO()
    torch.save(learner.state_dict(), file)
    assert file.tell() < 4 * WIDTH * 4 + 2000  # no view into a larger storage
    other = PromptLearner(model, tokenizer, ["zebra", *NAMES])
    other.load_state_dict(learner.state_dict())
    torch.testing.assert_close(other()[1:], learner(), rtol=0, atol=2e-6)


def test_moving_the_learner_moves_its_buffers_but_not_the_model() -> None:
    model = small_clip()
    learner = PromptLearner(model, tokenizer, NAMES).to("meta")
    assert learner.context.device.type == "meta"
    assert {buffer.device.type for buffer in learner.buffers()} == {"meta"}
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}


@pytest.mark.parametrize("kind", MODELS)
def test_everything_is_created_on_the_models_device(kind: str) -> None:
    """On the meta device any tensor that was left on the CPU is an error, as it is on a GPU."""
    model, tokenize = MODELS[kind]()
    learner = PromptLearner(model, tokenize, NAMES)
    model.to("meta")
    with pytest.raises(
        ValueError, match="embeddings is on cpu, but the text tower is on meta; move"
    ):
        learner()
    features = learner.to("meta")()
    assert features.device.type == "meta"
    assert features.shape == (4, EMBED)


def test_double_learner_still_runs_in_the_towers_dtype() -> None:
    learner = PromptLearner(small_clip(), tokenizer, NAMES)
    expected = learner()
    torch.testing.assert_close(learner.double()(), expected, rtol=0, atol=2e-6)


def test_deepcopy_is_independent() -> None:
    model = small_clip()
    learner = PromptLearner(model, tokenizer, NAMES)
    expected = learner().detach()
    twin = copy.deepcopy(learner)
    with torch.no_grad():
        learner.context.add_(1.0)
        model.positional_embedding.add_(1.0)
    torch.testing.assert_close(twin(), expected, rtol=0, atol=0)


@pytest.mark.parametrize("learner_first", [True, False])
def test_deepcopy_with_the_model_follows_the_copied_model(learner_first: bool) -> None:
    model = small_clip()
    learner = PromptLearner(model, tokenizer, NAMES)
    if learner_first:
        twin, twin_model = copy.deepcopy((learner, model))
    else:
        twin_model, twin = copy.deepcopy((model, learner))
    before = twin().detach()
    with torch.no_grad():
        twin_model.positional_embedding.normal_()
    assert (twin() - before).abs().max() > 1e-3
    torch.testing.assert_close(learner(), before, rtol=0, atol=0)


def test_a_change_of_the_model_is_seen() -> None:
    """Nothing is cached, so nothing can be stale."""
    model = small_clip()
    learner = PromptLearner(model, tokenizer, NAMES)
    learner.requires_grad_(False)
    before = learner()
    model.positional_embedding.data.normal_()
    assert (learner() - before).abs().max() > 1e-3


@pytest.mark.parametrize("context", ["", "   "])
def test_empty_context_is_refused(context: str) -> None:
    with pytest.raises(ValueError, match=r"context=' *' is empty.*context='a photo of a'"):
        PromptLearner(small_clip(), tokenizer, NAMES, context=context)


def test_context_that_tokenizes_to_nothing_is_refused() -> None:
    def letters_only(texts: list[str], context_length: int) -> Tensor:
        return tokenizer([text.replace("...", "") for text in texts], context_length)

    with pytest.raises(
        ValueError, match=r"context='\.\.\.' has no token of its own.*'a photo of a'"
    ):
        PromptLearner(small_clip(), letters_only, NAMES, context="...")


def test_class_names_are_checked() -> None:
    model = small_clip()
    with pytest.raises(ValueError, match="class_names is empty; give the names"):
        PromptLearner(model, tokenizer, [])
    with pytest.raises(ValueError, match=r"class_names\[1\]='_' is blank"):
        PromptLearner(model, tokenizer, ["dog", "_"])
    with pytest.raises(TypeError, match=r"class_names is the string 'dog'.*\['dog'\]"):
        PromptLearner(model, tokenizer, "dog")


@pytest.mark.parametrize("pair", [("dog", "dog"), ("hot_dog", "hot dog"), ("Dog", "dog")])
def test_names_that_give_one_prompt_are_refused(pair: tuple[str, str]) -> None:
    with pytest.raises(ValueError, match="class_names gives the same prompt twice") as error:
        PromptLearner(small_clip(), tokenizer, ["cat", *pair])
    for name in pair:
        assert repr(f"a photo of a {name.replace('_', ' ')}.") in str(error.value)


@pytest.mark.parametrize("kind", ["CLIP", "SigLIP-like", "CLIPA-like"])
def test_too_long_prompts_are_refused_and_the_longest_that_fits_is_not(kind: str) -> None:
    model, tokenize = MODELS[kind]()
    # Start token, four words of context, "." and the end token.
    room = CONTEXT - {"CLIP": 7, "SigLIP-like": 6, "CLIPA-like": 6}[kind]
    fits = " ".join(["dog"] * room)
    assert PromptLearner(model, tokenize, ["cat", fits])().shape == (2, EMBED)
    with pytest.raises(ValueError, match="more tokens than the 20 that the text tower") as error:
        PromptLearner(model, tokenize, ["cat", fits + " dog", fits + " dog dog dog"])
    message = str(error.value)
    assert repr(f"a photo of a {fits} dog.") in message
    assert "2 of 3 prompts are too long" in message
    assert "shorten the class name or the context" in message
