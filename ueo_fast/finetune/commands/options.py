"""Everything that can be chosen about the commands that use finished runs."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ueo_fast.finetune.data import Decoding
from ueo_fast.finetune.engine.training_config import ImagePass
from ueo_fast.ranges import check_count, check_number

if TYPE_CHECKING:
    from ueo_fast.finetune.scoring.thresholds import Threshold


def _group(name: str) -> dict[str, Any]:
    return {"group": name}


@dataclass(frozen=True, kw_only=True)
class _RunOptions:
    """What the commands that run images through a finished run's model share.

    Attributes:
        run: folder of a run of ueo-fast finetune.
        data_root: folder that the paths in a list or CSV are relative to; default: the file's own
            folder.
        follow_links: follow links that lead out of a folder of images; no file is read twice in any
            case.
        decode: auto: make views from a copy with twice the model's pixels per side, for which a
            JPEG is decoded at a reduced size; full: from all pixels; default: the run's choice.
        strict: fail at an image that cannot be read.
        model: where the run's base model is, as for finetune: for a run that was made on another
            machine, or a folder that moved. It must have the weights that the run began with.
            Default: the model that the run names, if it was loaded on this machine before.
        pretrained: weights of --model, if that is a name; default: the run's tag.
        mcm_scale: multiplies the cosines in the MCM score; default: the run's.
        device: cpu, cuda, ...; default: cuda if there is one.
    """

    run: str = field(metadata={"positional": True, **_group("data")})
    data_root: str | None = field(default=None, metadata=_group("data"))
    follow_links: bool = field(default=False, metadata=_group("data"))
    decode: Decoding | None = field(default=None, metadata=_group("data"))
    strict: bool = field(default=False, metadata=_group("data"))
    model: str | None = field(default=None, metadata=_group("model"))
    pretrained: str | None = field(default=None, metadata=_group("model"))
    mcm_scale: float | None = field(default=None, metadata=_group("method"))
    device: str | None = field(default=None, metadata=_group("speed"))
    speed: ImagePass = field(
        default=ImagePass(batch_size=192, num_workers=2),
        metadata={"without": ("channels_last",)},
    )

    def __post_init__(self) -> None:
        if self.mcm_scale is not None:
            check_number("mcm_scale", self.mcm_scale, sign="positive")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(_RunOptions):
    """Choices of ``ueo-fast evaluate``.

    Attributes:
        data: labelled images: class folders, a list or a CSV with labels; default: those that the
            run was measured on.
        out: CSV file for class and MCM score of each image, before and after, and whether it is
            known.

    Raises:
        ValueError: a value outside its range.
    """

    data: str | None = field(default=None, metadata=_group("data"))
    out: str | None = field(default=None, metadata=_group("output"))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.out is not None:
            _check_out(Path(self.out))

    def check_files(self) -> None:
        """Check what can be seen without loading anything.

        Raises:
            OSError, ValueError: a file or folder is missing.
        """
        _check_there(self.run, self.data)


def _check_out(out: Path) -> None:
    """Refuse now what could not be written after the work."""
    if out.suffix.lower() != ".csv":
        raise ValueError(f"out={str(out)!r} must end in .csv, which is what is written")
    if out.exists():
        raise ValueError(f"out={str(out)!r} exists, and nothing is overwritten: choose another")
    for parent in out.parents:
        if parent.exists():
            if not parent.is_dir():
                raise ValueError(f"out={str(out)!r}: {parent} is a file, not a folder")
            return


@dataclass(frozen=True, kw_only=True)
class ScoreConfig(_RunOptions):
    """Choices of ``ueo-fast score``.

    Attributes:
        run: folder of a run of ueo-fast finetune, or a delta.safetensors.
        data: the images: a folder, a list file, a CSV, or one image file.
        validation: labelled images, given like --data, from which the threshold tpr95 is taken; all
            must be readable. Images that the run was not trained on are best.
        threshold: from which MCM score on an image counts as known: a number; otsu (splits the
            scores into two groups of least spread; needs many images, some of each kind); gmm (two
            Gaussians fitted to the scores; the same needs); tpr95 (keeps 95% of the known images;
            needs --validation, or labels in --data); default: otsu, with --validation tpr95.
        out: the table to write: a file that ends in .csv or .parquet.
        overwrite: replace --out if it exists.
        top_k: classes per image, with their probabilities at the model's own temperature; each
            takes 8 bytes of memory per image.

    Raises:
        ValueError: a value outside its range.
    """

    data: str = field(metadata=_group("data"))
    validation: str | None = field(default=None, metadata=_group("data"))
    threshold: str | None = field(default=None, metadata=_group("method"))
    out: str = field(metadata=_group("output"))
    overwrite: bool = field(default=False, metadata=_group("output"))
    top_k: int = field(default=5, metadata=_group("output"))

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("top_k", self.top_k)
        if self.choice.kind != "tpr95" and self.validation is not None:
            raise ValueError(
                f"threshold={self.threshold!r} has no use for validation={self.validation!r}: give "
                "--threshold tpr95, or leave out one of the two"
            )

    @property
    def choice(self) -> Threshold:
        """``threshold``, or its default."""
        from ueo_fast.finetune.scoring.thresholds import parse_threshold

        return parse_threshold(self.threshold or ("otsu" if self.validation is None else "tpr95"))

    def check_files(self) -> None:
        """Check what can be seen without loading anything.

        Raises:
            OSError, ValueError: a file or folder is missing, or ``out`` cannot be written.
        """
        from ueo_fast.finetune.scoring.score_table import check_output

        check_output(Path(self.out), overwrite=self.overwrite)
        _check_there(self.run, self.data, self.validation)


def _check_there(run: str, *sources: str | None) -> None:
    from ueo_fast.finetune.data.image_list import read_images
    from ueo_fast.finetune.files.run_folder import RunFolder

    if not os.path.exists(run):
        RunFolder.open(run)  # says so
    for source in sources:
        if source is not None and not os.path.exists(source):
            read_images(source)  # says so


@dataclass(frozen=True)
class ReportConfig:
    """Choices of ``ueo-fast report``.

    Attributes:
        run: folder of a run of ueo-fast finetune.
        out: the page; default: report.html in the run folder.
    """

    run: str = field(metadata={"positional": True})
    out: str | None = None

    def check_files(self) -> None:
        """Check what can be seen without loading anything.

        Raises:
            OSError: the run is missing.
        """
        _check_there(self.run)


@dataclass(frozen=True)
class CompareConfig:
    """Choices of ``ueo-fast compare``.

    Attributes:
        runs: folders of runs of ueo-fast finetune.
        markdown: print GitHub tables.
    """

    runs: tuple[str, ...] = field(metadata={"positional": True, "aliases": ("--run",)})
    markdown: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "runs", tuple(self.runs))
