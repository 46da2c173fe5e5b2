"""Load a CLIP for adaptation: a name and its weights, a folder, or a repository of the hub."""

from __future__ import annotations

import contextlib
import importlib
import shutil
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import safetensors.torch
import torch
from torch import Tensor

from ueo_fast.finetune.clip.base_model import (
    CONFIG,
    BaseModel,
    check_base,
    describe_base,
    is_builtin,
    is_known,
    naming,
    option,
    remember,
)
from ueo_fast.finetune.clip.weights import (
    HUB,
    LOCAL,
    NONE,
    PREFERRED,
    Source,
    find_source,
    from_hub,
    hub_file,
    identify,
    is_torchscript,
    offline,
    text_config,
    weights_error,
)
from ueo_fast.finetune.data.loader import seeded_torch
from ueo_fast.ranges import check_one_of

PRECISIONS = ("fp32", "fp16", "bf16")


@dataclass(frozen=True)
class LoadedClip:
    """A model and what belongs to it.

    Attributes:
        model: in evaluation mode, not patched, with open_clip's ``requires_grad`` flags.
        tokenizer: called as ``tokenizer(list of str, context_length=int)``; (C, L) int64.
        preprocess_cfg: open_clip's ``size``, ``mean``, ``std``, ``interpolation``, ``resize_mode``.
        base: what a delta records of it.
    """

    model: Any
    tokenizer: Callable[..., Tensor]
    preprocess_cfg: dict[str, Any]
    base: BaseModel


def load_clip(
    model: str,
    pretrained: str | None = None,
    *,
    device: str | torch.device = "cpu",
    precision: str = "fp32",
    activation: str | None = None,
) -> LoadedClip:
    """Build a model of open_clip with its weights, its tokenizer and its preprocessing.

    The activation fits the weights: open_clip 3.3 builds ``RN50`` with GELU and only warns that the
    ``openai`` weights were trained with QuickGELU; here they get QuickGELU, as does every tag that
    asks for it. Weights in the cache are loaded without the network.

    Args:
        model: a name of ``open_clip.list_models()``, ``hf-hub:owner/repository``,
            ``local-dir:folder``, or the folder itself, with ``open_clip_config.json`` and weights.
        pretrained: for a name: a tag of ``open_clip.list_pretrained_tags_by_model(model)``; the
            path of a file with weights; ``tag=path``, a file that holds the weights of that tag
            (downloaded elsewhere), which implies activation and preprocessing; or ``none`` for
            random weights, always the same ones. Folders and repositories bring their own weights.
        device: where the model goes.
        precision: ``fp32``; ``fp16`` or ``bf16`` load the large weights in that type
            (``ClipClassifier`` makes them float32 again, so this is for inference with the model).
        activation: ``gelu`` or ``quickgelu``, where only you can know it: a file for a name whose
            tags differ in it.

    Raises:
        ValueError: an unknown name or tag (with the closest ones), no ``pretrained`` for a name
            (with its tags), weights that do not fit, an activation that is not known.
        OSError: a file or folder is missing, or weights cannot be downloaded; the message says
            which file, and what to do without a network.

    Source: open_clip issues 771 and 915 (QuickGELU).
    """
    check_one_of("precision", precision, PRECISIONS)
    source = find_source(model, pretrained, activation)
    loaded = _load(source, device=device, precision=precision, network=True)
    if precision != "bf16":  # whose rounded weights are another base
        remember(loaded.base)
    return loaded


def load_tokenizer(name: str, *, network: bool = True) -> Callable[..., Tensor]:
    """The tokenizer of a model's name, as in :attr:`BaseModel.name`; no code with it is run.

    Args:
        name: of the model.
        network: download what is not on this machine.

    Raises:
        ValueError: this machine has no such model, or its config asks for more than plain options.
        OSError: its files are missing and cannot be downloaded, or need code of their own.
    """
    identifier = identify(name)
    of_hugging_face = text_config(identifier, network=network).get("hf_tokenizer_name")
    options = {"trust_remote_code": False} if of_hugging_face else {}
    try:
        tokenizer: Callable[..., Tensor] = from_hub(
            lambda: open_clip.get_tokenizer(identifier, **options),
            network=network and bool(of_hugging_face),
        )
    except Exception as error:
        raise OSError(
            f"the tokenizer of {name} could not be loaded ({_first_line(error)}). It may need the "
            "network once, or a package: `pip install transformers sentencepiece`"
        ) from error
    return tokenizer


def load_base(
    base: BaseModel,
    *,
    model: str | None = None,
    pretrained: str | None = None,
    device: str | torch.device = "cpu",
    precision: str = "fp32",
) -> LoadedClip:
    """Load what a delta or a run recorded, as :func:`load_clip`.

    A record may come from somebody else. Its model is loaded only if it is one of open_clip's own
    or was loaded by :func:`load_clip` on this machine before, with the same fingerprint; nothing is
    downloaded. If you name the ``model`` yourself, none of this holds.

    Args:
        base: the record.
        model: where the model is now, as for :func:`load_clip`.
        pretrained: its weights, if ``model`` is a name; ``None`` takes the recorded tag.
        device: where the model goes.
        precision: as for :func:`load_clip`.

    Raises:
        ValueError: this machine does not know the model, or its weights are not those recorded.
        OSError: it is gone; the message says how to name another place.
    """
    if model is not None:
        recorded = base.pretrained if is_builtin(base) and identify(model) == base.name else None
        weights = pretrained or recorded
        given = base.activation if weights not in (None, NONE) else None
        loaded = load_clip(model, weights, device=device, precision=precision, activation=given)
        check_base(base, loaded.base)
        return loaded
    if not base.name:
        raise ValueError(
            "the base model has no name, because it was not loaded by name (load_clip); name it: "
            f"{option('model', 'NAME')}"
        )
    if not is_known(base):
        raise ValueError(
            f"the base model {base.title()} is named by a run or a delta, and was not loaded on "
            "this machine before, or had other weights then; because such a file may come from "
            f"others, it is not opened. If you trust the model, name it: {naming(base)}"
        )
    given = base.activation if base.pretrained not in (None, NONE) else None
    try:
        source = find_source(base.name, base.pretrained, given, network=False)
    except FileNotFoundError as error:
        folder, place = base.name.startswith("local-dir:"), "/where/it/is/now"
        elsewhere = replace(base, name=place) if folder else replace(base, pretrained=place)
        raise FileNotFoundError(
            f"{error}. If the model is elsewhere now, say where: {naming(elsewhere)}"
        ) from error
    loaded = _load(source, device=device, precision=precision, network=False)
    check_base(base, loaded.base)
    return loaded


def _load(
    source: Source, *, device: str | torch.device, precision: str, network: bool
) -> LoadedClip:
    if text := source.text.get("hf_model_name"):
        _check_hugging_face(source.name, text, network=network)
    clip = _create(source, precision).eval().to(device)
    base = describe_base(clip, source.name, source.pretrained)
    tokenizer = load_tokenizer(source.name, network=network)
    return LoadedClip(clip, tokenizer, dict(clip.visual.preprocess_cfg), base)


def _check_hugging_face(name: str, repository: str, *, network: bool) -> None:
    """Fetch the config of a HuggingFace text tower, and refuse one that brings its own code."""
    try:
        transformers = importlib.import_module("transformers")
    except ImportError as error:
        raise ValueError(
            f"{name} has a text tower of HuggingFace: `pip install transformers sentencepiece`"
        ) from error
    try:
        config = from_hub(
            lambda: transformers.AutoConfig.from_pretrained(repository, trust_remote_code=False),
            network=network,
        )
    except Exception as error:
        raise OSError(
            f"the config of {repository}, the text tower of {name}, could not be loaded "
            f"({_first_line(error)}). It needs the network once"
        ) from error
    if getattr(config, "auto_map", None):
        raise ValueError(
            f"the text tower {repository} of {name} brings code of its own, which is never run; "
            "choose another model"
        )


def _create(source: Source, precision: str) -> Any:
    if source.pretrained == NONE:
        warnings.warn(
            f"{source.name} has random weights (pretrained='none'): it knows nothing about images; "
            "use it to try things out only",
            stacklevel=4,
        )
    options = {} if source.quick_gelu is None else {"quick_gelu": source.quick_gelu}
    # Random weights are the same ones in every process.
    with seeded_torch(0), warnings.catch_warnings(), offline():
        # torch warns that a TorchScript archive is one, and old; find_source has checked it.
        warnings.filterwarnings("ignore", message=".*TorchScript archive")
        warnings.filterwarnings("ignore", message=".*torch.jit.load")
        try:
            with _plain_checkpoint(source) as found:
                own = found.identifier.startswith((LOCAL, HUB))
                return open_clip.create_model(
                    found.identifier,
                    pretrained=None if own else found.weights,
                    precision=precision,
                    force_preprocess_cfg=found.preprocess,
                    load_weights=found.pretrained != NONE,
                    require_pretrained=found.pretrained != NONE,
                    pretrained_image=False,
                    pretrained_text=False,
                    weights_only=not found.torchscript,
                    **options,
                )
        except Exception as error:  # open_clip raises whatever its parts raise
            raise weights_error(source, error) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


_SCALARS = "?SU" + np.typecodes["AllInteger"] + np.typecodes["AllFloat"]
_SCALAR: Any = np.float64(0).__reduce__()[0]
_NUMPY: list[Any] = [
    np.dtype,
    *{type(np.dtype(code)) for code in _SCALARS},
    *((_SCALAR, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
]
"""What a pickle of NumPy scalars names: types of numbers and texts, and what makes one."""
_WRAPPERS = {"module", "_orig_mod"}
"""Names that DataParallel and torch.compile put before or between those of a model."""


@contextlib.contextmanager
def _plain_checkpoint(source: Source) -> Iterator[Source]:
    """The source with weights as open_clip reads them, while the block lasts.

    A checkpoint of a wrapped model (``module.`` or ``_orig_mod.`` anywhere in its names, or an
    attribute that held the model in front of all of them) is written without these names into a
    temporary folder. NumPy scalars next to the weights may be read. No code in a file runs.
    """
    safe = torch.serialization.safe_globals(_NUMPY)
    with tempfile.TemporaryDirectory() as folder, safe:
        state = _unwrapped(source)
        if state is None:
            yield source
            return
        weights = str(Path(folder) / PREFERRED[0])
        safetensors.torch.save_file(state, weights)
        name = source.identifier
        if not name.startswith((LOCAL, HUB)):
            yield replace(source, weights=weights)
            return
        config = Path(name.removeprefix(LOCAL)) / CONFIG
        shutil.copyfile(
            hub_file(name, [CONFIG], network=False) if name.startswith(HUB) else config,
            Path(folder) / CONFIG,
        )
        yield replace(source, identifier=LOCAL + folder)


def _unwrapped(source: Source) -> dict[str, Tensor] | None:
    """The weights without the names of wrappers; None where there are none of these."""
    file = source.weights
    if file is None or source.torchscript or file.endswith((".npz", ".npy")):
        return None
    state: Any
    if file.endswith(".safetensors"):
        with safetensors.safe_open(file, framework="pt") as opened:
            if not _is_wrapped(opened.keys()):
                return None
            state = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    else:
        mapped = zipfile.is_zipfile(file) and not is_torchscript(file)
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
        if isinstance(state, dict):
            state = state.get("state_dict", state)
        if not isinstance(state, dict) or not _is_wrapped(state):
            return None
    outer = _outer(state)
    plain: dict[str, Tensor] = {}
    for name, value in state.items():
        own = ".".join(part for part in name[len(outer) :].split(".") if part not in _WRAPPERS)
        if own in plain:
            raise ValueError(f"{file} has {own!r} twice, once as {name!r}: keep one of the two")
        if isinstance(value, Tensor):
            plain[own] = value.detach().clone(memory_format=torch.contiguous_format)
    return plain


def _is_wrapped(names: Iterable[str]) -> bool:
    names = [name for name in names if isinstance(name, str)]
    parts = {part for name in names for part in name.split(".")}
    return bool(_outer(names)) or not _WRAPPERS.isdisjoint(parts)


def _outer(names: Iterable[str]) -> str:
    """What all names begin with: the name of an attribute that held the model, e.g. Lightning's."""
    names = list(names)
    held = [name.removesuffix("logit_scale") for name in names if name.endswith(".logit_scale")]
    return held[0] if held and all(name.startswith(held[0]) for name in names) else ""
