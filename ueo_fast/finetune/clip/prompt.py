"""The learnable text prompt: a context shared by all classes, in front of each class name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ueo_fast.finetune.clip.text_tower import (
    Packing,
    context_length,
    embed_tokens,
    encode_packed,
    has_parts,
    is_open_clips,
    pack,
    useful_length,
)


class PromptLearner(nn.Module):
    """Text features of "<context> <class name><suffix>", with learnable context vectors.

    ``forward()`` returns the (C, E) float32 text features, L2-normalised. With the context as it
    was initialised they equal ``encode_text`` of the prompts, normalised. open_clip's own text
    transformers run on no more positions than they need, and causal ones on those of start token
    and context once for all classes (:mod:`ueo_fast.finetune.clip.text_tower`). Any other text
    tower (HuggingFace's, one of your own) runs as it is, with a hook that puts the context in place
    of what its token embedding returns. If that cannot be found, the features are those of the
    words, ``context`` is empty, and :meth:`check_trainable` says so.

    ``context`` (n_ctx, D) is the only parameter, a float32 master copy where the model is in half
    precision (context and features of a float64 model are float64), and the only entry of the
    ``state_dict``: everything that depends on the class names is a non-persistent buffer, so a
    context trained on one list of classes loads into a learner for another.

    The model is referred to, not owned: its parameters are not among this module's, and freezing
    them (``model.requires_grad_(False)``) and moving them is up to the caller; move both together.
    ``copy.deepcopy`` of a learner copies the model as well, unless both are copied in one call.

    Nothing is cached: the learner cannot see when the model's weights change. If the context is
    frozen, call it once under ``torch.no_grad()`` and keep the tensor.

    Args:
        model: with ``encode_text``: open_clip's (CLIP, CustomTextCLIP, CoCa, any text tower).
        tokenizer: open_clip's tokenizer of that model, called as
            ``tokenizer(list of str, context_length=int)``; returns (C, context_length) int64.
            Padding may be at the end, in front of a token at the end, or at the beginning.
        class_names: the known classes; underscores become spaces.
        context: the words from whose embeddings the context is initialised.
        suffix: follows the class name.

    Raises:
        TypeError: ``class_names`` is one string.
        ValueError: no class names, a blank one, two that give the same prompt, an empty context,
            or a prompt that is too long for the text tower.

    Source: CoOp (Zhou et al., 2022, arXiv 2109.01134) with a unified context; "a photo of a" is
    the initialisation of UEO (Liang et al., 2024, arXiv 2308.12919).
    """

    context: nn.Parameter
    tokens: Tensor
    prefix: Tensor
    suffix: Tensor
    packed_rows: Tensor | None
    packed_places: Tensor | None
    padded_places: Tensor | None

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Callable[..., Tensor],
        class_names: Sequence[str],
        *,
        context: str = "a photo of a",
        suffix: str = ".",
    ) -> None:
        super().__init__()
        self.class_names = _clean_names(class_names)
        if not context.strip():
            raise ValueError(
                f"context={context!r} is empty, so there is nothing to learn; give at least one "
                "word, e.g. context='a photo of a'"
            )
        prompts = [f"{context} {name}{suffix}" for name in self.class_names]
        length = _length(model, tokenizer)
        layout = _layout(tokenizer, length)
        tokens = _tokenize(tokenizer, prompts, length, layout)
        _check_distinct(tokens, prompts)
        start, stop = _context_span(tokenizer, context, tokens, layout)
        places = layout.places(tokens)
        known = is_open_clips(model) and places is None
        if known:
            tokens = tokens[:, : useful_length(model, tokens)]
            with torch.no_grad():
                embeddings = embed_tokens(model, tokens)
            self._embedding = None
        else:
            tokens = tokens.to(next(model.parameters()).device)
            found = _token_embedding(model, tokens)
            self._embedding = (None if found is None else found[0],)
            embeddings = tokens.new_zeros(0, 0, 0).float() if found is None else found[1]
        aligned = embeddings
        if places is not None and embeddings.numel():
            aligned = _take(embeddings, places.argsort(dim=1).to(tokens.device))
        # In tuples, where nn.Module does not take them for submodules.
        self._model = (model,)
        self.context_words, self.suffix_text = context, suffix
        first = aligned[0] if aligned.numel() else aligned.flatten(0, 1)
        self.context = nn.Parameter(first[start:stop].to(_at_least_float32(aligned), copy=True))
        packing = pack(model, tokens, stop) if known else None
        self._groups = packing and packing.groups
        buffers = {
            "tokens": tokens.to(aligned.device),
            "prefix": first[:start].clone(),
            "suffix": aligned[:, stop:].clone(),
            "padded_places": None if places is None else places.to(aligned.device),
            "packed_rows": packing and packing.rows,
            "packed_places": packing and packing.places,
        }
        for name, buffer in buffers.items():
            self.register_buffer(name, buffer, persistent=False)

    def forward(self) -> Tensor:
        """The text features: (C, E), float32, each row of norm 1."""
        model: Any = self._model[0]
        beginning = torch.cat([self.prefix, self.context])
        if self._embedding is None:
            features = encode_packed(model, beginning, self.suffix, self.tokens, self._packing())
        elif (embedding := self._embedding[0]) is None:
            features = model.encode_text(self.tokens)
        else:
            whole = torch.cat([beginning.expand(len(self.suffix), -1, -1), self.suffix], dim=1)
            if self.padded_places is not None:
                whole = _take(whole, self.padded_places)
            features = _encode_replaced(model, embedding, whole, self.tokens)
        return F.normalize(features.to(_at_least_float32(features)), dim=-1)

    @property
    def is_open_clips(self) -> bool:
        """Whether the tower is one that runs from embeddings, without a hook."""
        return self._embedding is None

    def check_trainable(self) -> None:
        """Raise ``ValueError`` if the context cannot be trained with this text tower."""
        if self._embedding == (None,):
            (model,) = self._model
            tower = getattr(model, "text", model)
            raise ValueError(
                f"the prompt cannot be learnt: the text tower {type(tower).__name__} has no token "
                "embedding that can be replaced, with layers after it. Train the image tower only: "
                "--train affine, in Python prompt_lr=0"
            )

    @property
    def template(self) -> str:
        """The prompt that the context was initialised from, ``{}`` for the class name."""
        return f"{self.context_words} {{}}{self.suffix_text}"

    def _packing(self) -> Packing | None:
        if self._groups is None or self.packed_rows is None or self.packed_places is None:
            return None
        common = len(self.prefix) + len(self.context)
        return Packing(common, self._groups, self.packed_rows, self.packed_places)

    def extra_repr(self) -> str:
        """What ``print(learner)`` shows."""
        return f"classes={len(self.class_names)}, context={tuple(self.context.shape)}"


def _at_least_float32(like: Tensor) -> torch.dtype:
    return torch.promote_types(like.dtype, torch.float32)


def _clean_names(class_names: Sequence[str]) -> tuple[str, ...]:
    if isinstance(class_names, str):
        raise TypeError(
            f"class_names is the string {class_names!r}; give a list of names, e.g. "
            f"[{class_names!r}]"
        )
    names = tuple(name.replace("_", " ").strip() for name in class_names)
    if not names:
        raise ValueError("class_names is empty; give the names of the known classes")
    if "" in names:
        index = names.index("")
        raise ValueError(f"class_names[{index}]={class_names[index]!r} is blank; name the class")
    return names


class _Layout(NamedTuple):
    """Where a tokenizer puts its padding.

    Attributes:
        padding: the token.
        tail: how many tokens come after it; CLIPS' has its class token there.
        is_first: it is at the beginning of the row.
    """

    padding: int
    tail: int
    is_first: bool

    def places(self, tokens: Tensor) -> Tensor | None:
        """(C, L) where each position of rows with the padding at their beginning is found in the
        same rows with the padding at their end; ``None`` if it is not at the beginning."""
        if not self.is_first:
            return None
        count = (tokens == self.padding).int().cumprod(dim=1).sum(dim=1, keepdim=True)
        return (torch.arange(tokens.shape[1], device=tokens.device) - count) % tokens.shape[1]

    def aligned(self, tokens: Tensor) -> Tensor:
        """The rows with the padding at their end."""
        places = self.places(tokens)
        return tokens if places is None else tokens.gather(1, places.argsort(dim=1))


def _layout(tokenizer: Callable[..., Tensor], length: int) -> _Layout:
    row = tokenizer([""], context_length=length + 16)[0]
    is_padding = row == row.mode().values
    tail = int((~is_padding).flip(0).int().cumprod(0).sum())
    is_first = bool(is_padding[0]) and tail > 0
    return _Layout(int(row.mode().values), 0 if is_first else tail, is_first)


def _length(model: Any, tokenizer: Any) -> int:
    """How many tokens the text tower takes; where it does not say, what its tokenizer fills."""
    if has_parts(getattr(model, "text", model)):
        return context_length(model)
    length = getattr(tokenizer, "context_length", None)
    return length if isinstance(length, int) and length > 0 else 77


def _take(rows: Tensor, places: Tensor) -> Tensor:
    """(C, L, D) with the positions of each row in the order of ``places`` (C, L)."""
    return rows.take_along_dim(places[..., None], dim=1)


def _tokenize(
    tokenizer: Callable[..., Tensor], prompts: list[str], length: int, layout: _Layout
) -> Tensor:
    """(C, length) int64; open_clip's tokenizers truncate silently, which is an error here."""
    tokens = tokenizer(prompts, context_length=length)
    # One position more is one padding more, where nothing was cut.
    longer = tokenizer(prompts, context_length=length + 1)
    end = 0 if layout.is_first else length - layout.tail
    padding = torch.full_like(tokens[:, :1], layout.padding)
    cut = (longer != torch.cat([tokens[:, :end], padding, tokens[:, end:]], dim=1)).any(dim=1)
    if cut.any():
        prompt = prompts[int(cut.int().argmax())]
        raise ValueError(
            f"the prompt {prompt!r} has more tokens than the {length} that the text tower takes "
            f"({int(cut.sum())} of {len(prompts)} prompts are too long); shorten the class name or "
            "the context"
        )
    return tokens


def _check_distinct(tokens: Tensor, prompts: list[str]) -> None:
    seen: dict[tuple[int, ...], str] = {}
    for row, prompt in zip(tokens.tolist(), prompts, strict=True):
        other = seen.setdefault(tuple(row), prompt)
        if other is not prompt:
            raise ValueError(
                f"class_names gives the same prompt twice, {other!r} and {prompt!r} (case and "
                "underscores make no difference); list each class once"
            )


def _context_span(
    tokenizer: Callable[..., Tensor], context: str, tokens: Tensor, layout: _Layout
) -> tuple[int, int]:
    """Where the context's tokens are in every prompt, padding aside: [start, stop).

    Found by comparison, because CLIP's and BERT's tokenizers begin with a start token, SigLIP's
    does not.
    """
    empty, alone = layout.aligned(tokenizer(["", context], context_length=tokens.shape[1]))
    start = _common_prefix(empty[None], alone)
    stop = _common_prefix(layout.aligned(tokens), alone)
    if stop <= start:
        raise ValueError(
            f"context={context!r} has no token of its own in front of the class names with this "
            "tokenizer; give at least one word, e.g. context='a photo of a'"
        )
    return start, stop


def _common_prefix(rows: Tensor, row: Tensor) -> int:
    """Number of leading positions at which every one of ``rows`` (C, L) agrees with ``row``."""
    return int((rows == row).all(dim=0).int().cumprod(dim=0).sum())


def _token_embedding(model: Any, tokens: Tensor) -> tuple[nn.Module, Tensor] | None:
    """The module that embeds (C, L) ``tokens``, and the (C, L, D) that it returns.

    Found by running ``model.encode_text`` once. ``None`` where there is none, or nothing after it:
    where word vectors are only added up, a context would be the same to every class.
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


def _encode_replaced(
    model: Any, embedding: nn.Module, embeddings: Tensor, tokens: Tensor
) -> Tensor:
    """(C, E) ``model.encode_text(tokens)`` where ``embedding`` returns ``embeddings`` (C, L, D).

    ``tokens`` still say which positions are padding, and where to pool.
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
