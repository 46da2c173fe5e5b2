"""Which model an adaptation started from: name, activation, a fingerprint of its weights."""

from __future__ import annotations

import contextlib
import hashlib
import shlex
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ueo_fast.finetune.clip.adapted_state import tower_tensors

_AS_FLAGS: ContextVar[bool] = ContextVar("_AS_FLAGS", default=False)
_SAMPLE = 4096
"""Numbers of each tensor that enter the fingerprint: 10 ms on RN50, not seconds on ViT-bigG."""


@contextlib.contextmanager
def named_as_flags() -> Iterator[None]:
    """Inside, messages name options as the command line does: ``--model X``, not ``model='X'``."""
    token = _AS_FLAGS.set(True)
    try:
        yield
    finally:
        _AS_FLAGS.reset(token)


def option(name: str, value: str) -> str:
    """An option in the words of whoever asked: a Python argument or a flag."""
    return f"--{name} {shlex.quote(value)}" if _AS_FLAGS.get() else f"{name}={value!r}"


@dataclass(frozen=True)
class BaseModel:
    """The frozen model under an adaptation, in words that a delta can hold.

    Attributes:
        name: what :func:`~ueo_fast.finetune.clip.load.load_clip` takes as ``model``; empty where
            the model came from elsewhere.
        pretrained: tag or path of its weights; ``None`` where the name says it all.
        activation: ``"quickgelu"`` or ``"gelu"``. No tensor tells it, and the wrong one costs
            accuracy without an error.
        embed_dim: E, length of the features.
        fingerprint: of the weights that adaptation leaves alone, see :func:`fingerprint`.
    """

    name: str
    pretrained: str | None
    activation: str
    embed_dim: int
    fingerprint: str

    def title(self) -> str:
        """``RN50 (openai)``, for messages."""
        name = self.name or "a model without a name"
        return f"{name} ({self.pretrained})" if self.pretrained else name


def naming(base: BaseModel) -> str:
    """The options that load it."""
    words = option("model", base.name.removeprefix("local-dir:"))
    return f"{words} {option('pretrained', base.pretrained)}" if base.pretrained else words


def describe_base(model: nn.Module, name: str = "", pretrained: str | None = None) -> BaseModel:
    """Read activation, size and fingerprint from a model, adapted or not, patched or not."""
    return BaseModel(
        name, pretrained, activation_of(model), embed_dim_of(model), fingerprint(model)
    )


def check_base(recorded: BaseModel, found: BaseModel) -> None:
    """Is the model at hand the one that was recorded?

    What counts are activation, embedding size and fingerprint: the same weights may go by another
    name or lie in another folder. Name and tag are told where the weights differ.

    Raises:
        ValueError: it is not; the message has each field that differs, both values, the way out.
    """
    weighty = ("activation", "embed_dim", "fingerprint")
    if all(getattr(recorded, field) == getattr(found, field) for field in weighty):
        return
    fields = weighty if not found.name else ("name", "pretrained", *weighty)
    differences = [
        f"{field}: recorded {getattr(recorded, field)!r}, found {getattr(found, field)!r}"
        for field in fields
        if getattr(recorded, field) != getattr(found, field)
    ]
    raise ValueError(
        f"the base model is another one than recorded ({'; '.join(differences)}). "
        f"{_way_out(recorded, found)}"
    )


def _way_out(recorded: BaseModel, found: BaseModel) -> str:
    load = f"load_clip({recorded.name!r}, {recorded.pretrained!r})"
    if _AS_FLAGS.get():
        load = naming(recorded)
    if (recorded.name, recorded.pretrained) != (found.name, found.pretrained):
        rounded = ""
        if (found.name, recorded.activation) == ("", found.activation):
            rounded = ", not in bfloat16, which rounds the weights"
        one = f"{recorded.title()} instead: {load}" if recorded.name else "that one"
        return f"Load {one}{rounded}"
    if recorded.activation != found.activation:
        return f"Build it with {recorded.activation}, as {load} does"
    return (
        "The name is the same, so its weights were replaced, or loaded in another precision "
        "(bfloat16 rounds them): load those that it was adapted from"
    )


def activation_of(model: nn.Module) -> str:
    """``"quickgelu"`` if a module of that type is in the model, else ``"gelu"``."""
    quick = any(type(module).__name__.lower() == "quickgelu" for module in model.modules())
    return "quickgelu" if quick else "gelu"


def embed_dim_of(model: nn.Module) -> int:
    """Length of the text features.

    Raises:
        TypeError: the model has no text tower that open_clip builds.
    """
    tower: Any = getattr(model, "text", model)
    projection = getattr(tower, "text_projection", None)
    if isinstance(projection, nn.Linear):
        return projection.out_features
    if isinstance(projection, Tensor):
        return projection.shape[1]
    if hasattr(tower, "output_dim"):  # a HuggingFace tower
        return int(tower.output_dim)
    if not hasattr(tower, "ln_final"):
        raise TypeError(
            f"{type(model).__name__} has no text tower of open_clip; give a model that open_clip "
            "built, e.g. load_clip(...).model"
        )
    return int(tower.ln_final.weight.shape[0])


@torch.no_grad()
def fingerprint(model: nn.Module) -> str:
    """32 hexadecimal digits that tell one base model from another.

    A hash of names, sizes and values of all tensors that no adaptation changes, whatever its scope:
    everything but the affine parameters of the visual tower's normalisation layers and their
    statistics. Equal before and after adaptation, patched or not, on any device, for the same
    weights under another name, and for float32 and float16 copies of them: values are rounded to
    float16 first. Of each tensor some 4,096 evenly spaced numbers are taken.

    What it does not see: a change of a few numbers between those samples, or one below float16's
    rounding (a relative 5e-4); a base that differs in its norms only; the activation, the
    preprocessing and the tokenizer. bfloat16 weights have another fingerprint than the float32
    ones that they were rounded from. It finds mistakes, and is no protection against forgery.
    """
    adapted = tower_tensors(model, "all").keys()
    digest = hashlib.blake2b(digest_size=16)
    # A CustomTextCLIP keeps under `text.` what a CLIP keeps on the model.
    tensors = {
        name.removeprefix("text."): tensor
        for name, tensor in model.state_dict().items()
        if name not in adapted
    }
    for name in sorted(tensors):
        flat = tensors[name].detach().reshape(-1)
        sample = flat[:: max(1, len(flat) // _SAMPLE)]
        sample = sample.to(torch.float16 if sample.is_floating_point() else torch.int64)
        digest.update(f"{name} {len(flat)} ".encode())
        digest.update(sample.cpu().numpy().tobytes())
    return digest.hexdigest()
