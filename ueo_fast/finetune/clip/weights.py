"""Which weights a model's name means, where they are or come from, and their activation."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import os
import threading
import warnings
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import open_clip
from huggingface_hub import constants, get_session, try_to_load_from_cache
from open_clip.pretrained import download_pretrained_from_hf

from ueo_fast.finetune.clip.base_model import CONFIG, option, read_model_config
from ueo_fast.ranges import check_one_of

NONE = "none"
"""The ``pretrained`` that stands for random weights."""

ACTIVATIONS = ("gelu", "quickgelu")

LOCAL, HUB = "local-dir:", "hf-hub:"
_PATIENCE = 8.0
"""Seconds in which the hub must answer before anything is downloaded."""
_T = TypeVar("_T")
_SUFFIXES = (".safetensors", ".bin", ".pth", ".pt", ".npz", ".npy", ".ckpt")
_FOLDER_SUFFIXES = (".safetensors", ".bin", ".pth")
PREFERRED = (
    *("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors"),
    *("open_clip_pytorch_model.bin", "open_clip_pytorch_model.pth", "model.safetensors"),
    *("pytorch_model.bin", "pytorch_model.pth", "model.pth"),
)
"""Of several files with weights in a folder open_clip takes the first of these."""


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
        text: the ``text_cfg`` of its config, checked where it comes from a file.
    """

    identifier: str
    name: str
    pretrained: str | None
    weights: str | None = None
    quick_gelu: bool | None = None
    preprocess: dict[str, Any] | None = None
    torchscript: bool = False
    text: dict[str, Any] = field(default_factory=dict)


def find_source(
    model: str, pretrained: str | None, activation: str | None, *, network: bool = True
) -> Source:
    """Resolve names, tags and paths; see :func:`~ueo_fast.finetune.clip.load.load_clip` too.

    Without ``network`` what is not on this machine is an error.
    """
    if activation is not None:
        check_one_of("activation", activation, ACTIVATIONS)
    name = identify(model)
    quick = None if activation is None else activation == "quickgelu"
    if name.startswith((LOCAL, HUB)):
        if pretrained not in (None, NONE):
            raise ValueError(
                f"pretrained={pretrained!r} was given, but {name} brings its own weights; leave "
                "it out, or give the name of an architecture as the model"
            )
        text = text_config(name, network=network)
        weights = None if pretrained == NONE else _own_weights(name, network=network)
        return Source(name, name, pretrained, weights, quick_gelu=quick, text=text)
    found = _of_name(name, pretrained, quick, network=network)
    return replace(found, text=text_config(name))


def _of_name(name: str, pretrained: str | None, quick: bool | None, *, network: bool) -> Source:
    if pretrained == NONE:
        return Source(name, name, NONE, quick_gelu=quick)
    tags = open_clip.list_pretrained_tags_by_model(name)
    if pretrained is None:
        known = f"one of its tags ({', '.join(tags)})" if tags else "none is known to open_clip"
        raise ValueError(
            f"no pretrained weights were chosen for {name}: give {known}, the path of a file, or "
            f"{option('pretrained', NONE)} for random weights"
        )
    tag, _, path = pretrained.partition("=")
    if cfg := open_clip.get_pretrained_cfg(name, tag):
        file = str(_existing(path)) if path else _tag_file(name, tag, cfg, network)
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
    if model.startswith(HUB) and model != HUB:
        return model
    cleaned = model.replace("/", "-")  # "ViT-B/32", as OpenAI writes it
    if cleaned in open_clip.list_models():
        return cleaned
    folder = Path(model.removeprefix(LOCAL)).expanduser()
    if model.startswith(LOCAL) or folder.is_dir():
        _check_folder(folder)
        return LOCAL + str(folder.absolute())
    names = open_clip.list_models()
    raise ValueError(
        f"model={model!r} is neither a folder nor a model of open_clip{_closest(cleaned, names)}. "
        f"`python -c 'import open_clip; print(open_clip.list_models())'` lists all {len(names)}"
    )


def weights_error(source: Source, error: Exception) -> Exception:
    """What to raise when open_clip could not build the model."""
    text = str(error).strip() or type(error).__name__
    reason = text if len(text) <= 300 else f"{text[:300]} ..."
    way_out = ""
    if "weights_only" in text or "Unsupported" in text:  # torch's advice is to run the pickle
        reason = text.partition(". ")[0].partition("\n")[0]
        way_out = (
            ". It holds more than numbers, and a pickle can run any program, so it is not opened. "
            "Where you trust it, save the weights alone, safetensors.torch.save_file(state_dict, "
            "'weights.safetensors'), and give that file"
        )
    return ValueError(
        f"the weights {source.weights or source.identifier} do not load into {source.name}: "
        f"{reason}{way_out}"
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
    torchscript = is_torchscript(file)
    if torchscript:
        _known_archive(name, file)
    return Source(name, name, recorded, file, wanted, _preprocess(cfg), torchscript)


def _of_file(name: str, file: str, tags: list[str], quick: bool | None) -> Source:
    if is_torchscript(file):
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
            f"If these are the weights of a tag, say so: "
            f"{option('pretrained', f'{tags[0]}={file}')}. Else give "
            f"{option('activation', 'gelu')} or {option('activation', 'quickgelu')}"
        )
    found = [_preprocess(cfg) for cfg in cfgs.values()]
    preprocess = found[0] if found else None
    if any(one != preprocess for one in found):
        warnings.warn(
            f"the tags of {name} differ in their preprocessing, and which one {file} needs is not "
            f"known: OpenAI's mean and std are taken. For a tag's own say '{tags[0]}={file}'",
            stacklevel=5,
        )
        preprocess = None
    return Source(name, name, file, file, own if quick is None else quick, preprocess)


def _preprocess(cfg: dict[str, Any]) -> dict[str, Any]:
    names = ("mean", "std", "interpolation", "resize_mode")
    return {key: cfg[key] for key in names if key in cfg}


def _quick_gelu(name: str, cfg: dict[str, Any]) -> bool:
    """The tag's word, else the architecture's (roberta-ViT-B-32 has it in its config only)."""
    return bool(cfg.get("quick_gelu", open_clip.get_model_config(name).get("quick_gelu", False)))


def _hub_files(cfg: dict[str, Any]) -> tuple[str, list[str]]:
    """Repository, and the names that its weights may have."""
    repository, file = os.path.split(cfg.get("hf_hub", ""))
    file = file or "open_clip_pytorch_model.bin"
    safe = {"open_clip_pytorch_model.bin": "open_clip_model.safetensors"}
    return repository, [safe.get(file, str(Path(file).with_suffix(".safetensors"))), file]


def _tag_file(name: str, tag: str, cfg: dict[str, Any], network: bool) -> str:
    """The weights of a tag: from the cache without asking the network, else downloaded."""
    repository, files = _hub_files(cfg)
    url = cfg.get("url", "")
    if found := _cached(repository, files):
        return found
    places = [f"https://huggingface.co/{repository} ({' or '.join(files)})"] * bool(repository)
    places += [url] * bool(url)
    what = f"the weights {tag!r} of {name}"
    way_out = (
        f"download {', or '.join(places)} elsewhere, copy the file to this machine, and give "
        f"{option('pretrained', f'{tag}=/path/of/the/file')}"
    )
    place = constants.ENDPOINT if repository else url
    named = option("model", name)
    return _download(
        lambda: open_clip.download_pretrained(cfg), what, place, way_out, named, network
    )


def text_config(name: str, *, network: bool = True) -> dict[str, Any]:
    """The ``text_cfg`` of a model by its identified name; the config of a folder or of the hub is
    checked first (:func:`~ueo_fast.finetune.clip.base_model.read_model_config`)."""
    if name.startswith(LOCAL):
        config = read_model_config(Path(name.removeprefix(LOCAL)) / CONFIG)
    elif name.startswith(HUB):
        config = read_model_config(Path(hub_file(name, [CONFIG], network)))
    else:
        config = open_clip.get_model_config(name)
    return dict(config.get("text_cfg", {}))


def _own_weights(name: str, *, network: bool) -> str:
    """The file that open_clip takes as the weights of a folder or a repository."""
    if name.startswith(HUB):
        return hub_file(name, _hub_files({})[1], network)
    folder = Path(name.removeprefix(LOCAL))
    found = [path for path in folder.iterdir() if path.suffix in _FOLDER_SUFFIXES]
    order = {file: place for place, file in enumerate(PREFERRED)}

    def rank(path: Path) -> tuple[int, bool, str]:
        return order.get(path.name, len(order)), path.suffix != ".safetensors", path.name

    return str(min(found, key=rank))


def hub_file(name: str, files: list[str], network: bool) -> str:
    """A file of ``hf-hub:owner/repository``, under the first of its names that there is."""
    repository = name.removeprefix(HUB)
    if found := _cached(repository, files):
        return found
    way_out = (
        f"download {CONFIG} and the weights of https://huggingface.co/{repository} elsewhere into "
        f"one folder, and give {option('model', '/path/of/the/folder')}"
    )
    what = f"{files[0]} of {name}"
    named = option("model", name)

    def load() -> str:  # open_clip tries the other name of weights first
        return str(download_pretrained_from_hf(repository, filename=files[-1]))

    return _download(load, what, constants.ENDPOINT, way_out, named, network)


def _existing(path: str) -> Path:
    file = Path(path).expanduser()
    if file.is_dir():
        raise FileNotFoundError(
            f"pretrained={path!r} is a folder; give the file in it, or, if it has {CONFIG}, give "
            "the folder as the model and leave pretrained out"
        )
    if not file.is_file():
        raise FileNotFoundError(f"pretrained={path!r}: this file does not exist")
    return file.absolute()


def _is_path(text: str) -> bool:
    path = Path(text).expanduser()
    return os.sep in text or path.suffix.lower() in _SUFFIXES or path.exists()


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise FileNotFoundError(f"the model's folder {folder} does not exist")
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(
            f"the folder {folder} has no {CONFIG}, so it is not an open_clip model; "
            "open_clip.push_to_hf_hub's save_for_hf writes such folders"
        )
    if not any(path.suffix in _FOLDER_SUFFIXES for path in folder.iterdir()):
        raise FileNotFoundError(
            f"the folder {folder} has {CONFIG} but no weights (*.safetensors, *.bin or *.pth)"
        )


def is_torchscript(file: str) -> bool:
    if not zipfile.is_zipfile(file):
        return False
    with zipfile.ZipFile(file) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _known_archive(name: str, file: str) -> str:
    """The tag of an archive of OpenAI's; TorchScript is a program, so its hash must be known."""
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


def _cached(repository: str, files: list[str]) -> str | None:
    """The path of the first of these files of a repository that the cache holds."""
    if not repository:
        return None
    found = (try_to_load_from_cache(repository, file) for file in files)
    return next((path for path in found if isinstance(path, str)), None)


def _download(
    load: Callable[[], str], what: str, url: str, way_out: str, named: str, network: bool
) -> str:
    """The path that ``load`` returns; stops at once where it cannot or must not download ``what``.

    Raises:
        OSError: without ``network``, as nobody who is trusted asked for it; or ``url`` does not
            answer, or the download fails.
    """
    missing = f"{what}: not found in {constants.HF_HUB_CACHE}, and"
    here = (Path("~/.cache/clip").expanduser() / url.rpartition("/")[2]).is_file()
    if not network and not here:
        raise OSError(
            f"{missing} nothing that a run or a delta names is downloaded by itself. If you trust "
            f"it, name it: {named}"
        )
    reason, cause = "", None
    if not here:
        reason = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else unreachable(url)
    if not reason:
        try:
            return str(load())
        except Exception as error:  # whatever the hub's client and urllib raise
            reason, cause = str(error), error
    raise OSError(
        f"{missing} could not be downloaded ({reason}). Without a network: {way_out}"
    ) from cause


def unreachable(url: str) -> str:
    """Why ``url`` does not answer, or ``""``; one request: the hub's client retries for minutes."""
    reason = f"no answer from {url} within {_PATIENCE:g} s"

    def ask() -> None:
        nonlocal reason
        try:
            get_session().head(url, timeout=_PATIENCE)
            reason = ""
        except Exception as error:  # of the client that the hub uses in this version
            reason = f"{url}: {str(error).strip() or type(error).__name__}"

    thread = threading.Thread(target=ask, daemon=True)  # no time-out bounds the look-up of names
    thread.start()
    thread.join(_PATIENCE)
    return reason


@contextlib.contextmanager
def offline() -> Iterator[None]:
    """Inside, the hub's client serves what is in its cache and asks no network."""
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def from_hub(load: Callable[[], _T], *, network: bool) -> _T:
    """What ``load`` returns from the hub's cache, else, with ``network``, from the hub itself.

    Raises:
        Exception: whatever ``load`` raises.
    """
    with offline():
        try:
            return load()
        except Exception as error:
            missing = error
    if not network or constants.HF_HUB_OFFLINE:
        raise missing
    if reason := unreachable(constants.ENDPOINT):
        raise OSError(f"{missing}; {reason}") from missing
    return load()
