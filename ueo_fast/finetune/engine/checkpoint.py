"""Checkpoints in one safetensors file, which a crash leaves whole."""

from __future__ import annotations

import json
import os
from pathlib import Path

from ueo_fast.finetune.engine.hooks import Checkpoint
from ueo_fast.finetune.files.run_folder import RunFolder
from ueo_fast.finetune.files.tensor_file import TensorFileError, read_tensors, write_tensors

_FORMAT = "1"


class SafetensorsCheckpoints:
    """The last checkpoint of a run, in ``checkpoint.safetensors``; a ``CheckpointStore``.

    Tensors as they are, step and values as JSON in the file's metadata. A crash, a kill or a full
    disk while one is saved leaves the one before.

    Args:
        folder: of the run; it must exist.
    """

    name = "checkpoint.safetensors"

    def __init__(self, folder: RunFolder | str | os.PathLike[str]) -> None:
        self.path = (folder.path if isinstance(folder, RunFolder) else Path(folder)) / self.name

    def load(self) -> Checkpoint | None:
        """The last one that was saved whole, or ``None``.

        Raises:
            ValueError: the file is damaged, or is no checkpoint.
        """
        if not self.path.exists():
            return None
        try:
            tensors, metadata = read_tensors(self.path)
            if metadata.get("ueo_fast_checkpoint") != _FORMAT:
                raise ValueError(f"{self.path} is no checkpoint of this version of ueo_fast")
            step, values = int(metadata["step"]), json.loads(metadata["values"])
            if not isinstance(values, dict):
                raise ValueError(f"{self.path} has values that are no table")
        except (TensorFileError, ValueError, KeyError, RecursionError) as error:
            raise ValueError(
                f"{error}; so the run cannot go on from it: delete it to start this run anew"
            ) from error
        return Checkpoint(step, tensors, values)

    def save(self, checkpoint: Checkpoint) -> None:
        """Replace it, atomically.

        Raises:
            OSError: full disk, read-only or missing folder; the one before is kept.
            ValueError: a value that JSON cannot hold.
        """
        metadata = {
            "ueo_fast_checkpoint": _FORMAT,
            "step": str(checkpoint.step),
            "values": json.dumps(checkpoint.values, allow_nan=False),
        }
        write_tensors(self.path, checkpoint.tensors, metadata)
