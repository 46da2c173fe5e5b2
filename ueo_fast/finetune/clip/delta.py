"""What adaptation changed, in a file of some hundred kB: saved, read, and put on its base model."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ueo_fast.finetune.clip.base_model import BaseModel, check_base, describe_base, is_known
from ueo_fast.finetune.clip.load import load_tokenizer
from ueo_fast.finetune.clip.model import (
    CONTEXT,
    ClipClassifier,
    adapted_state,
    check_adapted_state,
    load_adapted_state,
    tower_tensors,
)
from ueo_fast.finetune.clip.prompt import PromptLearner
from ueo_fast.finetune.files.records import fitting
from ueo_fast.finetune.files.tensor_file import (
    TensorFileError,
    checksum,
    read_tensors,
    write_tensors,
)
from ueo_fast.patch.affine_parameters import SCOPES
from ueo_fast.ranges import check_number

FORMAT, VERSION = "ueo_fast.delta", 1
_LIMIT = 256 * 2**20
"""Bytes; RN50's delta has half a megabyte, that of a ViT-bigG three."""
_PACKAGES = {"ueo_fast": "ueo_fast", "torch": "torch", "open_clip": "open_clip_torch"}
_TEXTS = ("context_words", "suffix", "scope", "method", "created")
_JSON = {
    "class_names": tuple[str, ...],
    "seed": int | None,
    "extra": dict[str, Any],
    "pretrained": str | None,
}


class DeltaError(ValueError):
    """A delta that cannot be read, or belongs to another model; the message names the file."""


@dataclass(frozen=True)
class Delta:
    """A delta file's content.

    Attributes:
        base: the model that it was adapted from.
        class_names: the C known classes.
        context_words: from whose embeddings the context was initialised.
        suffix: what follows the class name in a prompt.
        scope: which affine parameters were trained.
        method: name of the method.
        seed: of the run; ``None`` where it was not recorded.
        created: time in UTC, ISO 8601.
        versions: of ueo_fast, torch and open_clip that wrote it.
        extra: what else the writer wanted to keep; ``logit_scale`` of a classifier whose
            temperature is not its model's own.
        tensors: :func:`~ueo_fast.finetune.clip.model.adapted_state`, on the CPU.
    """

    base: BaseModel
    class_names: tuple[str, ...]
    context_words: str
    suffix: str
    scope: str
    method: str
    seed: int | None
    created: str
    versions: dict[str, str]
    extra: dict[str, Any]
    tensors: dict[str, Tensor] = field(repr=False)

    @property
    def logit_scale(self) -> float | None:
        """Temperature of the classifier; ``None``: its model's own."""
        return self.extra.get("logit_scale")


def save_delta(
    path: str | os.PathLike[str],
    classifier: ClipClassifier,
    base: BaseModel,
    *,
    method: str,
    seed: int | None = None,
    extra: Mapping[str, Any] | None = None,
) -> Path:
    """Write what was learned, atomically.

    Args:
        path: of the file, ``*.safetensors``.
        classifier: adapted, on any device.
        base: what it was adapted from: ``load_clip(...).base``, or ``describe_base(model, name,
            pretrained)``.
        method: its name.
        seed: of the run.
        extra: anything JSON can hold.

    Raises:
        ValueError: ``base`` is another model than the classifier's, or a tensor is not finite.
        OSError: the file could not be written; the message names it, and it is as it was.
    """
    check_base(base, describe_base(classifier.model, base.name, base.pretrained))
    tensors, prompt = adapted_state(classifier), classifier.prompt
    _check_finite(tensors)
    kept = dict(extra or {})
    if classifier.fixed_logit_scale is not None:
        kept["logit_scale"] = classifier.fixed_logit_scale
    values = {
        "format": FORMAT,
        "format_version": str(VERSION),
        **{f"{name}_version": _version(package) for name, package in _PACKAGES.items()},
        "model": base.name,
        "pretrained": json.dumps(base.pretrained),
        "activation": base.activation,
        "embed_dim": str(base.embed_dim),
        "fingerprint": base.fingerprint,
        "class_names": json.dumps(prompt.class_names),
        "context_words": prompt.context_words,
        "suffix": prompt.suffix_text,
        "scope": classifier.scope,
        "method": method,
        "seed": json.dumps(seed),
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "extra": json.dumps(kept, allow_nan=False),
    }
    # A path that is not valid UTF-8 must not cost the result of a run.
    values = {
        key: value.encode(errors="backslashreplace").decode() for key, value in values.items()
    }
    return write_tensors(path, tensors, values, checked=True)


def read_delta(path: str | os.PathLike[str]) -> Delta:
    """Read a delta without a model, e.g. to load the base that it names.

    Nothing in the file is executed, and every byte that means something is checked.

    Raises:
        OSError: it does not exist or cannot be opened.
        DeltaError: it is not a delta, is damaged, or is of a newer format.
    """
    if not os.path.exists(path):
        raise FileNotFoundError(
            f"{os.fspath(path)} does not exist; give a delta.safetensors of a run or of "
            "Adaptation.save"
        )
    try:
        tensors, values = read_tensors(path, limit=_LIMIT)
    except TensorFileError as error:
        raise DeltaError(f"this is not a delta: {error}") from error
    if values.get("format") != FORMAT:
        raise DeltaError(
            f"{path} is a safetensors file but no delta: format is {values.get('format')!r}, not "
            f"{FORMAT!r}"
        )
    if values.get("format_version", "") != str(VERSION):
        raise DeltaError(
            f"{path}: format_version is {values.get('format_version', '')!r}, and this ueo_fast "
            f"({_version('ueo_fast')}) reads {str(VERSION)!r}; it was written by ueo_fast "
            f"{values.get('ueo_fast_version', 'of unknown version')}: install that one"
        )
    if values.get("checksum") != checksum(values, tensors):
        raise DeltaError(f"{path} is damaged or was edited: its checksum does not fit its content")
    try:
        parsed = {key: fitting(kind, json.loads(values[key]), key) for key, kind in _JSON.items()}
        if not parsed["class_names"]:
            raise ValueError("class_names is empty")
        if parsed["extra"].get("logit_scale") is not None:
            check_number("logit_scale", parsed["extra"]["logit_scale"], sign="positive")
        if values["scope"] not in SCOPES:
            raise ValueError(f"scope is {values['scope']!r}, known are {', '.join(SCOPES)}")
        base = BaseModel(
            values["model"],
            parsed.pop("pretrained"),
            values["activation"],
            int(values["embed_dim"]),
            values["fingerprint"],
        )
        versions = {name: values[f"{name}_version"] for name in _PACKAGES}
        parsed |= {key: values[key] for key in _TEXTS}
    except (KeyError, ValueError, TypeError, RecursionError) as error:
        raise DeltaError(
            f"{path} has no usable value for one of its fields ({error!r}); save it anew with "
            "save_delta"
        ) from error
    return Delta(base=base, versions=versions, tensors=tensors, **parsed)


def load_delta(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    tokenizer: Callable[..., Tensor] | None = None,
    base: BaseModel | None = None,
    class_names: Sequence[str] | None = None,
    patch: bool = True,
) -> ClipClassifier:
    """Put a delta on its base model.

    The model is known by its activation, embedding size and fingerprint (what that can and cannot
    see: :func:`~ueo_fast.finetune.clip.base_model.fingerprint`); its name may have changed. Give a
    model as it was loaded: of one that was adapted in a wider ``scope``, what the delta does not
    hold would stay.

    Args:
        model: of open_clip, on the device where it is to run. Changed in place, unless this raises.
        path: of the delta.
        tokenizer: of the model; ``None`` loads the one of ``base``, or of the recorded name if
            this machine knows that model (see :func:`~ueo_fast.finetune.clip.load.load_base`).
        base: what ``model`` was loaded as, for messages and the tokenizer.
        class_names: other classes than those recorded. The context is shared by all classes, so
            one that was learned on one list serves for another, if less well.
        patch: as in :class:`~ueo_fast.finetune.clip.model.ClipClassifier`.

    Returns:
        The classifier as it was saved, in evaluation mode.

    Raises:
        OSError: there is no such file, or it cannot be opened.
        DeltaError: the file is unusable, or belongs to another model; the message says which field
            differs, both values, and the way out.
        ValueError: ``class_names`` cannot be used.
    """
    delta = read_delta(path)
    found = describe_base(model, base.name if base else "", base.pretrained if base else None)
    names = delta.class_names if class_names is None else class_names
    with _unfit(path):
        check_base(delta.base, found)
        tokenize = tokenizer or _tokenizer(delta.base, base)
    with _unfit(path) if class_names is None else contextlib.nullcontext():
        context, suffix = delta.context_words, delta.suffix
        prompt = PromptLearner(model, tokenize, names, context=context, suffix=suffix)
    with _unfit(path):
        expected = {CONTEXT: prompt.context, **tower_tensors(model, delta.scope)}
        check_adapted_state(expected, delta.tensors)
        for name, tensor in delta.tensors.items():
            real = expected[name].is_floating_point()
            allowed = (torch.float32, torch.float64) if real else (expected[name].dtype,)
            if tensor.dtype not in allowed:
                raise ValueError(
                    f"{name!r} is {tensor.dtype}, expected {' or '.join(map(str, allowed))}"
                )
        _check_finite(delta.tensors)
    classifier = ClipClassifier(
        model, prompt, scope=delta.scope, patch=patch, logit_scale=delta.logit_scale
    )
    load_adapted_state(classifier, delta.tensors)
    return classifier


@contextlib.contextmanager
def _unfit(path: str | os.PathLike[str]) -> Iterator[None]:
    try:
        yield
    except (ValueError, OSError) as error:
        raise DeltaError(f"{path} does not fit the model: {error}") from error


def _check_finite(tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(
                f"{name!r} has NaN or infinite values: the adaptation diverged; adapt anew with "
                "lower learning rates"
            )


def _tokenizer(recorded: BaseModel, given: BaseModel | None) -> Callable[..., Tensor]:
    try:
        if given is not None and given.name:
            return load_tokenizer(given.name)
        if not recorded.name:
            reason = "the base model's name was not recorded"
        elif is_known(recorded):  # a delta may name anything
            return load_tokenizer(recorded.name, network=False)
        else:
            reason = f"this machine does not know the model that it names, {recorded.title()}"
    except (ValueError, OSError) as error:
        reason = str(error)
    raise ValueError(f"its tokenizer is not known ({reason}); give tokenizer=")


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
