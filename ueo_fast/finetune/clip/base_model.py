"""Which model an adaptation started from, and what files of others may decide about models.

A model folder, a run folder and a delta may come from anywhere. No code in one is run, a model's
config may set plain options only, and the model that a run or a delta names is opened only if the
user has loaded it on this machine before.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import shlex
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.coca_model import MultimodalCfg
from open_clip.model import CLIPTextCfg, CLIPVisionCfg
from open_clip.transform import PreprocessCfg
from torch import Tensor, nn

from ueo_fast.finetune.clip.model import tower_tensors
from ueo_fast.finetune.files.atomic import atomic_file

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
    """An option as the caller writes it: a Python argument or a flag."""
    return f"--{name} {shlex.quote(shown(value))}" if _AS_FLAGS.get() else f"{name}={value!r}"


def shown(text: str) -> str:
    """Text from a file of others, with what could steer a terminal spelled out."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


@dataclass(frozen=True)
class BaseModel:
    """The frozen model under an adaptation, in words that a delta can hold.

    Attributes:
        name: what :func:`~ueo_fast.finetune.clip.load.load_clip` takes as ``model``; empty where
            the model came from elsewhere.
        pretrained: tag or path of its weights; ``None`` where the name is enough.
        activation: ``"quickgelu"`` or ``"gelu"``. No tensor shows it, and the wrong one costs
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
        name = shown(self.name) or "a model without a name"
        return f"{name} ({shown(self.pretrained)})" if self.pretrained else name


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
    """Compare activation, embedding size and fingerprint of the recorded model and the given one.

    The same weights may have another name or lie in another folder; the message about different
    ones has name and tag too.

    Raises:
        ValueError: they differ; the message has each such field, both values, the way out.
    """
    different = [name for name, value in asdict(recorded).items() if getattr(found, name) != value]
    if not {"activation", "embed_dim", "fingerprint"}.intersection(different):
        return
    differences = [
        f"{name}: recorded {getattr(recorded, name)!r}, found {getattr(found, name)!r}"
        for name in different
        if found.name or name not in ("name", "pretrained")
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
    ones that they were rounded from. It finds mistakes; it does not protect against forgery.
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


def is_builtin(base: BaseModel) -> bool:
    """Whether name and weights are among those that open_clip itself lists."""
    return base.name in open_clip.list_models() and (
        base.pretrained == "none"
        or bool(base.pretrained and open_clip.get_pretrained_cfg(base.name, base.pretrained))
    )


def remember(base: BaseModel) -> None:
    """Note that the user himself has loaded this model on this machine.

    One small file per model in ``$XDG_STATE_HOME/ueo_fast/models`` (``~/.local/state/...``). Where
    that cannot be written nothing is noted: the model must then be named wherever a run is used.
    """
    values = asdict(base)
    with contextlib.suppress(OSError, RuntimeError, UnicodeError):  # no home, full disk, ...
        path = _record(base.name, base.pretrained)
        if recall(base.name, base.pretrained) != base:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with atomic_file(path) as file:
                file.write(json.dumps(values).encode())


def recall(name: str, pretrained: str | None) -> BaseModel | None:
    """What :func:`remember` noted of this name and these weights."""
    try:
        values = json.loads(_record(name, pretrained).read_text(encoding="utf-8"))
        return BaseModel(**values)
    except (OSError, RuntimeError, ValueError, TypeError):
        return None


def is_known(base: BaseModel) -> bool:
    """Whether this machine may load the model because a run or a delta names it.

    One of open_clip's own, or one that the user has loaded here, with the same fingerprint.
    """
    return is_builtin(base) or recall(base.name, base.pretrained) == base


def _record(name: str, pretrained: str | None) -> Path:
    root = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    key = hashlib.blake2b(json.dumps([name, pretrained]).encode(), digest_size=16).hexdigest()
    return Path(root) / "ueo_fast" / "models" / f"{key}.json"


CONFIG = "open_clip_config.json"
_LARGEST_CONFIG = 2**20

_SECTIONS: dict[str, set[str]] = {
    name: {field.name for field in fields(kind)}
    for name, kind in (
        ("vision_cfg", CLIPVisionCfg),
        ("text_cfg", CLIPTextCfg),
        ("multimodal_cfg", MultimodalCfg),
        ("preprocess_cfg", PreprocessCfg),
    )
}
_MODEL = {"embed_dim", "quick_gelu", "custom_text", "pad_id", "output_dict"} | {
    *("init_logit_scale", "init_logit_bias", "nonscalar_logit_scale"),
    *("vision_cfg", "text_cfg", "multimodal_cfg"),
}
_ARGUMENTS = {
    "norm_kwargs": {"eps", "elementwise_affine", "bias"},
    "act_kwargs": {"approximate"},
    "tokenizer_kwargs": {"clean", "strip_sep_token", "language"},
}
"""Options that are handed on as keyword arguments, and those that may be among them."""
_WORDS = {
    *("pool_type", "proj_type", "block_type", "pos_embed_type", "timm_pool", "timm_proj"),
    *("hf_pooler_type", "hf_proj_type", "tokenizer_mode", "attn_type"),
    *("approximate", "clean", "language", "interpolation", "resize_mode", "mode"),
}
"""Options whose value is one of a few words that open_clip compares it with."""
_NAMES = {
    "timm_model_name": re.compile(r"\w[\w.-]*"),  # no "hf-hub:...", no "local-dir:..."
    "hf_model_name": re.compile(r"\w[\w.-]*(/\w[\w.-]*)?"),
    "hf_tokenizer_name": re.compile(r"\w[\w.-]*(/\w[\w.-]*)?"),
}
"""Options that name an architecture or a repository of the hub, never a path."""


def read_model_config(path: Path) -> dict[str, Any]:
    """The ``model_cfg`` of an ``open_clip_config.json`` that holds plain options only.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not a config, or has an option that a file must not decide; the message
            names file, option and value.
    """
    if not path.is_file():  # a pipe may wait for ever
        raise FileNotFoundError(f"{path} is not a file")
    if path.stat().st_size > _LARGEST_CONFIG:
        raise ValueError(f"{path} has more than {_LARGEST_CONFIG:,} bytes, so it is not a config")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error})") from error
    if not isinstance(config, dict) or not isinstance(config.get("model_cfg"), dict):
        raise ValueError(f"{path} has no 'model_cfg' with the options of a model")
    model: dict[str, Any] = config["model_cfg"]
    _check_options(f"{path}: model_cfg", model, _MODEL)
    preprocess = config.get("preprocess_cfg") or {}
    _check_section(f"{path}: preprocess_cfg", "preprocess_cfg", preprocess)
    return model


def _check_options(where: str, options: dict[str, Any], known: set[str]) -> None:
    for name, value in options.items():
        full = f"{where}.{shown(name)}"
        if name not in known:
            raise ValueError(
                f"{full}={value!r} is not an option that a model's config may set, because a "
                f"config may come from others: remove it from the file. Known here: "
                f"{', '.join(sorted(known))}"
            )
        if name in _SECTIONS:
            _check_section(full, name, value)
        elif name in _ARGUMENTS:
            if value is not None and not isinstance(value, dict):
                raise ValueError(f"{full}={value!r} must be a set of options")
            _check_options(full, value or {}, _ARGUMENTS[name])
        elif name in _NAMES:
            plain_name = isinstance(value, str) and _NAMES[name].fullmatch(value)
            if value not in (None, "") and (not plain_name or ".." in value):
                raise ValueError(
                    f"{full}={value!r} must be the plain name of an architecture or of a "
                    "repository of the hub, not a path or an address"
                )
        elif isinstance(value, str):
            if name not in _WORDS or not re.fullmatch(r"[\w-]*", value):
                raise ValueError(f"{full}={value!r} must not be such a text")
        elif not _is_plain(value):
            raise ValueError(f"{full}={value!r} must be a finite number, a yes or no, or a list")


def _check_section(where: str, name: str, value: Any) -> None:
    if not isinstance(value, dict):
        raise ValueError(f"{where}={value!r} must be a set of options")
    # Of the preprocessing open_clip takes what it knows and leaves the rest.
    known = {key: value[key] for key in value if key in _SECTIONS[name]}
    _check_options(where, known if name == "preprocess_cfg" else value, _SECTIONS[name])


def _is_plain(value: Any) -> bool:
    if isinstance(value, list):
        return (
            len(value) <= 64
            and not any(isinstance(v, list) for v in value)
            and all(_is_plain(v) for v in value)
        )
    return value is None or (isinstance(value, (bool, int, float)) and math.isfinite(value))
