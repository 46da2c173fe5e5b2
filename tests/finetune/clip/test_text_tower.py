"""The text tower from embeddings, whole and cut, on every kind that open_clip can build."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

open_clip = pytest.importorskip("open_clip")

from open_clip.coca_model import CoCa  # noqa: E402
from open_clip.hf_model import HFTextEncoder  # noqa: E402
from open_clip.model import (  # noqa: E402
    CLIP,
    CLIPTextCfg,
    CLIPVisionCfg,
    CustomTextCLIP,
    convert_weights_to_lp,
)
from open_clip.transformer import TextTransformer  # noqa: E402

from ueo_fast.finetune.clip.text_tower import (  # noqa: E402  # noqa: E402
    context_length,
    embed_tokens,
    encode_embeddings,
    encode_packed,
    pack,
    useful_length,
)

CONTEXT, VOCAB, WIDTH, EMBED = 12, 64, 32, 24
SIZES = {
    "context_length": CONTEXT,
    "vocab_size": VOCAB,
    "width": WIDTH,
    "heads": 2,
    "layers": 2,
}
VISION = {"image_size": 16, "patch_size": 8, "width": 16, "layers": 1, "head_width": 16}
PROMPT_LENGTHS = (4, 7, 5)
COMMON = 2
"""Leading tokens that the prompts share."""

# What is not part of a tower's kind: its size, and how its text is tokenized.
NOT_KIND = {*SIZES, "hf_tokenizer_name", "tokenizer_kwargs", "tokenizer_mode"}


def make_tokens(text_cfg: dict[str, Any]) -> Tensor:
    """(3, CONTEXT): start token, words, end-of-text token, padding; the longest ends at 6."""
    pad = text_cfg.get("pad_id", 0)
    # "argmax" pools at the largest id, as CLIP's vocabulary has its end-of-text token last.
    eot = text_cfg.get("eos_id", 2) if text_cfg.get("pool_type") == "eos" else VOCAB - 1
    generator = torch.Generator().manual_seed(0)
    tokens = torch.full((len(PROMPT_LENGTHS), CONTEXT), pad)
    for row, length in zip(tokens, PROMPT_LENGTHS, strict=True):
        row[:length] = torch.randint(5, VOCAB - 1, (length,), generator=generator)
        row[length - 1] = eot
    tokens[:, :COMMON] = tokens[0, :COMMON].clone()
    return tokens


def randomised(model: nn.Module) -> nn.Module:
    """Double precision, and no parameter at an initial value that could hide it (0 or 1)."""
    generator = torch.Generator().manual_seed(1)
    model = model.double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.add_(0.1 * noise)
    return model


def text_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if not name.startswith(("visual.", "text_decoder.", "logit_"))
        and "token_embedding" not in name  # the embeddings stand in for it
    }


def encode_text(model: nn.Module, tokens: Tensor) -> Tensor:
    """open_clip's own features, not normalised."""
    output = model.encode_text(tokens, normalize=False)
    assert isinstance(output, Tensor)
    return output


def positions_read(model: nn.Module, tokens: Tensor) -> int:
    """One more than the last position that open_clip's own features depend on."""
    tower = getattr(model, "text", model)
    (gradient,) = torch.autograd.grad(
        encode_text(model, tokens).square().sum(), tower.positional_embedding
    )
    return int(gradient.abs().sum(dim=1).nonzero().max()) + 1


def output_weights(features: Tensor) -> Tensor:
    return torch.linspace(-1, 1, features.numel(), dtype=features.dtype).view_as(features)


def gradients_of(
    model: nn.Module, tokens: Tensor, length: int, packed: bool = False
) -> tuple[Tensor, Tensor, dict[str, Tensor | None]]:
    """Features; gradient of the first ``length`` embeddings; gradients of the text parameters.

    With ``packed`` the first ``COMMON`` embeddings of the first class stand for those of all.
    """
    tokens = tokens[:, :length]
    embeddings = embed_tokens(model, tokens).detach().requires_grad_()
    if packed:
        prefix, suffixes = embeddings[0, :COMMON], embeddings[:, COMMON:]
        packing = pack(model, tokens, COMMON)
        features = encode_packed(model, prefix, suffixes, tokens, packing)
    else:
        features = encode_embeddings(model, embeddings, tokens)
    parameters = text_parameters(model)
    gradients = torch.autograd.grad(
        (features * output_weights(features)).sum(),
        [embeddings, *parameters.values()],
        allow_unused=True,
    )
    named = dict(zip(parameters, gradients[1:], strict=True))
    return features.detach(), gradients[0], named


def check_tower(model: nn.Module, tokens: Tensor) -> int:
    """The contract of text_tower on one model; returns the useful length."""
    with torch.no_grad():
        ours = encode_embeddings(model, embed_tokens(model, tokens), tokens)
        torch.testing.assert_close(ours, encode_text(model, tokens), rtol=1e-12, atol=1e-12)
    length = useful_length(model, tokens)
    whole = gradients_of(model, tokens, tokens.shape[1])
    cut = gradients_of(model, tokens, length)
    torch.testing.assert_close(cut[0], whole[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(cut[1], whole[1][:, :length], rtol=1e-11, atol=1e-12)
    assert not whole[1][:, length:].any()
    packed = gradients_of(model, tokens, length, packed=True)
    torch.testing.assert_close(packed[0], whole[0], rtol=1e-12, atol=1e-12)
    summed = cut[1].clone()
    summed[0, :COMMON] = summed[:, :COMMON].sum(dim=0)
    summed[1:, :COMMON] = 0
    torch.testing.assert_close(packed[1], summed, rtol=1e-11, atol=1e-12)
    features = encode_text(model, tokens)
    parameters = text_parameters(model)
    expected = torch.autograd.grad(
        (features * output_weights(features)).sum(), list(parameters.values())
    )
    for name, truth in zip(parameters, expected, strict=True):
        for ours in (whole[2][name], cut[2][name], packed[2][name]):
            torch.testing.assert_close(
                ours, truth, rtol=1e-11, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}"
            )
    return length


def published_kinds() -> dict[str, tuple[str, dict[str, Any]]]:
    """Every distinct set of text options among open_clip's configurations, without HuggingFace's.

    Keys are readable; values are the name of one model of that kind, and its text_cfg.
    """
    kinds: dict[str, tuple[str, dict[str, Any]]] = {}
    for name in open_clip.list_models():
        config = open_clip.get_model_config(name)
        text = config["text_cfg"]
        if "hf_model_name" in text:
            continue
        options = {key: value for key, value in text.items() if key not in NOT_KIND}
        for key in ("custom_text", "quick_gelu"):
            if config.get(key):
                options[key] = True
        options["class"] = "CoCa" if "multimodal_cfg" in config else "CLIP"
        kinds.setdefault(json.dumps(options, sort_keys=True), (name, text))
    return kinds


KINDS = published_kinds()


@pytest.mark.parametrize("kind", KINDS)
def test_every_published_kind_of_tower(kind: str) -> None:
    """Built by open_clip's factory as published, but narrow and shallow."""
    name, text_cfg = KINDS[kind]
    shrunken = {**text_cfg, **SIZES}
    overrides: dict[str, Any] = {"embed_dim": WIDTH, "vision_cfg": VISION, "text_cfg": shrunken}
    if '"CoCa"' in kind:
        overrides["vision_cfg"] = {**VISION, "output_tokens": True}
        overrides["multimodal_cfg"] = SIZES
    model = randomised(open_clip.create_model(name, pretrained=None, **overrides))
    tokens = make_tokens(shrunken)
    length = check_tower(model, tokens)
    causal = not text_cfg.get("no_causal_mask")
    pooled_at_eot = text_cfg.get("pool_type", "argmax") in ("argmax", "eos")
    cuttable = causal and pooled_at_eot and not text_cfg.get("embed_cls")
    assert length == (max(PROMPT_LENGTHS) if cuttable else CONTEXT)
    assert (pack(model, tokens, COMMON) is not None) == cuttable
    if "cls" not in kind:
        # Exactly what open_clip reads: not a position too many, not one too few.
        assert positions_read(model, tokens) == length


def test_the_published_kinds_are_not_an_empty_list() -> None:
    """The walk over open_clip's configurations sees the families that it is there for."""
    options = [json.loads(kind) for kind in KINDS]
    assert {option["class"] for option in options} == {"CLIP", "CoCa"}
    assert any(option.get("quick_gelu") for option in options)
    assert any(option.get("pool_type") == "eos" for option in options)
    assert any(option.get("pool_type") == "last" and option.get("proj_bias") for option in options)
    assert any(option.get("proj_type") == "none" for option in options)
    assert any(option.get("no_causal_mask") and "pool_type" not in option for option in options)
    assert any(option.get("embed_cls") for option in options)
    assert any("act_kwargs" in option for option in options)


def small_clip(cls: type[nn.Module] = CLIP, **text_options: Any) -> nn.Module:
    cfg = CLIPTextCfg(**SIZES, **text_options)
    return randomised(cls(EMBED, CLIPVisionCfg(**VISION), cfg))


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "projection none": {"proj_type": "none"},
    "projection Linear": {"proj_bias": True},
    "eos pooling": {"pool_type": "eos", "eos_id": 3},
    "first pooling": {"pool_type": "first"},
    "last pooling, causal": {"pool_type": "last"},
    "no causal mask": {"no_causal_mask": True},
    "SigLIP": {"no_causal_mask": True, "pool_type": "last", "proj_bias": True},
    "layer scale": {"ls_init_value": 0.1},
    "tanh GELU": {"act_kwargs": {"approximate": "tanh"}},
    "norm eps": {"norm_kwargs": {"eps": 1e-3}},
    "mlp ratio": {"mlp_ratio": 3.7362},
    "final ln after pool": {"final_ln_after_pool": True},
    "custom block": {
        "qk_norm": True,
        "scale_heads": True,
        "scale_attn_inner": True,
        "scale_attn": True,
        "scale_fc": True,
    },
}


@pytest.mark.parametrize("cls", [CLIP, CustomTextCLIP])
@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_of_the_text_config(cls: type[nn.Module], option: str) -> None:
    model = small_clip(cls, **OPTIONS[option])
    tokens = make_tokens(OPTIONS[option])
    assert check_tower(model, tokens) >= positions_read(model, tokens)


# TextTransformer knows these, open_clip's configurations (3.3) do not reach them.
TOWER_OPTIONS: dict[str, dict[str, Any]] = {
    "pad mask, argmax": {"use_pad_mask": True, "no_causal_mask": True},
    "pad mask, eos": {"use_pad_mask": True, "no_causal_mask": True, "pool_type": "eos"},
    "pad mask, first": {"use_pad_mask": True, "no_causal_mask": True, "pool_type": "first"},
    "pad mask, last": {"use_pad_mask": True, "no_causal_mask": True, "pool_type": "last"},
    "pad mask asked of a causal tower": {"use_pad_mask": True},
    "pad id": {"use_pad_mask": True, "no_causal_mask": True, "pad_id": 1},
    "class token": {"embed_cls": True},
    "class token, correct mask": {"embed_cls": True, "correct_cls_mask": True},
    "class token, no causal mask": {"embed_cls": True, "no_causal_mask": True},
    "class token, pad id": {"embed_cls": True, "pad_id": 1, "correct_cls_mask": True},
}


@pytest.mark.parametrize("option", TOWER_OPTIONS)
def test_every_option_of_the_tower(option: str) -> None:
    options = TOWER_OPTIONS[option]
    model = CustomTextCLIP(EMBED, CLIPVisionCfg(**VISION), CLIPTextCfg(**SIZES))
    model.text = TextTransformer(**SIZES, output_dim=EMBED, **options)
    model = randomised(model)
    tokens = make_tokens(options)
    # A class token comes after the padding, so its tower keeps its full length.
    expected = max(PROMPT_LENGTHS) if option == "pad mask asked of a causal tower" else CONTEXT
    assert check_tower(model, tokens) == expected


def test_the_pad_mask_is_not_a_no_op() -> None:
    """Guards the tests above: hiding the padding does change these towers' features."""
    torch.manual_seed(0)
    tower = TextTransformer(**SIZES, output_dim=EMBED, no_causal_mask=True, use_pad_mask=True)
    tokens = make_tokens({})
    masked = tower(tokens)
    tower.use_pad_mask = False
    assert (masked - tower(tokens)).abs().max() > 1e-3


def test_coca_is_compared_unnormalised_and_knows_its_length() -> None:
    cfg = CLIPTextCfg(**SIZES, embed_cls=True, output_tokens=True)
    model = randomised(CoCa(EMBED, SIZES, cfg, CLIPVisionCfg(**VISION, output_tokens=True)))
    tokens = make_tokens({})
    assert context_length(model) == CONTEXT
    features = encode_embeddings(model, embed_tokens(model, tokens), tokens)
    assert (features.norm(dim=-1) - 1).abs().min() > 1e-3
    torch.testing.assert_close(
        nn.functional.normalize(features, dim=-1), model.encode_text(tokens), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cls", [CLIP, CustomTextCLIP])
def test_low_precision_casts_where_open_clip_does(cls: type[nn.Module], dtype: torch.dtype) -> None:
    """open_clip's fp16 and bf16 models keep embeddings and norms in fp32."""
    torch.manual_seed(0)
    model = cls(EMBED, CLIPVisionCfg(**VISION), CLIPTextCfg(**SIZES), cast_dtype=dtype).eval()
    convert_weights_to_lp(model, dtype)
    tokens = make_tokens({})
    with torch.no_grad():
        ours = encode_embeddings(model, embed_tokens(model, tokens), tokens)
        theirs = encode_text(model, tokens)
    assert ours.dtype == theirs.dtype == dtype
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    model = small_clip()
    tokens = make_tokens({})
    expected = gradients_of(model, tokens, 7)[1]
    model.set_grad_checkpointing(True)
    torch.testing.assert_close(gradients_of(model, tokens, 7)[1], expected, rtol=0, atol=1e-14)


def test_a_mask_that_lets_later_positions_through_is_not_cut() -> None:
    model = small_clip()
    tokens = make_tokens({})
    model.attn_mask[0, -1] = 0
    assert useful_length(model, tokens) == CONTEXT
    check_tower(model, tokens)


def test_a_prompt_without_eos_is_pooled_where_open_clip_pools_it() -> None:
    model = small_clip(pool_type="eos", eos_id=3)
    tokens = make_tokens({"pool_type": "eos", "eos_id": 3})
    tokens[1, PROMPT_LENGTHS[1] - 1] = 9
    assert check_tower(model, tokens) == 5


def test_other_towers_are_refused_with_the_way_out() -> None:
    model = small_clip(CustomTextCLIP)
    tower = HFTextEncoder.__new__(HFTextEncoder)  # its __init__ needs transformers and a download
    nn.Module.__init__(tower)
    model.text = tower
    tokens = make_tokens({})
    for call in (
        lambda: embed_tokens(model, tokens),
        lambda: useful_length(model, tokens),
        lambda: context_length(model),
        lambda: encode_embeddings(model, torch.zeros(3, CONTEXT, WIDTH), tokens),
    ):
        with pytest.raises(TypeError) as error:
            call()
        message = str(error.value)
        assert "text tower HFTextEncoder of CustomTextCLIP" in message
        assert "token_embedding" in message
        assert "PromptLearner runs any tower" in message


def test_a_tower_that_does_not_pool_is_refused() -> None:
    model = small_clip(pool_type="none")
    tokens = make_tokens({})
    with pytest.raises(
        ValueError, match=r"pool_type is 'none'.*'argmax', 'eos', 'first' or 'last'"
    ):
        encode_embeddings(model, embed_tokens(model, tokens), tokens)
