"""Load a CLIP for adaptation: a name and its weights, a folder, or a repository of the hub."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import open_clip
import torch
from torch import Tensor

from ueo_fast.finetune.clip.base_model import BaseModel, check_base, describe_base
from ueo_fast.finetune.clip.weights import NONE, Source, find_source, identify, weights_error

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
    asks for it. Weights that are in the cache are loaded without the network.

    Args:
        model: a name of ``open_clip.list_models()``, ``hf-hub:owner/repository``,
            ``local-dir:folder``, or the folder itself, with ``open_clip_config.json`` and weights.
        pretrained: for a name: a tag of ``open_clip.list_pretrained_tags_by_model(model)``; the
            path of a file with weights; ``tag=path``, a file that holds the weights of that tag
            (downloaded elsewhere), which says activation and preprocessing as well; or ``none`` for
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
            which file, and how to go on without a network.

    Source: open_clip issues 771 and 915 (QuickGELU).
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision={precision!r} is unknown; choose one of {_list(PRECISIONS)}")
    source = find_source(model, pretrained, activation)
    clip = _create(source, precision).eval().to(device)
    base = describe_base(clip, source.name, source.pretrained)
    return LoadedClip(clip, load_tokenizer(source.name), dict(clip.visual.preprocess_cfg), base)


def load_tokenizer(name: str) -> Callable[..., Tensor]:
    """The tokenizer of a model's name, as in :attr:`BaseModel.name`.

    Raises:
        ValueError: the name is none of this machine's.
        OSError: its files are missing and cannot be downloaded.
    """
    identifier = identify(name)
    try:
        tokenizer: Callable[..., Tensor] = open_clip.get_tokenizer(identifier)
    except Exception as error:
        raise OSError(
            f"the tokenizer of {name} could not be loaded ({_first_line(error)}). It may need the "
            "network once, or a package: `pip install transformers sentencepiece`"
        ) from error
    return tokenizer


def load_base(
    base: BaseModel, *, device: str | torch.device = "cpu", precision: str = "fp32"
) -> LoadedClip:
    """Load what a delta or a run recorded, as :func:`load_clip`.

    Raises:
        ValueError: the name gives other weights today than those recorded.
    """
    if not base.name:
        raise ValueError(
            "the base model has no name, because the one who saved this had none; load the model "
            "yourself and use load_delta"
        )
    given = base.activation if base.pretrained and base.pretrained != NONE else None
    loaded = load_clip(
        base.name, base.pretrained, device=device, precision=precision, activation=given
    )
    check_base(base, loaded.base)
    return loaded


def _create(source: Source, precision: str) -> Any:
    if source.pretrained == NONE:
        warnings.warn(
            f"{source.name} has random weights (pretrained='none'): it knows nothing about images, "
            "and serves to try things out",
            stacklevel=3,
        )
    options: dict[str, Any] = {}
    if source.quick_gelu is not None:
        options["quick_gelu"] = source.quick_gelu
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        torch.manual_seed(0)  # random weights are the same ones in every process
        # Of a TorchScript archive torch says so, and that it is old; find_source has checked it.
        warnings.filterwarnings("ignore", message=".*TorchScript archive")
        warnings.filterwarnings("ignore", message=".*torch.jit.load")
        try:
            return open_clip.create_model(
                source.identifier,
                pretrained=source.weights,
                precision=precision,
                force_preprocess_cfg=source.preprocess,
                load_weights=source.pretrained != NONE,
                require_pretrained=source.pretrained != NONE,
                pretrained_image=False,
                pretrained_text=False,
                weights_only=not source.torchscript,
                **options,
            )
        except Exception as error:  # open_clip raises whatever its parts raise
            raise weights_error(source, error) from error


def _list(names: tuple[str, ...]) -> str:
    return ", ".join(names)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
