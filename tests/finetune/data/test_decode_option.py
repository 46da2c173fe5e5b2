"""`--decode`: recorded, resumed with, taken from the run, and what it changes of the results."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import pytest
from commands_place import rows
from PIL import Image
from real_photos import real_photo, save_jpeg
from tiny_model_folder import save_tiny_clip

from ueo_fast.cli import main
from ueo_fast.finetune import adapt
from ueo_fast.finetune.clip.delta import read_delta
from ueo_fast.finetune.clip.load import load_clip
from ueo_fast.finetune.demo.digits import DIGIT_NAMES
from ueo_fast.finetune.files.tensor_file import read_tensors

COMMON = ["--workers", "0"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A small trained model, real photographs of half a megapixel, and a zero-shot run with each
    decoding."""
    place = tmp_path_factory.mktemp("place")
    save_tiny_clip(place / "model", pretrain_steps=60)
    (place / "names.txt").write_text("\n".join(DIGIT_NAMES))
    for number, label in enumerate(DIGIT_NAMES[:2]):
        (place / "photos" / label).mkdir(parents=True)
        for left in (0, 213, 426):
            for top in (0, 213):
                box = (left, top, left + 213, top + 213)
                path = place / "photos" / label / f"{left} {top}.jpg"
                save_jpeg(real_photo(number, (800, 700), box), path)
    for how in ("auto", "full"):
        assert finetune(place, how, "--decode", how) == 0
    return place


def finetune(place: Path, out: str, *more: str) -> int:
    words = ["--data", place / "photos", "--classes", place / "names.txt", "--out", place / out]
    words += ["--model", place / "model", "--method", "zeroshot", "--threads", 1]
    return main(["finetune", *map(str, words), *COMMON, *more])


def scores(place: Path, out: Path, run: Path, *more: str) -> list[str]:
    words = ["--run", run, "--data", place / "photos", "--out", out, "--overwrite", "true"]
    assert main(["score", *map(str, words), *COMMON, *more]) == 0
    return [row["mcm"] for row in rows(out)]


def test_the_classes_of_real_photographs_are_the_same(place):
    """And their cosines and scores almost, but not quite."""
    tables = [rows(place / how / "predictions.csv") for how in ("auto", "full")]
    classes = [[row["zeroshot_class"] for row in table] for table in tables]
    assert classes[0] == classes[1]
    assert len(set(classes[0])) > 1
    cosines = [
        read_tensors(place / how / "zero_shot.safetensors")[0]["train"] for how in ("auto", "full")
    ]
    pairs = [[float(row["zeroshot_mcm"]) for row in table] for table in tables]
    furthest = max(abs(one - other) for one, other in zip(*pairs, strict=True))
    assert 0 < furthest < 0.002
    # The guide's distance, of a model of 32 pixels, whose copies have 64.
    assert 0 < float((cosines[0] - cosines[1]).abs().max()) < 0.03


def test_a_run_keeps_its_decoding(place, capsys):
    assert json.loads((place / "auto" / "config.json").read_text())["decode"] == "auto"
    assert json.loads((place / "full" / "config.json").read_text())["decode"] == "full"
    assert read_delta(place / "full" / "delta.safetensors").extra["decode"] == "full"
    words = ["finetune", "--resume", "--out", str(place / "auto"), "--decode"]
    assert main([*words, "full"]) == 2
    assert "decode='full' differs from 'auto'" in capsys.readouterr().err
    assert main([*words, "auto"]) == 0
    assert main([*words, "half"]) == 2
    assert "--decode: expected one of auto, full, got 'half'" in capsys.readouterr().err


def test_score_decodes_as_the_run_did(place, tmp_path):
    out = tmp_path / "scores.csv"
    auto, full = (scores(place, out, place / how) for how in ("auto", "full"))
    assert auto != full
    assert scores(place, out, place / "auto", "--decode", "full") == full
    assert scores(place, out, place / "full", "--decode", "auto") == auto
    alone = Path(shutil.copy(place / "full" / "delta.safetensors", tmp_path))
    assert scores(place, out, alone) == full
    assert scores(place, out, alone, "--decode", "auto") == auto
    validation = ["--validation", str(place / "photos")]
    assert scores(place, out, place / "full", *validation) == full


def test_evaluate_decodes_as_the_run_did(place, tmp_path):
    found = {}
    for how in ("auto", "full"):
        for more in ([], ["--decode", "full"]):
            out = tmp_path / f"{how}{len(more)}.csv"
            words = ["evaluate", "--run", str(place / how), "--out", str(out), *COMMON, *more]
            assert main(words) == 0
            found[how, bool(more)] = [row["adapted_mcm"] for row in rows(out)]
    assert found["auto", True] == found["full", True] == found["full", False]
    assert found["auto", False] != found["full", False]
    kept = rows(place / "auto" / "predictions.csv")
    wanted = [float(row["adapted_mcm"]) for row in kept]  # of another number of threads
    assert [float(score) for score in found["auto", False]] == pytest.approx(wanted, abs=1e-6)


def test_a_delta_with_another_decoding_is_refused(place, tmp_path, capsys, monkeypatch):
    delta = read_delta(place / "full" / "delta.safetensors")
    delta.extra["decode"] = ["half"]
    monkeypatch.setattr("ueo_fast.finetune.commands.adapted.read_delta", lambda _: delta)
    alone = shutil.copy(place / "full" / "delta.safetensors", tmp_path)
    words = ["--run", alone, "--data", place / "photos", "--out", tmp_path / "scores.csv"]
    assert main(["score", *map(str, words)]) == 2
    assert "decode is ['half'], expected auto or full" in capsys.readouterr().err


def test_adapt_and_predict_take_it(place, tmp_path):
    warnings.simplefilter("ignore")  # of the model's few classes

    def adapted(**options):
        clip = load_clip(str(place / "model"))
        return adapt(
            clip.model, clip.tokenizer, place / "photos", DIGIT_NAMES, method="zeroshot", **options
        )

    auto, full = adapted(), adapted(decode="full")
    cosines = {"auto": auto.predict().cosines, "full": full.predict().cosines}
    assert not cosines["auto"].equal(cosines["full"])
    for result, own, other in ((auto, "auto", "full"), (full, "full", "auto")):
        assert result.decode == own
        assert result.predict(place / "photos").cosines.equal(cosines[own])
        assert result.predict(place / "photos", decode=other).cosines.equal(cosines[other])
    assert read_delta(full.save(tmp_path / "d.safetensors")).extra["decode"] == "full"
    for call in (lambda: adapted(decode="half"), lambda: auto.predict(decode="half")):
        with pytest.raises(ValueError, match=r"decode='half' is unknown.* auto, full"):
            call()
    # Pictures in memory are decoded in full, and then shrunk or not.
    pictures = [Image.open(path) for path in sorted((place / "photos").rglob("*.jpg"))]
    assert full.predict(pictures).cosines.equal(cosines["full"])
    gap = auto.predict(pictures).cosines - cosines["auto"]
    assert 0 < float(gap.abs().max()) < 0.03
