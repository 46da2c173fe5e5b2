"""Checkpoints in one safetensors file, which a crash leaves whole."""

from __future__ import annotations

import json
import os
from pathlib import Path

from ueo_fast.finetune.engine.hooks import Checkpoint
from ueo_fast.finetune.files.run_files import CHECKPOINT
from ueo_fast.finetune.files.run_folder import RunFolder
from ueo_fast.finetune.files.tensor_file import checksum, read_tensors, write_tensors

_FORMAT = "2"


class SafetensorsCheckpoints:
    """The last checkpoint of a run, in ``checkpoint.safetensors``; a ``CheckpointStore``.

    Tensors as they are, step and values as JSON in the file's metadata. A crash, a kill or a full
    disk while one is saved leaves the one before.

    Args:
        folder: of the run; it must exist.

    Attributes:
        step: of the checkpoint that was loaded or saved last; ``None``: there was none yet.
    """

    def __init__(self, folder: RunFolder | str | os.PathLike[str]) -> None:
        self.path = (folder.path if isinstance(folder, RunFolder) else Path(folder)) / CHECKPOINT
        self.step: int | None = None

    def load(self) -> Checkpoint | None:
        """The last one that was saved whole, or ``None``.

        Raises:
            ValueError: the file is damaged, or is not a checkpoint.
        """
        if not os.path.lexists(self.path):
            return None
        try:
            tensors, metadata = read_tensors(self.path)
            if metadata.get("ueo_fast_checkpoint") != _FORMAT:
                raise ValueError(f"{self.path} is not a checkpoint of this version of ueo_fast")
            if metadata.get("checksum") != checksum(metadata, tensors):
                raise ValueError(
                    f"{self.path} is damaged or was edited: its checksum does not fit its content"
                )
            try:
                step, values = int(metadata["step"]), json.loads(metadata["values"])
                if not isinstance(values, dict):
                    raise TypeError("its values are not a table")
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise ValueError(f"{self.path} has no step or no values ({error!r})") from error
        except ValueError as error:
            raise ValueError(
                f"{error}; so the run cannot go on from it: delete it to start this run anew"
            ) from error
        self.step = step
        return Checkpoint(step, tensors, values, str(self.path))

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
        write_tensors(self.path, checkpoint.tensors, metadata, checked=True)
        self.step = checkpoint.step
