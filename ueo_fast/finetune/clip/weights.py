"""Which weights a model's name means, where they lie, and which activation they want."""

from __future__ import annotations

import difflib
import hashlib
import os
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
from huggingface_hub import constants, try_to_load_from_cache

NONE = "none"
"""The ``pretrained`` that stands for random weights."""

ACTIVATIONS = ("gelu", "quickgelu")

_LOCAL, _HUB = "local-dir:", "hf-hub:"
_CONFIG = "open_clip_config.json"
_SUFFIXES = (".safetensors", ".bin", ".pth", ".pt", ".npz", ".npy", ".ckpt")
_AT_ONCE = "With HF_HUB_OFFLINE=1 in the environment the hub is not asked, which saves the wait"
_PREPROCESS = ("mean", "std", "interpolation", "resize_mode")


@dataclass(frozen=True)
class Source:
    """Everything that decides which model is built.

    Attributes:
        identifier: what open_clip takes as the model's name.
        name: the same for a record: a folder's path is absolute.
        pretrained: for a record; ``None`` for folders and repositories.
        weights: the file to load; ``None`` where open_clip finds it, or there is none.
        quick_gelu: the activation to build with; ``None`` leaves it to the config.
        preprocess: mean, std, interpolation and resize mode that belong to the weights.
        torchscript: the file is one of OpenAI's archives, known by its hash.
    """

    identifier: str
    name: str
    pretrained: str | None
    weights: str | None = None
    quick_gelu: bool | None = None
    preprocess: dict[str, Any] | None = None
    torchscript: bool = False


def find_source(model: str, pretrained: str | None, activation: str | None) -> Source:
    """Resolve names, tags and paths; see :func:`~ueo_fast.finetune.clip.load.load_clip` too."""
    if activation is not None and activation not in ACTIVATIONS:
        raise ValueError(f"activation={activation!r} is unknown; choose one of gelu, quickgelu")
    name = identify(model)
    quick = None if activation is None else activation == "quickgelu"
    if name.startswith((_LOCAL, _HUB)):
        if pretrained not in (None, NONE):
            raise ValueError(
                f"pretrained={pretrained!r} was given, but {name} brings its own weights; leave "
                "it out, or give the name of an architecture as the model"
            )
        return Source(name, name, pretrained, quick_gelu=quick)
    if pretrained == NONE:
        return Source(name, name, NONE, quick_gelu=quick)
    tags = open_clip.list_pretrained_tags_by_model(name)
    if pretrained is None:
        known = f"one of its tags ({', '.join(tags)})" if tags else "none is known to open_clip"
        raise ValueError(
            f"no pretrained weights were chosen for {name}: give {known}, the path of a file, or "
            "pretrained='none' for random weights"
        )
    tag, _, path = pretrained.partition("=")
    if cfg := open_clip.get_pretrained_cfg(name, tag):
        file = str(_existing(path)) if path else _tag_file(name, tag, cfg)
        return _of_tag(name, tag, cfg, file, f"{tag}={file}" if path else tag, quick)
    if not _is_path(pretrained):
        raise ValueError(
            f"{name} has no pretrained weights {pretrained!r}{_closest(pretrained, tags)}. Its "
            f"tags: {', '.join(tags) or 'none'}; the path of a file is taken as well"
        )
    return _of_file(name, str(_existing(pretrained)), tags, quick)


def identify(model: str) -> str:
    """A known name, ``hf-hub:...`` as it is, or ``local-dir:`` with an absolute path.

    Raises:
        ValueError: an unknown name; the message has the closest ones.
        FileNotFoundError: a folder without config or weights.
    """
    if model.startswith(_HUB) and model != _HUB:
        return model
    cleaned = model.replace("/", "-")  # "ViT-B/32", as OpenAI writes it
    if cleaned in open_clip.list_models():
        return cleaned
    folder = Path(model.removeprefix(_LOCAL)).expanduser()
    if model.startswith(_LOCAL) or folder.is_dir():
        _check_folder(folder)
        return _LOCAL + str(folder.absolute())
    names = open_clip.list_models()
    raise ValueError(
        f"model={model!r} is no folder and no model of open_clip{_closest(cleaned, names)}. "
        f"`python -c 'import open_clip; print(open_clip.list_models())'` lists all {len(names)}"
    )


def weights_error(source: Source, error: Exception) -> Exception:
    """What to raise when open_clip could not build the model."""
    text = str(error).strip() or type(error).__name__
    reason = text if len(text) <= 300 else f"{text[:300]} ..."
    hub = source.identifier.startswith(_HUB)
    if hub and text.startswith(("Failed initial config", "Required pretrained")):
        repository = source.identifier.removeprefix(_HUB)
        return OSError(
            f"{source.identifier} could not be downloaded ({reason}). Without a network: download "
            f"{_CONFIG} and the weights of https://huggingface.co/{repository} elsewhere into one "
            f"folder, and give that folder as the model. Looked for in {constants.HF_HUB_CACHE}. "
            f"{_AT_ONCE}"
        )
    return ValueError(
        f"the weights {source.weights or source.identifier} do not load into {source.name}: "
        f"{reason}"
    )


def _of_tag(
    name: str, tag: str, cfg: dict[str, Any], file: str, recorded: str, quick: bool | None
) -> Source:
    wanted = _quick_gelu(name, cfg)
    if quick is not None and quick != wanted:
        raise ValueError(
            f"activation={ACTIVATIONS[quick]!r} was asked for, but the weights {tag!r} of {name} "
            f"were trained with {ACTIVATIONS[wanted]!r}; leave it out"
        )
    preprocess = {key: cfg[key] for key in _PREPROCESS if key in cfg}
    torchscript = _is_torchscript(file)
    if torchscript:
        _known_archive(name, file)
    return Source(name, name, recorded, file, wanted, preprocess, torchscript)


def _of_file(name: str, file: str, tags: list[str], quick: bool | None) -> Source:
    if _is_torchscript(file):
        tag = _known_archive(name, file)
        cfg = open_clip.get_pretrained_cfg(name, tag)
        return _of_tag(name, tag, cfg, file, f"{tag}={file}", quick)
    cfgs = {tag: open_clip.get_pretrained_cfg(name, tag) for tag in tags}
    activations = {tag: _quick_gelu(name, cfg) for tag, cfg in cfgs.items()}
    own = _quick_gelu(name, {})
    if quick is None and set(activations.values()) - {own}:
        trained = ", ".join(f"{tag}: {ACTIVATIONS[value]}" for tag, value in activations.items())
        raise ValueError(
            f"the activation that {file} was trained with is not known, and the wrong one costs "
            f"accuracy without an error ({name} is built with {ACTIVATIONS[own]}; {trained}). "
            f"If these are the weights of a tag, say so: pretrained='{tags[0]}={file}'. Else give "
            "activation='gelu' or activation='quickgelu'"
        )
    found = [{key: cfg[key] for key in _PREPROCESS if key in cfg} for cfg in cfgs.values()]
    preprocess = found[0] if found else None
    if any(one != preprocess for one in found):
        warnings.warn(
            f"the tags of {name} differ in their preprocessing, and which one {file} needs is not "
            f"known: OpenAI's mean and std are taken. For a tag's own say '{tags[0]}={file}'",
            stacklevel=4,
        )
        preprocess = None
    return Source(name, name, file, file, own if quick is None else quick, preprocess)


def _quick_gelu(name: str, cfg: dict[str, Any]) -> bool:
    """The tag's word, else the architecture's (roberta-ViT-B-32 has it in its config only)."""
    return bool(cfg.get("quick_gelu", open_clip.get_model_config(name).get("quick_gelu", False)))


def _hub_files(cfg: dict[str, Any]) -> tuple[str, list[str]]:
    """Repository, and the names that its weights may have."""
    repository, file = os.path.split(cfg.get("hf_hub", ""))
    file = file or "open_clip_pytorch_model.bin"
    safe = {"open_clip_pytorch_model.bin": "open_clip_model.safetensors"}
    return repository, [safe.get(file, str(Path(file).with_suffix(".safetensors"))), file]


def _tag_file(name: str, tag: str, cfg: dict[str, Any]) -> str:
    """The weights of a tag: from the hub's cache without asking the network, else downloaded."""
    repository, files = _hub_files(cfg)
    if repository:
        for file in files:
            cached = try_to_load_from_cache(repository, file)
            if isinstance(cached, str):
                return cached
    try:
        return str(open_clip.download_pretrained(cfg))
    except Exception as error:  # whatever the hub's client and urllib raise
        places = [f"https://huggingface.co/{repository} ({' or '.join(files)})"] * bool(repository)
        places += [cfg["url"]] * bool(cfg.get("url"))
        raise OSError(
            f"the weights {tag!r} of {name} are not in {constants.HF_HUB_CACHE} and could not be "
            f"downloaded ({error}). Without a network: download {', or '.join(places)} elsewhere, "
            f"copy the file to this machine, and give pretrained='{tag}=/path/of/the/file'. "
            f"{_AT_ONCE}"
        ) from error


def _existing(path: str) -> Path:
    file = Path(path).expanduser()
    if file.is_dir():
        raise FileNotFoundError(
            f"pretrained={path!r} is a folder; give the file in it, or, if it has {_CONFIG}, give "
            "the folder as the model and leave pretrained out"
        )
    if not file.is_file():
        raise FileNotFoundError(f"pretrained={path!r}: there is no such file")
    return file.absolute()


def _is_path(text: str) -> bool:
    path = Path(text).expanduser()
    return os.sep in text or path.suffix.lower() in _SUFFIXES or path.exists()


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise FileNotFoundError(f"the model's folder {folder} does not exist")
    if not (folder / _CONFIG).is_file():
        raise FileNotFoundError(
            f"the folder {folder} has no {_CONFIG}, so it is no model of open_clip; "
            "open_clip.push_to_hf_hub's save_for_hf writes such folders"
        )
    if not any(path.suffix in (".safetensors", ".bin", ".pth") for path in folder.iterdir()):
        raise FileNotFoundError(
            f"the folder {folder} has {_CONFIG} but no weights (*.safetensors, *.bin or *.pth)"
        )


def _is_torchscript(file: str) -> bool:
    if not zipfile.is_zipfile(file):
        return False
    with zipfile.ZipFile(file) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _known_archive(name: str, file: str) -> str:
    """The tag of an archive of OpenAI's, by its hash.

    TorchScript is a program, so only the published ones are opened.
    """
    hasher = hashlib.sha256()
    with open(file, "rb") as opened:
        while block := opened.read(1 << 20):
            hasher.update(block)
    digest = hasher.hexdigest()
    for tag in open_clip.list_pretrained_tags_by_model(name):
        url = open_clip.get_pretrained_cfg(name, tag).get("url", "")
        if digest in url.split("/"):
            return tag
    raise ValueError(
        f"{file} is a TorchScript archive, which is a program, and none that is published for "
        f"{name} (its sha256 is {digest}); save the weights as safetensors, "
        "safetensors.torch.save_file(model.state_dict(), ...), and give that file"
    )


def _closest(word: str, known: list[str]) -> str:
    """``; did you mean ...?``, or nothing."""
    by_lower = {name.lower(): name for name in known}
    close = difflib.get_close_matches(word.lower(), by_lower, n=5, cutoff=0.5)
    return f"; did you mean {', '.join(by_lower[name] for name in close)}?" if close else ""
