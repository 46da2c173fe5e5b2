"""`--cache`: the same results with it, without it and when it was lost; where it is, and when."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import pytest
import safetensors.torch
import torch
from commands_place import finetune
from real_photos import real_photo, save_jpeg
from tiny_model_folder import save_tiny_clip

from ueo_fast.cli import main
from ueo_fast.finetune import adapt
from ueo_fast.finetune.clip.load import load_clip
from ueo_fast.finetune.data import copies as module
from ueo_fast.finetune.data.copies import Copies
from ueo_fast.finetune.engine.hooks import Hooks
from ueo_fast.finetune.engine.training_config import TrainerConfig

EPOCHS = ["--epochs", "3", "--batch-size", "5", "--eval-every", "1"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model and photographs larger than it needs; among them one that cannot be read."""
    place = tmp_path_factory.mktemp("place")
    save_tiny_clip(place / "model", pretrain_steps=5)
    (place / "names.txt").write_text("three\nseven\n")
    for label in ("three", "seven"):
        (place / "photos" / label).mkdir(parents=True)
    for number in range(9):
        folder = place / "photos" / ("three", "seven")[number % 2]
        save_jpeg(real_photo(number % 2, (200 + 9 * number, 160)), folder / f"{number}.jpg")
    (place / "photos" / "three" / "broken.jpg").write_bytes(b"no more")
    assert finetune(place, "plain", *EPOCHS, "--cache", "off") == 0
    return place


@pytest.fixture
def opens(monkeypatch):
    """The names of the files that are decoded, in this process."""
    found = []
    whole = module.opened
    monkeypatch.setattr(module, "opened", lambda p: found.append(Path(p).name) or whole(p))
    return found


def same_result(place: Path, one: str, other: str) -> bool:
    files = [safetensors.torch.load_file(place / n / "delta.safetensors") for n in (one, other)]
    predictions = [(place / name / "predictions.csv").read_bytes() for name in (one, other)]
    return (
        predictions[0] == predictions[1]
        and files[0].keys() == files[1].keys()
        and all(torch.equal(files[0][name], files[1][name]) for name in files[0])
    )


def stopped_after(monkeypatch, place: Path, out: str, step: int, *more: str) -> None:
    """Run until a step, then as if Ctrl-C was pressed."""

    def interrupt(record):
        if record.step == step:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        module = "ueo_fast.finetune.commands.recorder.bar_hooks"
        patch.setattr(module, lambda bar: Hooks(on_step=interrupt))
        assert (
            finetune(place, out, *EPOCHS, "--checkpoint-every", "1", *more) == 128 + signal.SIGINT
        )


def test_auto_decodes_once_and_leaves_nothing(place, opens, capsys):
    assert finetune(place, "auto", *EPOCHS) == 0
    said = capsys.readouterr().out
    cache = place / "auto" / "cache"
    assert f"cache: {cache} keeps small copies of 9 images (" in said
    assert not cache.exists()
    training = [name for name in opens if name != "broken.jpg"]
    assert sorted(training) == sorted(set(training))
    assert same_result(place, "plain", "auto")


def test_without_it_each_epoch_decodes(place, opens):
    assert finetune(place, "off", *EPOCHS, "--cache", "off") == 0
    assert opens.count("0.jpg") == 7  # zero-shot, three epochs and an evaluation after each
    assert same_result(place, "plain", "off")


def test_a_folder_stays_and_serves_other_runs(place, opens, tmp_path, capsys):
    cache = tmp_path / "copies"
    for out in ("one", "two"):
        assert finetune(place, out, *EPOCHS, "--cache", str(cache), "--workers", "2") == 0
        assert f"cache: {cache} keeps small copies of 9 images (" in capsys.readouterr().out
        assert same_result(place, "plain", out)
    opens.clear()
    assert finetune(place, "three", *EPOCHS, "--cache", str(cache)) == 0
    assert set(opens) == {"broken.jpg"}
    assert same_result(place, "plain", "three")


def test_a_limit_is_said_when_it_is_reached(place, capsys):
    assert finetune(place, "limited", *EPOCHS, "--cache-limit", "0.0001") == 0
    said = capsys.readouterr().out
    assert "and takes no more: its limit of 0.1 MB is reached; the others are decoded in" in said
    assert same_result(place, "plain", "limited")


@pytest.mark.parametrize("lost", ["kept", "lost", "damaged", "elsewhere", "unwanted"])
def test_resumed_with_it_without_it_or_when_it_was_lost(
    place, lost, monkeypatch, opens, tmp_path, capsys
):
    """The run goes on in the middle of an epoch, and ends with the bits of one that was not
    stopped."""
    stopped_after(monkeypatch, place, lost, 3)
    cache = place / lost / "cache"
    assert (cache / "copies.sqlite").exists()
    more = []
    if lost == "lost":
        shutil.rmtree(cache)
    elif lost == "damaged":
        (cache / "copies.sqlite").write_bytes(b"damaged" * 10000)
    elif lost == "unwanted":
        more = ["--cache", "off"]
    elif lost == "elsewhere":
        more = ["--cache", str(tmp_path / "elsewhere"), "--cache-limit", "1"]
    opens.clear()
    assert main(["finetune", "--resume", "--out", str(place / lost), *more]) == 0
    if lost == "kept":
        assert opens == []
    assert not cache.exists()  # wherever the rest of the run kept its copies
    if lost == "elsewhere":
        assert (tmp_path / "elsewhere" / "copies.sqlite").exists()
    assert same_result(place, "plain", lost)
    saved = json.loads((place / lost / "config.json").read_text())
    assert (saved["cache"], saved["cache_limit"]) == ("auto", None)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--cache", ""], "--cache: expected a text that is not empty"),
        (["--cache", "x", "--decode", "full"], "cache='x' keeps small copies of images, but"),
        (["--cache-limit", "0"], "cache_limit must be from 1e-30"),
        (
            ["--cache-limit", "1", "--cache", "off"],
            "cache_limit=1.0 has no effect with cache='off'",
        ),
        (["--cache-limit", "1", "--decode", "full"], "cache_limit=1.0 has no effect with"),
        (["--cache-limit", "1", "--method", "zeroshot"], "cache_limit=1.0 has no effect with"),
        (["--cache", "x", "--method", "zeroshot"], "cache='x' has no effect with method='zero"),
        (["--cache", "{place}/names.txt"], "names.txt"),
    ],
)
def test_what_cannot_be_is_refused(place, words, said, capsys):
    words = [word.format(place=place) for word in words]
    assert finetune(place, "refused", *words) in (1, 2)
    assert said in capsys.readouterr().err
    assert not (place / "refused" / "delta.safetensors").exists()
    shutil.rmtree(place / "refused", ignore_errors=True)


@pytest.mark.parametrize("has_copies", [False, True])
def test_a_run_does_not_choose_where_copies_are_made(place, has_copies, monkeypatch, tmp_path):
    """It may come from others. Copies that are there already are used."""
    elsewhere = tmp_path / "elsewhere"
    out = f"moved {has_copies}"
    stopped_after(monkeypatch, place, out, 3, "--cache", str(elsewhere))
    if not has_copies:
        shutil.rmtree(elsewhere)
    assert main(["finetune", "--resume", "--out", str(place / out)]) == 0
    assert elsewhere.exists() == has_copies
    assert not (place / out / "cache").exists()
    assert same_result(place, "plain", out)


def test_a_link_in_the_place_of_the_cache_is_not_followed(place, monkeypatch, tmp_path, capsys):
    """In a run folder from others it could lead to copies of the user's, to delete them."""
    assert finetune(place, "first", *EPOCHS, "--cache", str(tmp_path / "mine")) == 0
    stopped_after(monkeypatch, place, "linked", 3)
    shutil.rmtree(place / "linked" / "cache")
    (place / "linked" / "cache").symlink_to(tmp_path / "mine")
    resume = ["finetune", "--resume", "--out", str(place / "linked")]
    assert main(resume) == 1
    assert "cache is a link to another folder: remove it" in capsys.readouterr().err
    (place / "linked" / "cache").unlink()
    assert main(resume) == 0
    assert same_result(place, "plain", "linked")
    (place / "linked" / "cache").symlink_to(tmp_path / "mine")
    assert main(resume) == 0  # it is finished
    assert (tmp_path / "mine" / "copies.sqlite").exists()


def test_copies_that_a_killed_run_left_are_removed(place):
    assert finetune(place, "killed", *EPOCHS) == 0
    Copies(place / "killed" / "cache").read(place / "photos" / "three" / "0.jpg", (32, 32))
    assert main(["finetune", "--resume", "--out", str(place / "killed")]) == 0
    assert not (place / "killed" / "cache").exists()


def test_what_sees_each_image_once_keeps_none(place, capsys):
    for out, *words in (["zero", "--method", "zeroshot"], ["full", "--decode", "full"]):
        assert finetune(place, out, *EPOCHS, *words) == 0
        assert "cache:" not in capsys.readouterr().out
        assert not (place / out / "cache").exists()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_adapt_takes_it(place, opens, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    names = ["three", "seven"]

    def adapted(cache):
        clip = load_clip(str(place / "model"))
        config = TrainerConfig(epochs=3, batch_size=5)
        opens.clear()
        result = adapt(
            clip.model, clip.tokenizer, place / "photos", names, config=config, cache=cache
        )
        return result, opens.count("0.jpg")

    off, times = adapted("off")
    assert times == 4
    auto, times = adapted("auto")
    assert times == 1
    assert list(tmp_path.iterdir()) == []
    kept, times = adapted(tmp_path / "copies")
    assert times == 1
    assert (
        Copies(tmp_path / "copies")
        .text()
        .startswith(f"{tmp_path / 'copies'} keeps small copies of 9 images")
    )
    for result in (auto, kept):
        assert torch.equal(result.predict().cosines, off.predict().cosines)
        assert result.history.loss == off.history.loss
