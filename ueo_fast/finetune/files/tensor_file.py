"""Tensors and text in one safetensors file, written atomically; never a pickle."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ueo_fast.finetune.files.atomic import atomic_file

if TYPE_CHECKING:
    from torch import Tensor


class TensorFileError(ValueError):
    """A file that cannot be read as safetensors; the message names it and says why."""


def write_tensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    *,
    checked: bool = False,
) -> Path:
    """Write a file, or replace one, atomically.

    Args:
        path: of the file.
        tensors: of any device and memory layout; views of one another are written in full.
        metadata: text to write with the tensors.
        checked: add the :func:`checksum` of all that to the metadata, as ``checksum``.

    Raises:
        OSError: it could not be written; the message names the file, which is then as it was.
    """
    import safetensors.torch

    own = {name: _compact(tensor) for name, tensor in tensors.items()}
    text = dict(metadata or {})
    if checked:
        text["checksum"] = checksum(text, own)
    data = safetensors.torch.save(own, text)
    with atomic_file(path) as file:
        file.write(data)
    return Path(path)


def read_tensors(
    path: str | os.PathLike[str], *, limit: int | None = None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors on the CPU, and metadata. Nothing in the file is executed.

    Args:
        path: of the file.
        limit: the most bytes that such a file may have.

    Raises:
        FileNotFoundError: there is none. Other subclasses of ``OSError``: it cannot be opened.
        TensorFileError: it is not a safetensors file, is damaged, or is larger than ``limit``.
    """
    import safetensors

    path = Path(path)
    if path.is_dir():
        raise TensorFileError(f"{path} is a folder; give the file in it")
    size = path.stat().st_size
    if not path.is_file():  # opening a pipe may wait for ever
        raise TensorFileError(f"{path} is a pipe, a socket or a device; give a file")
    with open(path, "rb") as file:  # so that the system's own errors are raised
        start = file.read(2)
    if size == 0:
        raise TensorFileError(f"{path} is empty; its writing was cut off, or it is not the file")
    if limit is not None and size > limit:
        raise TensorFileError(
            f"{path} has {size:,} bytes, and such a file has at most {limit:,}: it is another file"
        )
    try:
        with safetensors.safe_open(path, framework="pt", device="cpu") as opened:
            # Copies: the tensors would else follow the file if somebody writes to it.
            tensors = {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118
            metadata = dict(opened.metadata() or {})
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise TensorFileError(f"{path} is {_looks_like(start)} ({error})") from error
    return tensors, metadata


def checksum(values: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of metadata and tensors: finds damage, proves no origin.

    Args:
        values: the metadata; a ``checksum`` in it is left out.
        tensors: on the CPU.
    """
    import torch

    kept = {key: value for key, value in values.items() if key != "checksum"}
    digest = hashlib.sha256(json.dumps(kept, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _looks_like(start: bytes) -> str:
    kind, unsafe = "no readable safetensors file", "which can run any program, and is not opened"
    if start == b"PK":
        return f"{kind} but a zip, as torch.save writes them; it may hold a pickle, {unsafe}"
    if start[:1] == b"\x80":
        return f"{kind} but probably a pickle, {unsafe}"
    return f"{kind}: damaged, cut off, or of another kind"


def _compact(tensor: Tensor) -> Tensor:
    """On the CPU, contiguous, in a storage of its own."""
    import torch

    value = tensor.detach()
    return value.to("cpu", copy=True, memory_format=torch.contiguous_format).contiguous()
