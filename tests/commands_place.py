"""What the tests of the commands share: a user's folder, and the commands run in it."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

from photo_folder import KNOWN, photo_folder
from tiny_model_folder import save_tiny_clip

from ueo_fast.cli import main


def make_place(place: Path) -> Path:
    """A model, photographs, class names and a finished run of two epochs; returns ``place``."""
    save_tiny_clip(place / "model", pretrain_steps=60)
    photo_folder(place / "photos")
    (place / "names.txt").write_text("# the digits that I know\n" + "\n".join(KNOWN) + "\n")
    assert finetune(place, "run", "--epochs", "2") == 0
    return place


def finetune(place: Path, out: str, *more: str) -> int:
    """The exit status of ``ueo-fast finetune``; ``more`` wins over what is given here."""
    words = ["--data", place / "photos", "--classes", place / "names.txt"]
    words += ["--model", place / "model", "--out", place / out, "--workers", 0, "--threads", 1]
    rates = ["--prompt-lr", 1e-3, "--affine-lr", 3e-2, "--batch-size", 16]
    return main(["finetune", *map(str, words + rates), *more])


def lines(path: Path) -> list[dict[str, Any]]:
    """Of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def rows(path: Path) -> list[dict[str, str]]:
    """Of a CSV with a header."""
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))
