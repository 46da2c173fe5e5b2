"""Text features from token embeddings, on no more positions than they need.

A prompt learner replaces some token embeddings by learned vectors, and open_clip's ``encode_text``
takes token ids only. ``encode_embeddings`` is ``encode_text`` from the embedding layer on, for
every transformer text tower of open_clip: CLIP (text parts on the model), CustomTextCLIP and CoCa
(under ``model.text``); causal or not; pooled at the end-of-text token, at the first or last
position, or at CoCa's class token; projected by a matrix, by an ``nn.Linear``, or not at all.
Towers are recognised by their parts, so open_clip itself is never imported here.

``encode_packed`` computes less. In a causal tower a position sees itself and what is before it, so
start token and context are the same for every class, in every layer, and what follows a class's
end-of-text token changes nothing. The tower then runs on rows instead of a (C, L) rectangle: those
of the common prefix, once, then those of each class up to its end-of-text token. Linear layers,
norms and MLP see one matrix of rows; attention sees the prefix once, and the classes in groups of
equal length. The last layer is computed for the end-of-text rows only.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

_TOWER_PARTS = ("token_embedding", "positional_embedding", "transformer", "ln_final")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def has_parts(tower: Any) -> bool:
    """Whether it looks like a text transformer of open_clip."""
    return all(hasattr(tower, part) for part in _TOWER_PARTS)


def is_open_clips(model: Any) -> bool:
    """Whether ``encode_embeddings`` is known to be the model's ``encode_text``: both the model's
    method and its tower are open_clip's own."""
    tower = getattr(model, "text", model)
    return has_parts(tower) and all(
        getattr(getattr(type(owner), name, None), "__module__", "").startswith("open_clip.")
        and name not in vars(owner)
        for owner, name in ((model, "encode_text"), (tower, "forward"))
    )


def text_tower(model: nn.Module) -> Any:
    """The module that holds the text parts: ``model.text`` where there is one, else the model.

    Raises:
        TypeError: the tower is not one of open_clip's own transformers (e.g. HFTextEncoder), which
            every function here needs.
    """
    tower = getattr(model, "text", model)
    if not has_parts(tower):
        missing = [part for part in _TOWER_PARTS if not hasattr(tower, part)]
        raise TypeError(
            f"text tower {type(tower).__name__} of {type(model).__name__} has no "
            f"{', '.join(missing)}, so it is not one of open_clip's own text transformers (CLIP, "
            "CustomTextCLIP, CoCa); PromptLearner runs any tower"
        )
    return tower


def context_length(model: nn.Module) -> int:
    """Number of tokens that the text tower takes (CoCa's class token is not one of them)."""
    tower = text_tower(model)
    positions: int = tower.positional_embedding.shape[0]
    return positions if _class_token(tower) is None else positions - 1


def embed_tokens(model: nn.Module, tokens: Tensor) -> Tensor:
    """(C, L, D) embeddings of (C, L) tokens, without positions, on the model's device."""
    embedding: nn.Embedding = text_tower(model).token_embedding
    return embedding(tokens.to(embedding.weight.device))


def useful_length(model: nn.Module, tokens: Tensor) -> int:
    """Number of leading positions that can influence the pooled features of any of the prompts.

    In a causal tower that is pooled at the end-of-text token nothing later is ever read. Every
    other tower (no causal mask, as SigLIP's; pooled at the last position; a class token, as CoCa's,
    whose position comes after the padding) needs all positions. Waits for the device once.

    Args:
        model: an open_clip model.
        tokens: (C, L) int64, as the tokenizer returns them, any device.

    Returns:
        An int in 1..L: ``tokens[:, :n]`` with the matching embeddings gives the same features and
        the same gradients as ``tokens``.
    """
    tower = text_tower(model)
    if _is_pooled_at_eot(tower) and _is_causal(tower.attn_mask):
        return int(_eot_positions(tower, tokens).max()) + 1
    return tokens.shape[1]


def encode_embeddings(model: nn.Module, embeddings: Tensor, tokens: Tensor) -> Tensor:
    """Text features from token embeddings: ``encode_text`` from the embedding layer on.

    With ``embeddings = embed_tokens(model, tokens)`` this equals
    ``model.encode_text(tokens, normalize=False)`` (CoCa normalises unless told not to). Gradients
    flow to ``embeddings`` and to whatever of the tower requires them.

    Args:
        model: an open_clip model (CLIP, CustomTextCLIP, CoCa).
        embeddings: (C, L, D) floating point on the model's device, without positions; cast to the
            dtype in which the tower's transformer runs.
        tokens: (C, L) int64, the tokens that the embeddings stand for: they say where each prompt
            ends and which positions are padding. Any device.

    Returns:
        (C, E), not normalised, in the tower's dtype.

    Raises:
        ValueError: embeddings on another device, or a tower that does not pool.

    Source: the ``encode_text`` of open_clip 3.3's CLIP, and its ``TextTransformer.forward``.
    """
    tower = text_tower(model)
    _check_device(tower, embeddings)
    tokens = tokens.to(embeddings.device)
    dtype = tower.transformer.get_cast_dtype()
    x = embeddings.to(dtype)
    class_token = _class_token(tower)
    if class_token is not None:
        x = torch.cat([x, class_token.to(dtype).expand(len(x), 1, -1)], dim=1)
    length = x.shape[1]
    mask = tower.attn_mask
    if mask is not None:
        mask = mask[:length, :length]
    if _hides_padding(tower):
        padding = _padding_mask(tower, tokens, dtype)
        mask = padding if mask is None else mask + padding
    x = x + tower.positional_embedding[:length].to(dtype)
    x = tower.transformer(x, attn_mask=mask)
    return _project(tower, _pool(tower, x, tokens))


def _class_token(tower: Any) -> nn.Parameter | None:
    return getattr(tower, "cls_emb", None)


def _pool_type(tower: Any) -> str:
    # CLIP flattens the tower's parts onto itself and renames these two.
    return str(tower.text_pool_type if hasattr(tower, "text_pool_type") else tower.pool_type)


def _eot_positions(tower: Any, tokens: Tensor) -> Tensor:
    """Index of the token at which an ``argmax`` or ``eos`` tower is pooled: (C,), int64."""
    if _pool_type(tower) == "argmax":
        return tokens.argmax(dim=-1)
    eos_id = tower.text_eos_id if hasattr(tower, "text_eos_id") else tower.eos_id
    return (tokens == eos_id).int().argmax(dim=-1)


def _is_pooled_at_eot(tower: Any) -> bool:
    """Whether the features are those of the end-of-text token."""
    return _pool_type(tower) in ("argmax", "eos") and _class_token(tower) is None


def _hides_padding(tower: Any) -> bool:
    """Whether the tower's attention mask depends on the tokens."""
    return _class_token(tower) is not None or bool(getattr(tower, "use_pad_mask", False))


def _is_causal(mask: Tensor | None) -> bool:
    return mask is not None and bool(
        torch.isneginf(mask[torch.ones_like(mask, dtype=torch.bool).triu(1)]).all()
    )


def _padding_mask(tower: Any, tokens: Tensor, dtype: torch.dtype) -> Tensor:
    """Additive mask that hides padding keys: (C * heads, L', L'), L' = L + 1 with a class token."""
    valid = tokens != tower.pad_id
    if _class_token(tower) is not None:
        own = valid.new_ones(len(valid), 1)
        # CoCa's released weights were trained with the class token's flag at the wrong end.
        at_end = getattr(tower, "correct_cls_mask", False)
        valid = torch.cat([valid, own] if at_end else [own, valid], dim=1)
    length = valid.shape[1]
    mask = torch.zeros(len(valid), 1, length, dtype=dtype, device=valid.device)
    mask = mask.masked_fill(~valid[:, None], float("-inf")).expand(-1, length, -1)
    return mask.repeat_interleave(tower.heads, dim=0)


def _pool(tower: Any, x: Tensor, tokens: Tensor) -> Tensor:
    """(C, L', D) to (C, D)."""
    pool_type = "last" if _class_token(tower) is not None else _pool_type(tower)
    if pool_type in ("argmax", "eos"):
        return x[torch.arange(len(x), device=x.device), _eot_positions(tower, tokens)]
    if pool_type in ("first", "last"):
        return x[:, 0 if pool_type == "first" else -1]
    raise ValueError(
        f"the text tower's pool_type is {pool_type!r}, which gives one feature per token and none "
        "per prompt; choose a model with pool_type 'argmax', 'eos', 'first' or 'last'"
    )


def _check_device(tower: Any, embeddings: Tensor) -> None:
    device = tower.positional_embedding.device
    if embeddings.device != device:
        raise ValueError(
            f"embeddings is on {embeddings.device}, but the text tower is on {device}; move both, "
            "the prompt learner and its model, to the same device"
        )


def _project(tower: Any, pooled: Tensor) -> Tensor:
    """What follows the pooling: (C, D) to (C, E).

    The last LayerNorm acts on each position alone, so it is applied to the pooled one only.
    """
    features: Tensor = tower.ln_final(pooled)
    projection = getattr(tower, "text_projection", None)
    if projection is None:
        return features
    return projection(features) if isinstance(projection, nn.Module) else features @ projection


class Packing(NamedTuple):
    """Which positions of C prompts are computed, and in which order: P + R rows.

    Attributes:
        prefix: P, the positions that all prompts have in common.
        groups: (classes, positions after the prefix) of the prompts of one length, shortest first;
            the sum of the products is R.
        rows: (R,) int64, where each row after the prefix is found in the (C, L - P) positions
            after the prefix, flattened.
        places: (C,) int64, where each class is found among the grouped ones.
    """

    prefix: int
    groups: tuple[tuple[int, int], ...]
    rows: Tensor
    places: Tensor


def pack(model: nn.Module, tokens: Tensor, prefix: int) -> Packing | None:
    """How to compute no position of (C, L) ``tokens`` twice; the first ``prefix`` are in all rows.

    ``None`` for towers that are not causal (SigLIP), that hide padding or have a class token
    (CoCa), or that are not pooled at the end-of-text token. Waits for the device.

    Raises:
        ValueError: the prompts do not begin alike, or ``prefix`` is below 1.
    """
    tower = text_tower(model)
    if prefix < 1 or (tokens[:, :prefix] != tokens[0, :prefix]).any():
        raise ValueError(
            f"prefix={prefix}, but the prompts have not that many positions in common; give the "
            "number of leading tokens that are the same in every row of tokens, at least 1"
        )
    if (
        not _is_pooled_at_eot(tower)
        or _hides_padding(tower)
        or not _is_plainly_causal(tower.attn_mask)
    ):
        return None
    lengths = _eot_positions(tower, tokens) + 1 - prefix
    if int(lengths.min()) < 1:  # the "end" is within the prefix
        return None
    order = lengths.argsort(stable=True)
    sizes, counts = lengths.unique(return_counts=True)
    groups = tuple(zip(counts.tolist(), sizes.tolist(), strict=True))
    stride = tokens.shape[1] - prefix
    rows = [
        stride * index + torch.arange(n, device="cpu")
        for index, n in zip(order.tolist(), lengths[order].tolist(), strict=True)
    ]
    device = tower.positional_embedding.device
    return Packing(prefix, groups, torch.cat(rows).to(device), order.argsort().to(device))


def _is_plainly_causal(mask: Tensor | None) -> bool:
    return mask is not None and torch.equal(mask, torch.full_like(mask, float("-inf")).triu(1))


def encode_packed(
    model: nn.Module, prefix: Tensor, suffixes: Tensor, tokens: Tensor, packing: Packing | None
) -> Tensor:
    """As :func:`encode_embeddings` of prefix and each suffix, to rounding.

    Runs the ordinary tower where ``packing`` is ``None``, and where its blocks are not open_clip's
    plain ones: other classes, hooks on what would not be called (transformer, block, attention),
    dropout in training mode.

    Args:
        model: an open_clip model.
        prefix: (P, D) token embeddings that all prompts begin with, without positions.
        suffixes: (C, L - P, D) those that follow.
        tokens: (C, L) int64, the tokens that both stand for.
        packing: from :func:`pack` of ``model``, ``tokens`` and P, on the model's device.

    Returns:
        (C, E), not normalised, in the tower's dtype. The gradient of ``prefix`` is the sum over
        the classes.
    """
    tower = text_tower(model)
    if packing is None or not _is_plain(tower.transformer):
        whole = torch.cat([prefix.expand(len(suffixes), -1, -1), suffixes], dim=1)
        return encode_embeddings(model, whole, tokens)
    _check_device(tower, prefix)
    dtype = tower.transformer.get_cast_dtype()
    positions = tower.positional_embedding.to(dtype)
    start = packing.prefix
    own = suffixes.flatten(0, 1).index_select(0, packing.rows).to(dtype)
    own = own + positions.index_select(0, start + packing.rows % suffixes.shape[1])
    x = torch.cat([prefix.to(dtype) + positions[:start], own])
    *blocks, last = tower.transformer.resblocks
    for block in blocks:
        if tower.transformer.grad_checkpointing:
            x = checkpoint(_block, block, x, packing, use_reentrant=False)
        else:
            x = _block(block, x, packing)
    return _project(tower, _last_block(last, x, packing).index_select(0, packing.places))


def _is_plain(transformer: nn.Module) -> bool:
    """Whether calling the parts of its blocks is the same as calling it."""
    if not _is_untouched(transformer, "open_clip.transformer.Transformer"):
        return False
    blocks: Any = transformer.resblocks
    return all(
        _is_untouched(block, "open_clip.transformer.ResidualAttentionBlock")
        and _is_untouched(block.attn, "torch.nn.modules.activation.MultiheadAttention")
        and block.attn.in_proj_weight is not None
        and block.attn.bias_k is None
        and block.attn.bias_v is None
        and not block.attn.add_zero_attn
        and (block.attn.dropout == 0 or not block.attn.training)
        for block in blocks
    )


def _is_untouched(module: nn.Module, name: str) -> bool:
    """Of that very class, with its own ``forward`` and no hooks. Nothing is imported to know it."""
    kind = type(module)
    return (
        f"{kind.__module__}.{kind.__qualname__}" == name
        and "forward" not in vars(module)
        and not any(getattr(module, hooks) for hooks in _HOOKS)
    )


def _block(block: Any, x: Tensor, packing: Packing) -> Tensor:
    """``ResidualAttentionBlock.forward`` on rows: (P + R, D) to the same."""
    attn = block.attn
    qkv = F.linear(block.ln_1(x), attn.in_proj_weight, attn.in_proj_bias)
    q, k, v = (_heads(part, attn) for part in qkv.chunk(3, dim=-1))
    return _rest(block, x, _attention(q, k, v, packing, last=False))


def _last_block(block: Any, x: Tensor, packing: Packing) -> Tensor:
    """The same, but only the end-of-text rows of the groups' classes: (P + R, D) to (C, D)."""
    attn = block.attn
    wide = x.shape[1]
    ends = [part[:, -1] for part in _by_group(x, 0, packing)]
    residual = torch.cat(ends)
    normed = block.ln_1(x)
    queries = torch.cat([part[:, -1] for part in _by_group(normed, 0, packing)])
    weight, bias = attn.in_proj_weight, attn.in_proj_bias
    q = F.linear(queries, weight[:wide], None if bias is None else bias[:wide])
    kv = F.linear(normed, weight[wide:], None if bias is None else bias[wide:])
    k, v = (_heads(part, attn) for part in kv.chunk(2, dim=-1))
    return _rest(block, residual, _attention(_heads(q, attn), k, v, packing, last=True))


def _rest(block: Any, x: Tensor, heads: Tensor) -> Tensor:
    """What a block does with the result of its attention, (heads, rows, d)."""
    projection = block.attn.out_proj
    attended = F.linear(heads.transpose(0, 1).flatten(1), projection.weight, projection.bias)
    x = x + block.ls_1(attended)
    return x + block.ls_2(block.mlp(block.ln_2(x)))


def _heads(x: Tensor, attn: nn.MultiheadAttention) -> Tensor:
    """(rows, D) to (heads, rows, d)."""
    return x.unflatten(-1, (attn.num_heads, attn.head_dim)).transpose(0, 1)


def _by_group(x: Tensor, dim: int, packing: Packing) -> list[Tensor]:
    """The rows after the prefix, for each group (.., classes, positions, ..)."""
    sizes = [packing.prefix, *(count * length for count, length in packing.groups)]
    parts = x.split(sizes, dim)[1:]
    return [part.unflatten(dim, group) for part, group in zip(parts, packing.groups, strict=True)]


def _attention(q: Tensor, k: Tensor, v: Tensor, packing: Packing, *, last: bool) -> Tensor:
    """Causal attention of each class to the prefix and to itself; shaped as ``q``.

    The products with the prefix's keys and values are two matrix products for all classes at once,
    with no copy of the prefix for each of them; only the small (positions x positions) ones are
    per class. On a CPU that is twice as fast as ``scaled_dot_product_attention`` of each group with
    the prefix's keys and values put in front of its own.

    ``k`` and ``v`` are (heads, P + R, d), and so is ``q``; with ``last`` it has end-of-text rows
    only, (heads, C, d).
    """
    start = packing.prefix
    q = q * q.shape[-1] ** -0.5
    to_prefix = q @ k[:, :start].transpose(1, 2)
    if last:
        sizes = [(count, 1) for count, _ in packing.groups]
        weights, own = [], []
        offset = 0
    else:
        sizes = list(packing.groups)
        weights = [_softmax(to_prefix[:, :start])]
        own = [torch.zeros_like(q[:, :start])]
        offset = start
    groups = zip(sizes, _by_group(k, 1, packing), _by_group(v, 1, packing), strict=True)
    for size, keys, values in groups:
        rows = slice(offset, offset + size[0] * size[1])
        to_own = q[:, rows].unflatten(1, size) @ keys.transpose(-1, -2)
        scores = torch.cat([to_prefix[:, rows].unflatten(1, size), to_own], dim=-1)
        weight = _softmax(scores)
        weights.append(weight[..., :start].flatten(1, 2))
        own.append((weight[..., start:] @ values).flatten(1, 2))
        offset = rows.stop
    return torch.cat(weights, dim=1) @ v[:, :start] + torch.cat(own, dim=1)


def _softmax(scores: Tensor) -> Tensor:
    """Over the keys, of which the last query sees all, the one before it all but one, ..."""
    queries, keys = scores.shape[-2:]
    future = torch.ones(queries, keys, dtype=torch.bool, device=scores.device)
    return scores.masked_fill(future.triu(keys - queries + 1), float("-inf")).softmax(dim=-1)
