"""What files of others may decide: plain options of a model, and models that this machine knows.

A model folder, a run folder and a delta may come from anywhere. No code that lies in one is run,
and the model that a run or a delta names is opened only if the user has loaded it here himself.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import re
from pathlib import Path
from typing import Any

import open_clip
from open_clip.coca_model import MultimodalCfg
from open_clip.model import CLIPTextCfg, CLIPVisionCfg
from open_clip.transform import PreprocessCfg

from ueo_fast.finetune.clip.base_model import BaseModel
from ueo_fast.finetune.files.atomic import atomic_file

CONFIG = "open_clip_config.json"
_LARGEST_CONFIG = 2**20

_SECTIONS: dict[str, set[str]] = {
    name: {field.name for field in dataclasses.fields(kind)}
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
    """Read an ``open_clip_config.json`` that holds plain options only.

    Returns:
        Its ``model_cfg``.

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
        full = f"{where}.{name}"
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
            _check_name(full, value, _NAMES[name])
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


def _check_name(where: str, value: Any, pattern: re.Pattern[str]) -> None:
    if value is None or value == "":
        return
    if not isinstance(value, str) or not pattern.fullmatch(value) or ".." in value:
        raise ValueError(
            f"{where}={value!r} must be the plain name of an architecture or of a repository of "
            "the hub, not a path or an address"
        )


def _is_plain(value: Any) -> bool:
    if isinstance(value, list):
        return (
            len(value) <= 64
            and not any(isinstance(v, list) for v in value)
            and all(_is_plain(v) for v in value)
        )
    return value is None or (isinstance(value, (bool, int, float)) and math.isfinite(value))


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
    values = dataclasses.asdict(base)
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
