"""A training that is killed with SIGKILL at random moments ends as one that is not."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from kill_training import STEPS, STEPS_PER_EPOCH

from ueo_fast.finetune.files.tensor_file import read_tensors

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")

KILLS = 4
TESTS = Path(__file__).resolve().parents[2]


class Server:
    """The process that forks trainings."""

    def __init__(self):
        path = os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
        self.process = subprocess.Popen(
            [sys.executable, str(TESTS / "kill_training.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        )
        assert self.answer() == "ready"

    def answer(self):
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def start(self, folder):
        assert self.process.stdin is not None
        self.process.stdin.write(f"{folder}\n")
        self.process.stdin.flush()
        word, pid = self.answer().split()
        assert word == "started"
        return int(pid)

    def end(self):
        word, status = self.answer().split()
        assert word == "ended"
        return int(status)

    def close(self):
        self.process.stdin.close()
        self.process.wait(timeout=30)
        self.process.stdout.close()


@pytest.fixture
def server():
    server = Server()
    yield server
    server.close()


def lines(path):
    if not path.exists():
        return 0
    return path.read_bytes().count(b"\n")


def records(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def without_seconds(path):
    return [{**record, "seconds": 0.0} for record in records(path)]


def test_killed_at_random_moments_it_ends_the_same(server, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
    server.start(whole)
    assert server.end() == 0
    seconds = sum(record["seconds"] for record in records(whole / "train.jsonl")) / STEPS

    seed = int.from_bytes(os.urandom(4), "little")
    print(f"the moments are drawn with seed {seed}")  # pytest shows it where the test fails
    draw = random.Random(seed)
    deaths = []
    for _ in range(KILLS):
        pid = server.start(killed)
        # After some more steps, and then at any moment of the next ones: while it computes, tells a
        # step, or saves a checkpoint. By the clock alone it would depend on the machine.
        wanted = lines(killed / "train.jsonl") + draw.randrange(1, 12)
        deadline = time.monotonic() + 60
        while lines(killed / "train.jsonl") < wanted:
            assert time.monotonic() < deadline
            time.sleep(seconds / 10)
        time.sleep(draw.random() * 3 * seconds)
        os.kill(pid, signal.SIGKILL)
        deaths.append((server.end(), lines(killed / "train.jsonl")))
        print(f"killed when {deaths[-1][1]} steps were told")
    assert [os.WTERMSIG(status) for status, _ in deaths] == [signal.SIGKILL] * KILLS
    assert not (killed / "final.safetensors").exists()
    server.start(killed)
    assert server.end() == 0

    steps = [record["step"] for record in records(killed / "train.jsonl")]
    assert steps == list(range(1, STEPS + 1))
    assert without_seconds(killed / "train.jsonl") == without_seconds(whole / "train.jsonl")
    epochs = [record["epoch"] for record in records(killed / "epochs.jsonl")]
    assert epochs == list(range(1, STEPS // STEPS_PER_EPOCH + 1))
    assert (killed / "epochs.jsonl").read_bytes() == (whole / "epochs.jsonl").read_bytes()
    found, expected = (read_tensors(each / "final.safetensors")[0] for each in (killed, whole))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    last, wanted = (read_tensors(each / "checkpoint.safetensors") for each in (killed, whole))
    assert last[1] == wanted[1]
    for name, value in wanted[0].items():
        assert torch.equal(last[0][name], value), name
    assert not [path for path in killed.iterdir() if path.name.endswith(".partial")]
