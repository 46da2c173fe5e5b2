"""Makes run folders for the tests of the report: files as the recipe writes them, numbers real.

Cosines are drawn at random, for most classes closer to the right one after adaptation; every metric
and score in the files is computed from them by the package's own functions.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ueo_fast import mcm_score
from ueo_fast.finetune.commands.problem import Labelled, Problem, write_problem
from ueo_fast.finetune.commands.results import known_counts, prediction_rows
from ueo_fast.finetune.data.image_list import ImageList
from ueo_fast.finetune.evaluation.metrics import compute_metrics
from ueo_fast.finetune.files.run_files import PREDICTION_COLUMNS, EpochRecord, StepRecord
from ueo_fast.finetune.files.run_folder import RunFolder
from ueo_fast.finetune.report import write_thumbnails

SCRIPT = "<script>alert(1)</script>"
ODD_NAMES = (
    "grüße 🐈 \"quoted\" & 'single'.png",
    "مرحبا بالعالم.png",
    "$x_1$ <b>bold & $y$.png",
)


@dataclass(frozen=True)
class ReportRun:
    """What a run folder is made of; each field has the value of an ordinary finished run."""

    known: Sequence[str] = ("alarm clock", "bicycle", SCRIPT, "desk lamp", "éclair")
    unknown: Sequence[str] = ("kettle", "umbrella")
    images: int = 60
    steps: int = 40
    epochs: int = 4
    labelled: bool = True
    finished: bool = True
    method: str = "ueo"
    title: str = "UEO"
    seed: int = 0
    mcm_scale: float = 20.0
    during: Sequence[int] = (2,)
    warnings: Sequence[str] = ()
    skipped: Sequence[tuple[str, str]] = (("broken.jpg", "the file is empty"),)
    options: dict[str, Any] = field(default_factory=dict)


def make_run(folder: Path, run: ReportRun | None = None) -> Path:
    """Write the run folder ``folder / "run"`` and its images beside it."""
    run = run or ReportRun()
    path = folder / "run"
    path.mkdir(parents=True)
    files = RunFolder(path)
    generator = torch.Generator().manual_seed(run.seed)
    classes = len(run.known)
    names = [*run.known, *run.unknown]
    labels = torch.arange(run.images) % len(names)
    labels[labels >= classes] = -1
    noise = torch.randn(run.images, classes, generator=generator)
    is_known = (labels >= 0).float()[:, None]
    right = torch.nn.functional.one_hot(labels.clamp(min=0), classes) * is_known
    # Every seventh class is recognised less well afterwards.
    gains = torch.where(labels % 7 == 3, 0.0, 0.08)[:, None]
    cosines = {
        "before": 0.20 + 0.03 * noise + 0.03 * right,
        "during": 0.20 + 0.03 * noise + 0.05 * right,
        "after": 0.20 + 0.03 * noise + gains * right,
    }
    _write_config(files, run)
    files.write_json(
        "problem.json",
        {
            "known": list(run.known),
            "unknown": list(run.unknown) if run.labelled else [],
            "train_images": run.images,
            "test_images": run.images,
            "labelled": run.labelled,
            "skipped": [{"image": name, "reason": reason} for name, reason in run.skipped],
            "left_out": {"train": {".txt": 3, "hidden": 1}},
        },
    )
    if run.method not in ("zeroshot", "adabn"):
        _write_training(files, run)
    _write_lines(path / "warnings.jsonl", [{"step": 3, "text": text} for text in run.warnings])
    if run.labelled:
        stages = [("before", 0), *(("during", epoch) for epoch in run.during)]
        if run.finished and run.method != "zeroshot":
            stages.append(("after", run.epochs))
        _write_lines(
            path / "metrics.jsonl",
            [
                {
                    "method": "zeroshot" if stage == "before" else run.method,
                    "title": "zero-shot" if stage == "before" else run.title,
                    "seed": run.seed,
                    "epoch": epoch,
                    "stage": stage,
                    "split": "test",
                    **compute_metrics(cosines[stage], labels, mcm_scale=run.mcm_scale).as_dict(),
                }
                for stage, epoch in stages
            ],
        )
    if run.finished:
        adapted = cosines["before" if run.method == "zeroshot" else "after"]
        _write_predictions(files, run, folder / "images", cosines["before"], adapted, labels)
    return path


def _write_config(files: RunFolder, run: ReportRun) -> None:
    config = {
        "data": "photos & <more>",
        "classes": "names.txt",
        "model": "RN50",
        "pretrained": "openai",
        "method": run.method,
        "train": "both",
        "epochs": run.epochs,
        "batch_size": 64,
        "prompt_lr": 1e-4,
        "affine_lr": 1e-4,
        "mcm_scale": run.mcm_scale,
        "early_stop": None,
        "channels_last": False,
        "seed": run.seed,
        **run.options,
    }
    files.write_json("config.json", config)
    command = (
        "ueo-fast finetune --data 'photos & <more>' --classes names.txt "
        f"--epochs {run.epochs} --mcm-scale {run.mcm_scale}"
    )
    files.write_environment(command=command, seeds=[run.seed], threads=2)


def _write_training(files: RunFolder, run: ReportRun) -> None:
    top = math.log(len(run.known))
    steps = []
    for step in range(1, run.steps + 1):
        done = step / run.steps
        wobble = math.sin(1.7 * step) * 0.05
        rate = 0.5e-4 * (1 + math.cos(math.pi * (step - 1) / run.steps))
        conditional = top * (0.85 - 0.55 * done + wobble)
        steps.append(
            StepRecord(
                step=step,
                total=run.steps if run.finished else 2 * run.steps,
                epoch=1 + (step - 1) * run.epochs // run.steps,
                loss=conditional - top * 0.95,
                conditional_entropy=conditional,
                marginal_entropy=top * (0.93 + 0.04 * done + wobble / 4),
                largest_share=0.3,
                learning_rates={"prompt": rate, "affine": rate},
                seconds=0.25,
            )
        )
    epochs = [
        EpochRecord(epoch, -0.1 * epoch, 1.0, 1.5, (run.images,) + (0,) * (len(run.known) - 1))
        for epoch in range(1, run.epochs + 1)
    ]
    _write_lines(files.path / "train.jsonl", [dataclasses.asdict(one) for one in steps])
    _write_lines(files.path / "epochs.jsonl", [dataclasses.asdict(one) for one in epochs])


def _write_lines(path: Path, records: Sequence[dict[str, Any]]) -> None:
    if records:
        text = "".join(json.dumps(record, allow_nan=False) + "\n" for record in records)
        path.write_text(text, encoding="utf-8")


def _write_predictions(
    files: RunFolder,
    run: ReportRun,
    folder: Path,
    before: torch.Tensor,
    after: torch.Tensor,
    labels: torch.Tensor,
) -> None:
    """What the recipe writes at its end, by its own functions; only shown images are drawn."""
    ranked = mcm_score(after.double(), run.mcm_scale).argsort().tolist()
    odd = dict(zip(reversed(ranked), ODD_NAMES, strict=False))  # seen among the most confident
    names = [odd.get(i) or f"photo {i:05d}{_KINDS[i % len(_KINDS)]}" for i in range(run.images)]
    folder.mkdir()
    for i in {*ranked[:12], *ranked[-12:]}:
        _draw(folder / names[i], i)
    classes = [*run.known, *run.unknown]
    images = Labelled(
        ImageList(
            tuple(str(folder / name) for name in names),
            tuple(names),
            tuple(classes[i % len(classes)] for i in range(run.images)) if run.labelled else None,
        ),
        labels if run.labelled else None,
    )
    write_problem(files, Problem(tuple(run.known), images, None))
    counts = known_counts(after, run.mcm_scale)
    rows = prediction_rows(images, run.known, before, after, run.mcm_scale, counts.threshold)
    # A class may be called anything here, also what is not Unicode.
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows([PREDICTION_COLUMNS, *rows])
    data = file.getvalue().encode("utf-8", "surrogateescape")
    (files.path / "predictions.csv").write_bytes(data)
    write_thumbnails(files, images.images.paths, run.known)
    threshold = {"rule": counts.rule, "value": counts.threshold}
    files.write_json("finished.json", {"stopped": None, "seconds": 12.5, "threshold": threshold})


_KINDS = (".jpg", ".png", ".gif", ".tif", "-grey.png", "-cmyk.jpg", "-wide.jpg", "-tall.webp")


def _draw(path: Path, i: int) -> None:
    """A gradient with a bar in it, as a file of one kind or another."""
    generator = np.random.default_rng(i)
    width, height = (640, 90) if "-wide" in path.name else (240, 320)
    if "-tall" in path.name:
        width, height = 60, 480
    x, y = np.linspace(0, 1, width), np.linspace(0, 1, height)[:, None]
    colours = generator.uniform(0, 255, (2, 3))
    blend = ((x + y) / 2)[..., None]
    pixels = colours[0] * (1 - blend) + colours[1] * blend
    pixels[height // 3 : height // 2, width // 4 : width // 2] = generator.uniform(0, 255, 3)
    image = Image.fromarray(pixels.astype(np.uint8))
    if "-grey" in path.name:  # 16 bits
        image = Image.fromarray((pixels.mean(axis=2) * 257).astype(np.uint16))
    elif "-cmyk" in path.name:
        image = image.convert("CMYK")
    elif path.suffix == ".gif":
        image = image.quantize(64)
    elif path.suffix == ".tif":
        image.putalpha(
            Image.fromarray((255 * np.broadcast_to(x, (height, width))).astype(np.uint8))
        )
    image.save(path)
