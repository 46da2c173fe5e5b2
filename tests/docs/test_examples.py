"""Every file of examples/ runs as a user would start it, with a tiny model and photos of digits."""

from __future__ import annotations

import contextlib
import csv
import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

for module in ("open_clip", "sklearn", "matplotlib", "torchmetrics", "torchvision", "tqdm"):
    pytest.importorskip(module)

from photo_folder import CORRUPT, KNOWN, photo_folder  # noqa: E402
from tiny_model_folder import save_tiny_clip  # noqa: E402

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
TESTED = {
    "accelerate_loop",
    "adapt_folder",
    "deploy",
    "patch_torchvision",
    "plain_loop",
    "score_folder",
}


def run(name: str, *arguments: object) -> dict[str, object]:
    """The globals of an example that was run with these words after its name."""
    before = sys.argv
    sys.argv = [f"{name}.py", *map(str, arguments)]
    try:
        return runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    finally:
        sys.argv = before


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model, photos that can all be read, class names, and the delta of adapt_folder.py."""
    place = tmp_path_factory.mktemp("examples")
    save_tiny_clip(place / "model", pretrain_steps=60)
    photos = photo_folder(place / "photos", per_class=3)
    (photos / CORRUPT).unlink()
    (photos / "empty class").rmdir()
    (place / "names.txt").write_text("\n".join(KNOWN) + "\n")
    delta = place / "delta.safetensors"
    with open(place / "printed.txt", "w") as file, contextlib.redirect_stdout(file):
        run("adapt_folder", photos, place / "names.txt", delta, place / "model")
    return place


def test_every_example_is_tested_and_short():
    files = {path.stem: path.read_text(encoding="utf-8") for path in EXAMPLES.glob("*.py")}
    assert set(files) == TESTED
    for name, text in files.items():
        assert len(text.splitlines()) < 60, name
        assert f"python examples/{name}.py" in text, "the docstring says how to start it"


def losses(printed: str) -> list[float]:
    return [float(line.split("loss ")[1]) for line in printed.splitlines()]


@pytest.mark.parametrize("name", ["plain_loop", "accelerate_loop"])
def test_loops(name, place, capsys):
    if name == "accelerate_loop":
        pytest.importorskip("accelerate")
    run(name, place / "photos", place / "names.txt", f"local-dir:{place / 'model'}")
    first, *_, last = losses(capsys.readouterr().out)
    assert last < first


def test_patch_torchvision(capsys):
    run("patch_torchvision", "resnet18")
    printed = capsys.readouterr().out
    megabytes = {
        line.split(":")[0]: float(line.split(", ")[1].split()[0])
        for line in printed.splitlines()
        if line.endswith("MiB kept")
    }
    assert megabytes["patched"] < 0.8 * megabytes["unpatched"]
    assert "BatchNorm2d: 9,600 numbers in 40 tensors" in printed


def test_adapt_folder(place):
    assert (place / "delta.safetensors").stat().st_size < 1_000_000
    assert f"saved: {place / 'delta.safetensors'}" in (place / "printed.txt").read_text()


@pytest.mark.parametrize("validation", [False, True], ids=["otsu", "labelled"])
def test_score_folder(validation, place, tmp_path, capsys):
    labelled = [place / "photos"] if validation else []
    table = tmp_path / "scores.csv"
    run("score_folder", place / "delta.safetensors", place / "photos", table, *labelled)
    printed = capsys.readouterr().out
    with open(table, newline="", encoding="utf-8") as file:
        unknown = [row for row in csv.DictReader(file) if row["known"] == "false"]
    assert f"to look at: {len(unknown)} photos" in printed


SERVER = """
import json, sys
import torch
files = {"facts.json": ""}
classify = torch.export.load(sys.argv[1], extra_files=files).module()
probabilities, mcm = classify(torch.linspace(-1, 1, 5 * 3 * 32 * 32).view(5, 3, 32, 32))
torch.save({"probabilities": probabilities, "mcm": mcm}, sys.argv[2])
assert not {"ueo_fast", "open_clip"} & set(sys.modules)
print(files["facts.json"])
"""


def test_deploy(place, tmp_path):
    out = tmp_path / "classifier.pt2"
    used = run("deploy", place / "delta.safetensors", out, place / "model")
    images = torch.linspace(-1, 1, 5 * 3 * 32 * 32).view(5, 3, 32, 32)
    expected = used["adapted"](images)
    command = [sys.executable, "-c", SERVER, str(out), str(tmp_path / "answer.pt")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["classes"] == list(KNOWN)
    answer = torch.load(tmp_path / "answer.pt", weights_only=True)
    torch.testing.assert_close(answer["probabilities"], expected.logits.softmax(dim=1))
    torch.testing.assert_close(answer["mcm"], expected.cosines.softmax(dim=1).amax(dim=1))
