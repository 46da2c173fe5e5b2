"""Everything that can be chosen about the commands that use finished runs."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ueo_fast.finetune.data import Decoding
from ueo_fast.ranges import MOST_WORKERS, check_count, check_number

if TYPE_CHECKING:
    from ueo_fast.finetune.scoring.thresholds import Threshold


MODEL_HELP = (
    "where the run's base model is, as for finetune: for a run that was made on another machine, "
    "or a folder that moved. It must have the weights that the run began with. Default: the model "
    "that the run names, if it was loaded on this machine before"
)
DECODE_HELP = (
    "auto: make views from a copy with twice the model's pixels per side, for which a JPEG is "
    "decoded at a reduced size; full: from all pixels; default: the run's choice"
)
PRETRAINED_HELP = "weights of --model, where that is a name; default: the run's tag"


@dataclass(frozen=True)
class EvaluateConfig:
    """Choices of ``ueo-fast evaluate``.

    Raises:
        ValueError: a value outside its range.
    """

    run: str = field(metadata={"help": "folder of a run of ueo-fast finetune", "positional": True})
    data: str | None = field(
        default=None,
        metadata={
            "help": "labelled images: class folders, a list or a CSV with labels; default: those "
            "that the run was measured on"
        },
    )
    data_root: str | None = field(
        default=None,
        metadata={
            "help": "folder that the paths in a list or CSV are relative to; default: the file's "
            "own folder"
        },
    )
    follow_links: bool = field(
        default=False,
        metadata={
            "help": "follow links that lead out of a folder of images; no file is read twice in "
            "any case"
        },
    )
    decode: Decoding | None = field(default=None, metadata={"help": DECODE_HELP})
    mcm_scale: float | None = field(
        default=None,
        metadata={"help": "multiplies the cosines in the MCM score; default: the run's"},
    )
    out: str | None = field(
        default=None,
        metadata={
            "help": "CSV file for class and MCM score of each image, before and after, and whether "
            "it is known"
        },
    )
    batch_size: int = field(default=192, metadata={"help": "images per step"})
    workers: int = field(
        default=2,
        metadata={"help": "processes that load images; at most four per processor are started"},
    )
    precision: Literal["fp32", "bf16", "fp16"] = field(
        default="fp32", metadata={"help": "of the image tower"}
    )
    device: str | None = field(
        default=None, metadata={"help": "cpu, cuda, ...; default: cuda where there is one"}
    )
    model: str | None = field(default=None, metadata={"help": MODEL_HELP})
    pretrained: str | None = field(default=None, metadata={"help": PRETRAINED_HELP})
    strict: bool = field(default=False, metadata={"help": "fail at an image that cannot be read"})

    def __post_init__(self) -> None:
        _check_ranges(self)
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


@dataclass(frozen=True)
class ScoreConfig:
    """Choices of ``ueo-fast score``.

    Raises:
        ValueError: a value outside its range.
    """

    run: str = field(
        metadata={
            "help": "folder of a run of ueo-fast finetune, or a delta.safetensors",
            "positional": True,
        }
    )
    data: str = field(
        metadata={"help": "the images: a folder, a list file, a CSV, or one image file"}
    )
    out: str = field(metadata={"help": "the table to write: a file that ends in .csv or .parquet"})
    data_root: str | None = field(
        default=None,
        metadata={
            "help": "folder that the paths in a list or CSV are relative to; default: the file's "
            "own folder"
        },
    )
    follow_links: bool = field(
        default=False,
        metadata={
            "help": "follow links that lead out of a folder of images; no file is read twice in "
            "any case"
        },
    )
    decode: Decoding | None = field(default=None, metadata={"help": DECODE_HELP})
    top_k: int = field(
        default=5,
        metadata={
            "help": "classes per image, with their probabilities at the model's own temperature; "
            "each takes 8 bytes of memory per image"
        },
    )
    threshold: str | None = field(
        default=None,
        metadata={
            "help": "from which MCM score on an image counts as known: a number; otsu (splits the "
            "scores into two groups of least spread; needs many images, some of each kind); gmm "
            "(two Gaussians fitted to the scores; the same needs); tpr95 (keeps 95% of the known "
            "images; needs --validation, or labels in --data); default: otsu, with --validation "
            "tpr95"
        },
    )
    validation: str | None = field(
        default=None,
        metadata={
            "help": "labelled images, given like --data, from which the threshold tpr95 is taken; "
            "all must be readable. Images that the run was not trained on are best"
        },
    )
    mcm_scale: float | None = field(
        default=None,
        metadata={"help": "multiplies the cosines in the MCM score; default: the run's"},
    )
    strict: bool = field(default=False, metadata={"help": "fail at an image that cannot be read"})
    overwrite: bool = field(default=False, metadata={"help": "replace --out if it exists"})
    batch_size: int = field(default=192, metadata={"help": "images per step"})
    workers: int = field(
        default=2,
        metadata={"help": "processes that load images; at most four per processor are started"},
    )
    precision: Literal["fp32", "bf16", "fp16"] = field(
        default="fp32", metadata={"help": "of the image tower"}
    )
    device: str | None = field(
        default=None, metadata={"help": "cpu, cuda, ...; default: cuda where there is one"}
    )
    model: str | None = field(default=None, metadata={"help": MODEL_HELP})
    pretrained: str | None = field(default=None, metadata={"help": PRETRAINED_HELP})

    def __post_init__(self) -> None:
        check_count("top_k", self.top_k)
        _check_ranges(self)
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


def _check_ranges(config: EvaluateConfig | ScoreConfig) -> None:
    check_count("batch_size", config.batch_size)
    check_count("workers", config.workers, 0, MOST_WORKERS)
    if config.mcm_scale is not None:
        check_number("mcm_scale", config.mcm_scale, sign="positive")


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
    """Choices of ``ueo-fast report``."""

    run: str = field(metadata={"help": "folder of a run of ueo-fast finetune", "positional": True})
    out: str | None = field(
        default=None, metadata={"help": "the page; default: report.html in the run folder"}
    )

    def check_files(self) -> None:
        """Check what can be seen without loading anything.

        Raises:
            OSError: the run is missing.
        """
        _check_there(self.run)


@dataclass(frozen=True)
class CompareConfig:
    """Choices of ``ueo-fast compare``."""

    runs: tuple[str, ...] = field(
        metadata={
            "help": "folders of runs of ueo-fast finetune",
            "positional": True,
            "aliases": ("--run",),
        }
    )
    markdown: bool = field(default=False, metadata={"help": "print GitHub tables"})

    def __post_init__(self) -> None:
        object.__setattr__(self, "runs", tuple(self.runs))
