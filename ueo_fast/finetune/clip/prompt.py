"""The learnable text prompt: a context shared by all classes, in front of each class name."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ueo_fast.finetune.clip.text_prefix import Packing, encode_packed, pack
from ueo_fast.finetune.clip.text_tower import context_length, embed_tokens, useful_length


class PromptLearner(nn.Module):
    """Text features of "<context> <class name><suffix>", with learnable context vectors.

    ``forward()`` returns the (C, E) float32 text features, L2-normalised. With the context as it
    was initialised they equal ``encode_text`` of the prompts, normalised. The text tower runs on
    no more positions than it needs (:func:`~ueo_fast.finetune.clip.text_tower.useful_length`), and
    where it is causal on those of start token and context once for all classes
    (:mod:`ueo_fast.finetune.clip.text_prefix`).

    ``context`` (n_ctx, D) is the only parameter, a float32 master copy where the model is in half
    precision (context and features of a float64 model are float64), and the only entry of the
    ``state_dict``: everything that depends on the class names is a non-persistent buffer, so a
    context trained on one list of classes loads into a learner for another.

    The model is referred to, not owned: its parameters are not among this module's, and freezing
    them (``model.requires_grad_(False)``) and moving them is up to the caller; move both together.
    ``copy.deepcopy`` of a learner copies the model as well, unless both are copied in one call.

    Nothing is cached: the learner cannot see when the model's weights change. With the context
    frozen, call it once under ``torch.no_grad()`` and keep the tensor.

    Args:
        model: an open_clip model (CLIP, CustomTextCLIP, CoCa).
        tokenizer: open_clip's tokenizer of that model, called as
            ``tokenizer(list of str, context_length=int)``; returns (C, context_length) int64.
        class_names: the known classes; underscores become spaces.
        context: the words from whose embeddings the context is initialised.
        suffix: follows the class name.

    Raises:
        TypeError: ``class_names`` is one string, or the text tower cannot run from embeddings.
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
        tokens = _tokenize(tokenizer, prompts, context_length(model))
        _check_distinct(tokens, prompts)
        start, stop = _context_span(tokenizer, context, tokens)
        tokens = tokens[:, : useful_length(model, tokens)]
        with torch.no_grad():
            embeddings = embed_tokens(model, tokens)
        self._model = (model,)  # in a tuple, where nn.Module does not take it for a submodule
        self.context_words, self.suffix_text = context, suffix
        self.context = nn.Parameter(
            embeddings[0, start:stop].to(_at_least_float32(embeddings), copy=True)
        )
        device = embeddings.device
        self.register_buffer("tokens", tokens.to(device), persistent=False)
        self.register_buffer("prefix", embeddings[0, :start].clone(), persistent=False)
        self.register_buffer("suffix", embeddings[:, stop:].clone(), persistent=False)
        packing = pack(model, tokens, stop)
        self._groups = None if packing is None else packing.groups
        for name, indices in (
            ("packed_rows", None if packing is None else packing.rows),
            ("packed_places", None if packing is None else packing.places),
        ):
            self.register_buffer(name, indices, persistent=False)

    def forward(self) -> Tensor:
        """The text features: (C, E), float32, each row of norm 1."""
        (model,) = self._model
        beginning = torch.cat([self.prefix, self.context])
        features = encode_packed(model, beginning, self.suffix, self.tokens, self._packing())
        return F.normalize(features.to(_at_least_float32(features)), dim=-1)

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
    for index, name in enumerate(names):
        if not name:
            raise ValueError(
                f"class_names[{index}]={class_names[index]!r} is blank; name the class"
            )
    return names


def _tokenize(tokenizer: Callable[..., Tensor], prompts: list[str], length: int) -> Tensor:
    """(C, length) int64; open_clip's tokenizers truncate silently, which is an error here."""
    tokens = tokenizer(prompts, context_length=length)
    # One position more shows what was cut: another token at the end, or a token after it.
    longer = tokenizer([*prompts, ""], context_length=length + 1)
    padding = longer[-1, -1]
    cut = (longer[:-1, :length] != tokens).any(dim=1) | (longer[:-1, -1] != padding)
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
    tokenizer: Callable[..., Tensor], context: str, tokens: Tensor
) -> tuple[int, int]:
    """Where the context's tokens lie in every prompt: [start, stop).

    Found by comparison, because tokenizers differ: CLIP's and BERT's begin with a start token,
    SigLIP's does not.
    """
    empty, alone = tokenizer(["", context], context_length=tokens.shape[1])
    start = _common_prefix(empty[None], alone)
    stop = _common_prefix(tokens, alone)
    if stop <= start:
        raise ValueError(
            f"context={context!r} has no token of its own in front of the class names with this "
            "tokenizer; give at least one word, e.g. context='a photo of a'"
        )
    return start, stop


def _common_prefix(rows: Tensor, row: Tensor) -> int:
    """Number of leading positions at which every one of ``rows`` (C, L) agrees with ``row``."""
    return int((rows == row).all(dim=0).int().cumprod(dim=0).sum())
