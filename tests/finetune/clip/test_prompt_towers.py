"""The prompt learner on text towers of others: their own code runs, embeddings go in by a hook."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

open_clip = pytest.importorskip("open_clip")

from open_clip.model import CLIP, CustomTextCLIP  # noqa: E402
from small_prompts import (  # noqa: E402
    CONTEXT,
    EMBED,
    NAMES,
    PROMPTS,
    WIDTH,
    small_clip,
    tokenizer,
)

from ueo_fast.finetune.clip.prompt import PromptLearner  # noqa: E402


class Attention(nn.Module):
    """As HuggingFace's towers: everything depends on everything, but for the padding.

    The truth for the hook: the same from embeddings, written out.
    """

    def __init__(self, nested: bool) -> None:
        super().__init__()
        words = nn.Embedding(400, WIDTH, padding_idx=0)
        self.embeddings = nn.ModuleDict({"word_embeddings": words}) if nested else words
        self.positions = nn.Embedding(CONTEXT, WIDTH)
        self.layer = nn.TransformerEncoderLayer(WIDTH, 2, 64, batch_first=True)
        self.projection = nn.Linear(WIDTH, EMBED, bias=False)

    def words(self, tokens: Tensor) -> Tensor:
        nested = isinstance(self.embeddings, nn.ModuleDict)
        table = self.embeddings["word_embeddings"] if nested else self.embeddings
        return table(tokens)

    def from_words(self, words: Tensor, tokens: Tensor) -> Tensor:
        known = tokens != 0
        x = words + self.positions(known.long().cumsum(1) - 1 + (~known).long())
        x = self.layer(x, src_key_padding_mask=~known)
        x = x.masked_fill(~known[..., None], 0).sum(1) / known.sum(1, keepdim=True)
        return self.projection(x)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.from_words(self.words(tokens), tokens)


class TwoTowers(nn.Module):
    def __init__(self, text: nn.Module) -> None:
        super().__init__()
        self.text = text

    def encode_text(self, tokens: Tensor, normalize: bool = False) -> Tensor:
        return self.text(tokens)


class PaddingTokenizer:
    """``padding`` is at the "end", the "beginning", or, as in CLIPS, before a last "class" token.

    ``context_length`` is what models use that do not say how many tokens they take.
    """

    context_length = CONTEXT

    def __init__(self, padding: str) -> None:
        self.padding = padding
        self.ids: dict[str, int] = {}

    def __call__(self, texts: list[str], context_length: int) -> Tensor:
        last = [3] if self.padding == "class" else []
        rows = []
        for text in texts:
            words = text.lower().replace(".", " .").split()
            ids = [self.ids.setdefault(word, 10 + len(self.ids)) for word in words]
            row = [1, *ids[: context_length - 2 - len(last)], 2]
            pad = [0] * (context_length - len(row) - len(last))
            rows.append([*pad, *row] if self.padding == "beginning" else [*row, *pad, *last])
        return torch.tensor(rows)


PADDINGS = ["end", "beginning", "class"]


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("nested", [True, False])
def test_any_text_tower_gives_its_own_features_and_gradients(nested: bool, padding: str) -> None:
    torch.manual_seed(0)
    model = TwoTowers(Attention(nested)).double().eval().requires_grad_(False)
    tokenizer = PaddingTokenizer(padding)
    learner = PromptLearner(model, tokenizer, NAMES)
    tokens = tokenizer(PROMPTS, context_length=CONTEXT)
    expected = F.normalize(model.encode_text(tokens), dim=-1)
    torch.testing.assert_close(learner(), expected, rtol=0, atol=1e-12)

    learner.context.data.add_(0.1)
    changed = model.text.words(tokens)
    context = learner.context.detach().clone().requires_grad_(True)
    places = (tokens == tokenizer.ids["photo"]).int().argmax(1)
    rows = []
    for row, place in zip(changed, places.tolist(), strict=True):
        start = place - 1  # of "a photo of a"
        rows.append(torch.cat([row[:start], context, row[start + 4 :]]))
    truth = F.normalize(model.text.from_words(torch.stack(rows), tokens), dim=-1)
    torch.testing.assert_close(learner(), truth, rtol=0, atol=1e-12)
    weights = torch.randn(truth.shape, dtype=truth.dtype)
    (found,) = torch.autograd.grad((learner() * weights).sum(), learner.context)
    (wanted,) = torch.autograd.grad((truth * weights).sum(), context)
    assert wanted.abs().max() > 1e-3
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("padding", PADDINGS)
def test_open_clips_towers_with_other_paddings(padding: str) -> None:
    model = small_clip(CustomTextCLIP, no_causal_mask=True, pool_type="last")
    tokenizer = PaddingTokenizer(padding)
    learner = PromptLearner(model, tokenizer, NAMES)
    expected = model.encode_text(tokenizer(PROMPTS, context_length=CONTEXT), normalize=True)
    torch.testing.assert_close(learner(), expected, rtol=0, atol=3e-7)
    assert learner.is_open_clips == (padding != "beginning")


@pytest.mark.parametrize("padding", PADDINGS)
def test_too_long_prompts_are_found_whatever_the_padding(padding: str) -> None:
    tokenizer = PaddingTokenizer(padding)
    model = small_clip(CustomTextCLIP, no_causal_mask=True, pool_type="last")
    words = CONTEXT - 7 - (padding == "class")  # start, a photo of a, full stop, end
    PromptLearner(model, tokenizer, ["dog", " ".join(["dog"] * words)])
    with pytest.raises(ValueError, match="more tokens than the 20"):
        PromptLearner(model, tokenizer, ["dog", " ".join(["dog"] * (words + 1))])


def test_an_encode_text_of_ones_own_is_run_as_it_is() -> None:
    class Prefixed(CLIP):
        def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
            features = 2 * super().encode_text(text) + 1
            return F.normalize(features, dim=-1) if normalize else features

    model = small_clip(Prefixed)
    learner = PromptLearner(model, tokenizer, NAMES)
    tokens = tokenizer(PROMPTS, context_length=CONTEXT)
    with torch.no_grad():
        expected = model.encode_text(tokens, normalize=True)
        torch.testing.assert_close(learner(), expected, rtol=0, atol=3e-7)
    learner().sum().backward()
    assert learner.context.grad is not None


def test_a_tower_that_only_adds_words_can_be_used_but_not_learnt() -> None:
    class Bag(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(400, EMBED)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.words(tokens).mean(1)

    model = TwoTowers(Bag())
    tokenizer = PaddingTokenizer("end")
    learner = PromptLearner(model, tokenizer, NAMES)
    expected = F.normalize(model.encode_text(tokenizer(PROMPTS, context_length=CONTEXT)), dim=-1)
    torch.testing.assert_close(learner(), expected, rtol=0, atol=0)
    assert learner.context.numel() == 0
    with pytest.raises(ValueError, match=r"text tower Bag has no token embedding.*--train affine"):
        learner.check_trainable()


@pytest.mark.parametrize("kind", ["Bert", "Roberta", "MT5", "M2M100"])
def test_text_towers_of_hugging_face(kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 400, "pad_token_id": 0, "max_position_embeddings": 40}
    sizes |= {"d_model": 32, "d_ff": 64, "d_kv": 16, "num_layers": 1, "num_heads": 2}
    sizes |= {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    if kind in ("Bert", "Roberta"):
        sizes["intermediate_size"] = 64
    if kind == "M2M100":
        sizes |= {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2}
    config = getattr(transformers, f"{kind}Config")(**sizes)
    text = open_clip.hf_model.HFTextEncoder(
        "", output_dim=EMBED, config=config, pooler_type="mean_pooler", proj_type="mlp"
    )
    if config.is_encoder_decoder:
        text.transformer = text.transformer.encoder
    model = TwoTowers(text).eval()
    tokenizer = PaddingTokenizer("end")
    learner = PromptLearner(model, tokenizer, NAMES)
    with torch.no_grad():
        expected = model.encode_text(tokenizer(PROMPTS, context_length=CONTEXT))
        torch.testing.assert_close(learner(), F.normalize(expected, dim=-1), rtol=0, atol=3e-7)
    learner()[:, 0].sum().backward()
    assert learner.context.grad.abs().max() > 0
