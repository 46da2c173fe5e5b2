"""`ueo-fast finetune`, killed at random and resumed, ends with the bits of a run that was not.

The engine's own test (test_engine_kill.py) kills many times inside the training; here the whole
command is killed anywhere: while it loads, looks at the images, trains or writes its results.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import safetensors.torch
import torch
from photo_folder import KNOWN, photo_folder
from tiny_model_folder import save_tiny_clip

pytestmark = pytest.mark.slow


def command(*words: object) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "ueo_fast.cli", "finetune", *map(str, words)],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def finished(process: subprocess.Popen[bytes]) -> None:
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors.decode()


def test_killed_anywhere_and_resumed(tmp_path):
    save_tiny_clip(tmp_path / "model", pretrain_steps=30)
    photo_folder(tmp_path / "photos")
    (tmp_path / "names.txt").write_text("\n".join(KNOWN))
    words = ["--data", tmp_path / "photos", "--classes", tmp_path / "names.txt"]
    words += ["--model", tmp_path / "model", "--threads", 1, "--workers", 1, "--method", "dance"]
    words += ["--epochs", 30, "--batch-size", 16, "--checkpoint-every", 3, "--eval-every", 5]
    words += ["--affine-lr", 1e-2, "--momentum", 0.9]
    started = time.monotonic()
    finished(command(*words, "--out", tmp_path / "whole"))
    seconds = time.monotonic() - started

    seed = random.SystemRandom().getrandbits(32)
    print(f"kill times from seed {seed}")  # pytest shows it where the test fails
    moments = random.Random(seed)
    out = tmp_path / "killed"
    kills = 0
    process = command(*words, "--out", out)
    while kills < 5:
        try:
            process.wait(timeout=moments.uniform(0.3, 0.9) * seconds)
            break
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
        if (out / "config.json").exists():
            process = command("--resume", "true", "--out", out)
        else:  # killed before there was anything to resume
            process = command(*words, "--out", out)
    finished(process)
    assert kills, "it was never killed"

    whole, killed = (
        safetensors.torch.load_file(tmp_path / name / "delta.safetensors")
        for name in ("whole", "killed")
    )
    assert whole.keys() == killed.keys()
    assert all(torch.equal(whole[name], killed[name]) for name in whole)
    for name in ("train.jsonl", "epochs.jsonl", "metrics.jsonl"):
        first, second = (
            [
                {key: value for key, value in json.loads(line).items() if key != "seconds"}
                for line in (tmp_path / run / name).read_text().splitlines()
            ]
            for run in ("whole", "killed")
        )
        assert first == second, name
    predictions = [(tmp_path / run / "predictions.csv").read_bytes() for run in ("whole", "killed")]
    assert predictions[0] == predictions[1]
    assert not list(out.glob(".*partial"))
