"""Whole runs of `ueo-fast finetune` on photographs of 12 megapixels, with each way to load them.

The image tower is so small that loading is most of what there is to wait for, as where a GPU
computes. Its weights are random: only time is measured.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from benchmarks.bench_input import photographs

PHOTOS = 300
MEGAPIXELS = "12"
EPOCHS = 2
LOADING = {
    "all pixels, every time (`--decode full`)": ["--decode", "full"],
    "reduced, every time (`--cache off`)": ["--cache", "off"],
    "reduced, once (the default)": [],
}


def measure(threads: int) -> list[dict[str, object]]:
    """Seconds of the first pass, of the last epoch and of the run, for each way to load."""
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        (place / "photos").mkdir()
        for number in range(PHOTOS):  # copies: a file is read once, whatever links lead to it
            source = photographs(MEGAPIXELS)[number % 2]
            shutil.copy(source, place / "photos" / f"{number:03}.jpg")
        (place / "names.txt").write_text("temple\nflower\ncat\ndog\n")
        _save_small(place / "small")
        return [
            {
                "loading": loading,
                "photos": PHOTOS,
                "megapixels": MEGAPIXELS,
                **_run(place, words, threads),
            }
            for loading, words in LOADING.items()
        ]


def _run(place: Path, more: list[str], threads: int) -> dict[str, object]:
    out = place / "run"
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "ueo_fast.cli", "finetune", "--data", str(place / "photos")]
    command += ["--classes", str(place / "names.txt"), "--model", str(place / "small")]
    command += [
        "--out",
        str(out),
        "--epochs",
        str(EPOCHS),
        "--workers",
        str(threads),
        "--threads",
        str(threads),
    ]
    subprocess.run([*command, *more], check=True, stdout=subprocess.DEVNULL)
    steps = [json.loads(line) for line in (out / "train.jsonl").read_text().splitlines()]
    began, ended = (
        (out / name).stat().st_mtime for name in ("environment.json", "zero_shot.safetensors")
    )
    return {
        "first_s": f"{ended - began:.2f}",
        "epoch_s": f"{sum(step['seconds'] for step in steps if step['epoch'] == EPOCHS):.2f}",
        "run_s": f"{json.loads((out / 'finished.json').read_text())['seconds']:.2f}",
    }


def _save_small(folder: Path) -> None:
    """A CLIP of two layers that takes 224 pixels, as a folder that open_clip loads."""
    import safetensors.torch
    from open_clip.model import CLIP

    config = {
        "embed_dim": 64,
        "vision_cfg": {"image_size": 224, "layers": 2, "width": 64, "patch_size": 32},
        "text_cfg": {
            "context_length": 77,
            "vocab_size": 49408,
            "width": 64,
            "heads": 2,
            "layers": 1,
        },
    }
    torch.manual_seed(0)
    state = CLIP(**config).state_dict()
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": config, "preprocess_cfg": {"size": 224}})
    )
    safetensors.torch.save_file(
        {name: tensor.contiguous() for name, tensor in state.items()},
        folder / "open_clip_model.safetensors",
    )
