"""Run a text tower from token embeddings, on no more positions than its output needs.

A prompt learner replaces some token embeddings by learnt vectors, and open_clip's ``encode_text``
takes token ids only. ``encode_embeddings`` is ``encode_text`` from the embedding layer on, for
every transformer text tower of open_clip: CLIP (text parts on the model), CustomTextCLIP and CoCa
(under ``model.text``); causal or not; pooled at the end-of-text token, at the first or last
position, or at CoCa's class token; projected by a matrix, by an ``nn.Linear``, or not at all.
Towers are recognised by their parts, so open_clip itself is never imported here.

Any other tower (HuggingFace's, one of your own) runs by its own ``encode_text``, with a hook that
replaces what its token embedding returns: ``encode_replaced``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_TOWER_PARTS = ("token_embedding", "positional_embedding", "transformer", "ln_final")


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


def token_embedding(model: Any, tokens: Tensor) -> tuple[nn.Module, Tensor] | None:
    """The module that turns tokens into vectors, and its output for ``tokens``; found by running
    ``model.encode_text`` once.

    Args:
        model: with ``encode_text``, whatever its text tower.
        tokens: (C, L) int64 on the model's device.

    Returns:
        The module and (C, L, D); ``None`` where there is none, or where nothing comes after it (a
        tower that only adds up the vectors of words: a context would be the same to every class).
    """
    found: list[tuple[nn.Module, Tensor]] = []

    def note(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        if _is_lookup(arguments, output, tokens) and torch.equal(arguments[0], tokens):
            found.append((module, output.detach()))

    handles = [module.register_forward_hook(note) for module in model.modules()]
    try:
        with torch.no_grad():
            model.encode_text(tokens)
    finally:
        for handle in handles:
            handle.remove()
    if not found:
        return None
    own = {id(parameter) for parameter in found[0][0].parameters()}
    tower: nn.Module = getattr(model, "text", model)
    return found[0] if any(id(p) not in own for p in tower.parameters()) else None


def _is_lookup(arguments: tuple[Any, ...], output: Any, tokens: Tensor) -> bool:
    return (
        len(arguments) > 0
        and isinstance(arguments[0], Tensor)
        and arguments[0].shape == tokens.shape
        and arguments[0].dtype == tokens.dtype
        and isinstance(output, Tensor)
        and output.shape[:-1] == tokens.shape
        and output.is_floating_point()
    )


def encode_replaced(model: Any, embedding: nn.Module, embeddings: Tensor, tokens: Tensor) -> Tensor:
    """``model.encode_text(tokens)`` with other vectors than those of the tokens.

    Args:
        model: as for :func:`token_embedding`.
        embedding: the module that it found.
        embeddings: (C, L, D), what it is to return.
        tokens: (C, L) int64 on the model's device: they say which positions are padding, and where
            to pool.

    Returns:
        (C, E). Gradients flow to ``embeddings``.
    """
    replaced = False

    def replace(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> Tensor | None:
        nonlocal replaced
        if replaced or not _is_lookup(arguments, output, tokens):
            return None
        replaced = True
        return embeddings.to(output.dtype)

    handle = embedding.register_forward_hook(replace)
    try:
        features: Tensor = model.encode_text(tokens)
    finally:
        handle.remove()
    if not replaced:
        raise RuntimeError(
            f"{type(model).__name__}.encode_text did not use the token embedding that it used when "
            "the prompt learner was built"
        )
    return features


def text_tower(model: nn.Module) -> Any:
    """The module that holds the text parts: ``model.text`` where there is one, else the model.

    Raises:
        TypeError: the tower is not one of open_clip's own transformers (e.g. HFTextEncoder).
    """
    tower = getattr(model, "text", model)
    missing = [part for part in _TOWER_PARTS if not hasattr(tower, part)]
    if missing:
        raise TypeError(
            f"text tower {type(tower).__name__} of {type(model).__name__} has no "
            f"{', '.join(missing)}, so it is not one of open_clip's own text transformers (CLIP, "
            "CustomTextCLIP, CoCa); PromptLearner runs any tower"
        )
    return tower


def _pool_type(tower: Any) -> str:
    # CLIP flattens the tower's parts onto itself and renames these two.
    return str(tower.text_pool_type if hasattr(tower, "text_pool_type") else tower.pool_type)


def eot_positions(tower: Any, tokens: Tensor) -> Tensor:
    """Index of the token at which an ``argmax`` or ``eos`` tower is pooled: (C,), int64."""
    if _pool_type(tower) == "argmax":
        return tokens.argmax(dim=-1)
    eos_id = tower.text_eos_id if hasattr(tower, "text_eos_id") else tower.eos_id
    return (tokens == eos_id).int().argmax(dim=-1)


def _class_token(tower: Any) -> nn.Parameter | None:
    return getattr(tower, "cls_emb", None)


def is_pooled_at_eot(tower: Any) -> bool:
    """Whether the features are those of the end-of-text token."""
    return _pool_type(tower) in ("argmax", "eos") and _class_token(tower) is None


def hides_padding(tower: Any) -> bool:
    """Whether the tower's attention mask depends on the tokens."""
    return _class_token(tower) is not None or bool(getattr(tower, "use_pad_mask", False))


def _is_causal(mask: Tensor | None) -> bool:
    if mask is None:
        return False
    future = torch.ones_like(mask, dtype=torch.bool).triu(1)
    return bool(torch.isneginf(mask[future]).all())


def _check_tokens(tokens: Tensor) -> None:
    if tokens.ndim != 2 or tokens.shape[0] == 0 or tokens.shape[1] == 0:
        raise ValueError(
            f"tokens has shape {tuple(tokens.shape)}; expected (C, L) with at least one prompt and "
            "one position, as a tokenizer returns for a list of prompts"
        )


def context_length(model: nn.Module) -> int:
    """Number of tokens that the text tower takes (CoCa's class token is not one of them).

    Raises:
        TypeError: the tower is not one of open_clip's own transformers.
    """
    tower = text_tower(model)
    positions: int = tower.positional_embedding.shape[0]
    return positions if _class_token(tower) is None else positions - 1


def embed_tokens(model: nn.Module, tokens: Tensor) -> Tensor:
    """Token embeddings, without positions.

    Args:
        model: an open_clip model.
        tokens: (C, L) int64, any device.

    Returns:
        (C, L, D) on the model's device, in the dtype of its embedding table.

    Raises:
        TypeError: the tower is not one of open_clip's own transformers.
    """
    embedding: nn.Embedding = text_tower(model).token_embedding
    return embedding(tokens.to(embedding.weight.device))


def useful_length(model: nn.Module, tokens: Tensor) -> int:
    """Number of leading positions that can influence the pooled features of any of the prompts.

    In a causal tower that is pooled at the end-of-text token nothing later is ever read, so this
    is one more than the position of the last end-of-text token. Every other tower (no causal mask,
    as SigLIP's; pooled at the last position; a class token, as CoCa's, whose position comes after
    the padding) needs all of its positions. Waits for the device once.

    Args:
        model: an open_clip model.
        tokens: (C, L) int64, as the tokenizer returns them, any device.

    Returns:
        An int in 1..L: ``tokens[:, :n]`` with the matching embeddings gives the same features and
        the same gradients as ``tokens``.

    Raises:
        TypeError: the tower is not one of open_clip's own transformers.
        ValueError: ``tokens`` is not (C, L) or is empty.
    """
    tower = text_tower(model)
    _check_tokens(tokens)
    if is_pooled_at_eot(tower) and _is_causal(tower.attn_mask):
        return int(eot_positions(tower, tokens).max()) + 1
    return tokens.shape[1]


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
        return x[torch.arange(len(x), device=x.device), eot_positions(tower, tokens)]
    if pool_type in ("first", "last"):
        return x[:, 0 if pool_type == "first" else -1]
    raise ValueError(
        f"the text tower's pool_type is {pool_type!r}, which gives one feature per token and none "
        "per prompt; choose a model with pool_type 'argmax', 'eos', 'first' or 'last'"
    )


def check_device(tower: Any, embeddings: Tensor) -> None:
    """
    Raises:
        ValueError: the embeddings are not on the tower's device.
    """
    device = tower.positional_embedding.device
    if embeddings.device != device:
        raise ValueError(
            f"embeddings is on {embeddings.device}, but the text tower is on {device}; move both, "
            "the prompt learner and its model, to the same device"
        )


def project(tower: Any, pooled: Tensor) -> Tensor:
    """What follows the pooling: (C, D) to (C, E).

    The last LayerNorm acts on each position alone, so it is applied to the pooled one only.
    """
    features: Tensor = tower.ln_final(pooled)
    projection = getattr(tower, "text_projection", None)
    if projection is None:
        return features
    return projection(features) if isinstance(projection, nn.Module) else features @ projection


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
        TypeError: the tower is not one of open_clip's own transformers (e.g. HFTextEncoder).
        ValueError: shapes or devices that do not match, more positions than the tower has, or a
            tower that does not pool.

    Source: the ``encode_text`` of open_clip 3.3's CLIP, and its ``TextTransformer.forward``.
    """
    tower = text_tower(model)
    _check_tokens(tokens)
    if embeddings.ndim != 3 or embeddings.shape[:2] != tokens.shape:
        raise ValueError(
            f"embeddings has shape {tuple(embeddings.shape)} and tokens {tuple(tokens.shape)}; "
            "expected (C, L, D) and (C, L) with the same C and L"
        )
    limit = context_length(model)
    if tokens.shape[1] > limit:
        raise ValueError(
            f"tokens has {tokens.shape[1]} positions, but the text tower takes {limit}: tokenize "
            f"with context_length={limit}"
        )
    check_device(tower, embeddings)
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
    if hides_padding(tower):
        padding = _padding_mask(tower, tokens, dtype)
        mask = padding if mask is None else mask + padding
    x = x + tower.positional_embedding[:length].to(dtype)
    x = tower.transformer(x, attn_mask=mask)
    return project(tower, _pool(tower, x, tokens))
