"""What the prompts have in common is computed once: which rows are, and when none can be spared."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("open_clip")

from open_clip.model import (
    CLIP,
    CLIPTextCfg,
    CLIPVisionCfg,
    CustomTextCLIP,
    convert_weights_to_lp,
)

from ueo_fast.finetune.clip import text_tower
from ueo_fast.finetune.clip.text_tower import (
    Packing,
    embed_tokens,
    encode_embeddings,
    encode_packed,
    pack,
)

LENGTH, VOCAB, WIDTH, EMBED, PREFIX = 12, 64, 32, 24, 3
SIZES = {
    "context_length": LENGTH,
    "vocab_size": VOCAB,
    "width": WIDTH,
    "heads": 4,
    "layers": 3,
}
VISION = CLIPVisionCfg(image_size=16, patch_size=8, width=16, layers=1, head_width=16)
ENDS = (6, 4, 12, 4, 7, 6, 5)
"""Tokens of each prompt, the end included: two lengths twice, not in order, one without padding."""


def make_tokens(ends: tuple[int, ...] = ENDS) -> Tensor:
    tokens = torch.zeros(len(ends), LENGTH, dtype=torch.int64)
    generator = torch.Generator().manual_seed(0)
    for row, end in zip(tokens, ends, strict=True):
        row[:end] = torch.randint(1, VOCAB - 1, (end,), generator=generator)
        row[end - 1] = VOCAB - 1
    tokens[:, :PREFIX] = tokens[0, :PREFIX].clone()
    return tokens


def make_clip(cls: type[nn.Module] = CLIP, **options: Any) -> Any:
    torch.manual_seed(0)
    model = cls(EMBED, VISION, CLIPTextCfg(**SIZES), **options).eval().requires_grad_(False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def transformer(model: Any) -> Any:
    return getattr(model, "text", model).transformer


Split = tuple[Tensor, Tensor]


def split_embeddings(model: Any, tokens: Tensor) -> Split:
    """The prefix's embeddings and those after it."""
    embeddings = embed_tokens(model, tokens)
    return embeddings[0, :PREFIX].clone(), embeddings[:, PREFIX:].clone()


def ordinary(model: Any, parts: Split, tokens: Tensor) -> Tensor:
    prefix, suffixes = parts
    whole = torch.cat([prefix.expand(len(suffixes), -1, -1), suffixes], dim=1)
    return encode_embeddings(model, whole, tokens)


def packed(model: Any, parts: Split, tokens: Tensor) -> Tensor:
    packing = pack(model, tokens, PREFIX)
    assert packing is not None
    return encode_packed(model, *parts, tokens, packing)


Encode = Callable[[Any, Split, Tensor], Tensor]


def features_and_gradients(encode: Encode, model: Any, tokens: Tensor) -> list[Tensor]:
    parts = tuple(part.requires_grad_() for part in split_embeddings(model, tokens))
    features = encode(model, parts, tokens)
    weights = torch.linspace(-1, 1, features.numel()).view_as(features).to(features.dtype)
    return [features.detach(), *torch.autograd.grad((features * weights).sum(), parts)]


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("cls", [CLIP, CustomTextCLIP])
@pytest.mark.parametrize("ends", [ENDS, (5,), (7, 7, 7), (4, 12), tuple(range(12, 3, -1))], ids=str)
def test_features_and_gradients_are_those_of_the_whole_tower(
    cls: type[nn.Module], dtype: torch.dtype, limit: float, ends: tuple[int, ...]
) -> None:
    model, tokens = make_clip(cls).to(dtype), make_tokens(ends)
    found = features_and_gradients(packed, model, tokens)
    expected = features_and_gradients(ordinary, model, tokens)
    for ours, truth in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, truth, rtol=limit, atol=limit * float(truth.abs().max()))


@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "bf16 weights"])
def test_in_half_precision_it_is_as_close_to_the_truth_as_the_whole_tower(autocast: bool) -> None:
    tokens = make_tokens()
    exact = features_and_gradients(ordinary, make_clip().double(), tokens)
    model = make_clip(cast_dtype=None if autocast else torch.bfloat16)
    if not autocast:
        convert_weights_to_lp(model, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        ours = features_and_gradients(packed, model, tokens)
        eager = features_and_gradients(ordinary, model, tokens)
    for mine, theirs, truth in zip(ours, eager, exact, strict=True):
        assert mine.dtype == theirs.dtype
        error, usual = ((x - truth).abs() for x in (mine.double(), theirs.double()))
        assert error.mean() <= 1.5 * usual.mean()
        assert error.max() <= usual.max() + 0.02 * truth.abs().max()


def test_no_row_is_computed_twice_and_the_last_block_computes_the_ends_only() -> None:
    model, tokens = make_clip(), make_tokens()
    rows: list[int] = []
    for block in transformer(model).resblocks:
        block.mlp.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    packed(model, split_embeddings(model, tokens), tokens)
    every = PREFIX + sum(end - PREFIX for end in ENDS)
    assert rows == [every, every, len(ENDS)]


def test_the_packing_of_four_prompts() -> None:
    packing = pack(make_clip(), make_tokens((6, 4, 5, 4)), PREFIX)
    assert packing is not None
    assert packing.prefix == PREFIX
    assert packing.groups == ((2, 1), (1, 2), (1, 3))
    after = LENGTH - PREFIX
    assert packing.rows.tolist() == [
        *(after, 3 * after),
        *(2 * after, 2 * after + 1),
        *(0, 1, 2),
    ]
    assert packing.places.tolist() == [3, 0, 2, 1]


def hook(module: nn.Module, calls: list[str]) -> None:
    module.register_forward_hook(lambda *_: calls.append("forward"))


def pre_hook(module: nn.Module, calls: list[str]) -> None:
    module.register_forward_pre_hook(lambda *_: calls.append("forward pre"))


def backward_hook(module: nn.Module, calls: list[str]) -> None:
    module.register_full_backward_hook(lambda *_: calls.append("backward"))


def own_forward(module: nn.Module, calls: list[str]) -> None:
    usual = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        calls.append("own forward")
        return usual(*args, **kwargs)

    module.forward = forward  # type: ignore[method-assign]


@pytest.mark.parametrize("meddle", [hook, pre_hook, backward_hook, own_forward])
@pytest.mark.parametrize("path", ["", "resblocks.1", "resblocks.1.attn"])
def test_what_is_attached_to_a_module_that_is_passed_over_is_called(
    meddle: Callable[[nn.Module, list[str]], None], path: str
) -> None:
    model, tokens = make_clip(), make_tokens()
    expected = features_and_gradients(ordinary, model, tokens)
    calls: list[str] = []
    meddle(transformer(model).get_submodule(path), calls)
    found = features_and_gradients(packed, model, tokens)
    assert calls
    for ours, truth in zip(found, expected, strict=True):
        # A backward hook changes the order in which autograd adds three gradients.
        torch.testing.assert_close(ours, truth, rtol=1e-5, atol=1e-5)


class Halved(nn.MultiheadAttention):
    """An attention that is not PyTorch's own."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        result, weights = super().forward(*args, **kwargs)
        return result / 2, weights


def test_another_attention_is_called() -> None:
    model, tokens = make_clip(), make_tokens()
    parts = split_embeddings(model, tokens)
    before = packed(model, parts, tokens)
    transformer(model).resblocks[0].attn.__class__ = Halved
    after = packed(model, parts, tokens)
    assert (after - before).abs().max() > 1e-3
    torch.testing.assert_close(after, ordinary(model, parts, tokens), rtol=0, atol=0)


def test_dropout_is_dropped_out_in_training_mode_only() -> None:
    model, tokens = make_clip(), make_tokens()
    parts = split_embeddings(model, tokens)
    before = packed(model, parts, tokens)
    transformer(model).resblocks[0].attn.dropout = 0.5
    torch.testing.assert_close(packed(model, parts, tokens), before, rtol=0, atol=0)
    assert text_tower._is_plain(transformer(model))
    model.train()
    torch.manual_seed(0)
    found = packed(model, parts, tokens)
    torch.manual_seed(0)
    torch.testing.assert_close(found, ordinary(model, parts, tokens), rtol=0, atol=0)
    assert (found - before).abs().max() > 1e-3


def test_gradient_checkpointing_gives_the_same_gradients_and_keeps_less() -> None:
    tokens = make_tokens()
    results, kept = [], []
    for checkpointing in (False, True):
        model = make_clip().double()
        model.set_grad_checkpointing(checkpointing)
        sizes: list[int] = []

        def pack_tensor(tensor: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack_tensor, lambda tensor: tensor):
            results.append(features_and_gradients(packed, model, tokens))
        kept.append(sum(sizes))
    for plain, checkpointed in zip(*results, strict=True):
        torch.testing.assert_close(checkpointed, plain, rtol=0, atol=1e-14)
    assert kept[1] < 0.7 * kept[0]


def test_it_compiles_into_one_graph() -> None:
    model, tokens = make_clip(), make_tokens()
    parts, packing = split_embeddings(model, tokens), pack(model, tokens, PREFIX)

    @torch.compile(backend="eager", fullgraph=True)
    def encode(prefix: Tensor, suffixes: Tensor) -> Tensor:
        return encode_packed(model, prefix, suffixes, tokens, packing)

    expected = packed(model, parts, tokens)
    torch.testing.assert_close(encode(*parts), expected, rtol=0, atol=1e-6)


def test_second_backward_and_inference_mode() -> None:
    model, tokens = make_clip().double(), make_tokens((4, 6))
    prefix, suffixes = split_embeddings(model, tokens)
    prefix.requires_grad_()
    features = packed(model, (prefix, suffixes), tokens)
    loss = features.square().sum()
    first = torch.autograd.grad(loss, prefix, retain_graph=True)
    again = torch.autograd.grad(loss, prefix)
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    with torch.inference_mode():
        torch.testing.assert_close(
            packed(model, (prefix, suffixes), tokens), features, rtol=0, atol=1e-14
        )


def without_pooling_position(model: Any) -> None:
    model.text_pool_type = "last"


def looking_ahead(model: Any) -> None:
    model.attn_mask[0, -1] = 0


def short_sighted(model: Any) -> None:
    model.attn_mask[-1, 0] = float("-inf")


def biased(model: Any) -> None:
    model.attn_mask[3, 1] = 0.5


def unmasked(model: Any) -> None:
    model.attn_mask = None


@pytest.mark.parametrize(
    "change", [without_pooling_position, looking_ahead, short_sighted, biased, unmasked]
)
def test_a_tower_that_is_not_plainly_causal_is_run_whole(change: Callable[[Any], None]) -> None:
    model, tokens = make_clip(), make_tokens()
    change(model)
    assert pack(model, tokens, PREFIX) is None
    parts = split_embeddings(model, tokens)
    expected = ordinary(model, parts, tokens)
    found = encode_packed(model, *parts, tokens, None)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_a_prompt_that_ends_within_the_prefix_is_not_packed() -> None:
    model, tokens = make_clip(), make_tokens()
    tokens[:, 1] = VOCAB - 1  # the largest token: an "argmax" tower is pooled there
    assert pack(model, tokens, PREFIX) is None


def test_prompts_that_do_not_begin_alike_are_refused() -> None:
    model, tokens = make_clip(), make_tokens()
    tokens[1, PREFIX - 1] += 1
    message = f"prefix={PREFIX}, but the prompts have not that many positions in common; give"
    with pytest.raises(ValueError, match=message):
        pack(model, tokens, PREFIX)
    with pytest.raises(ValueError, match="prefix=0, but"):
        pack(model, tokens, 0)


def test_the_rows_are_on_the_models_device() -> None:
    model, tokens = make_clip(), make_tokens()
    packing, parts = pack(model, tokens, PREFIX), split_embeddings(model, tokens)
    assert packing is not None
    model.to("meta")
    with pytest.raises(ValueError, match="embeddings is on cpu, but the text tower is on meta"):
        encode_packed(model, *parts, tokens, packing)
    moved = Packing(
        packing.prefix, packing.groups, packing.rows.to("meta"), packing.places.to("meta")
    )
    features = encode_packed(model, *(part.to("meta") for part in parts), tokens, moved)
    assert features.shape == (len(ENDS), EMBED)


def test_a_deep_copy_is_packed_as_well() -> None:
    model, tokens = make_clip(), make_tokens()
    parts = split_embeddings(model, tokens)
    assert text_tower._is_plain(transformer(copy.deepcopy(model)))
    torch.testing.assert_close(
        packed(copy.deepcopy(model), parts, tokens), packed(model, parts, tokens), rtol=0, atol=0
    )
