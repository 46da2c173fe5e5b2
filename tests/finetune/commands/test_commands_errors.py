"""What the commands say of a mistake, and what they leave behind."""

from __future__ import annotations

import sys
import types

import pytest
from commands_place import finetune, make_place
from photo_folder import CORRUPT, photo_folder

from ueo_fast.cli import main
from ueo_fast.finetune.files.run_folder import RunFolder

pytestmark = pytest.mark.usefixtures("without_charts")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model, photographs, class names and a finished run of two epochs."""
    return make_place(tmp_path_factory.mktemp("user, 用户"))


def test_an_error_after_the_start_says_how_to_go_on(place, capsys):
    """Strict, at an image that cannot be read; then the image is mended."""
    photos = place / "to be mended"
    photo_folder(photos, per_class=2)
    words = ["--epochs", "1", "--strict", "--data", str(photos)]
    assert finetune(place, "strict run", *words) == 2
    error = capsys.readouterr().err
    assert CORRUPT in error
    assert f"ueo-fast finetune --resume --out '{place / 'strict run'}'" in error
    (photos / CORRUPT).unlink()
    assert main(["finetune", "--resume", "--out", str(place / "strict run")]) == 0
    assert (place / "strict run" / "delta.safetensors").exists()


@pytest.mark.parametrize(
    ("module", "flags", "message"),
    [
        ("tensorboard", ["--tensorboard"], 'pip install ".[tensorboard]"'),
        ("wandb", ["--wandb", "project"], 'pip install ".[wandb]"'),
    ],
)
def test_a_tracker_that_is_not_installed_is_named_before_the_work(
    place, monkeypatch, capsys, module, flags, message
):
    monkeypatch.setitem(sys.modules, module, None)
    assert finetune(place, "untracked", "--epochs", "1", *flags) == 1
    assert message in capsys.readouterr().err
    assert not (place / "untracked").exists()


@pytest.mark.parametrize(
    ("module", "flags"),
    [("pyarrow", ["t.parquet"]), ("sklearn.mixture", ["t.csv", "--threshold", "gmm"])],
)
def test_scores_that_need_another_package_say_so(place, monkeypatch, capsys, module, flags):
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.chdir(place)
    words = ["score", "--run", "run", "--data", "photos", "--workers", "0", "--out", *flags]
    assert main(words) == 1
    error = capsys.readouterr().err
    assert "ueo-fast score: " in error
    assert "pip install" in error
    assert not list(place.glob("t.*"))


def test_a_disk_that_is_full_at_once_leaves_a_run_that_can_go_on(place, monkeypatch, capsys):
    def full(*_, **__):
        raise OSError(28, "No space left on device", "environment.json")

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "write_environment", full)
        assert finetune(place, "full disk", "--epochs", "1") == 1
    error = capsys.readouterr().err
    assert "then go on: ueo-fast finetune --resume --out" in error
    assert "No space left on device: 'environment.json'" in error
    assert "[Errno" not in error
    assert main(["finetune", "--resume", "--out", str(place / "full disk")]) == 0
    assert (place / "full disk" / "environment.json").exists()


def test_a_page_that_cannot_be_written_does_not_hide_what_was_learnt(place, monkeypatch, capsys):
    def full(path):
        raise OSError(28, "No space left on device", str(path / "report.html"))

    monkeypatch.setattr("ueo_fast.finetune.commands.finetune.write_report", full)
    assert finetune(place, "no page", "--epochs", "1") == 1
    said = capsys.readouterr()
    assert "delta.safetensors" in said.out
    assert f"ueo-fast report '{place / 'no page'}'" in said.err
    assert (place / "no page" / "finished.json").exists()
    assert main(["report", str(place / "no page")]) == 0


def test_weights_and_biases_without_a_key_is_no_traceback(place, monkeypatch, capsys):
    class UsageError(Exception):
        pass

    def refuses(*_, **__):
        raise UsageError("No API key configured.")

    monkeypatch.setitem(sys.modules, "wandb", types.ModuleType("wandb"))  # as if installed
    monkeypatch.setattr("ueo_fast.finetune.commands.recorder.WandbTracker", refuses)
    assert finetune(place, "no key", "--epochs", "1", "--wandb", "project") == 1
    error = capsys.readouterr().err
    assert "wandb='project'" in error
    assert "No API key" in error
    assert "WANDB_MODE=offline" in error


@pytest.mark.parametrize(
    "words",
    [
        "finetune --data {0}/photos --classes {0}/names.txt --model {0}/model --out {0}/none",
        "evaluate --run {0}/run",
        "score --run {0}/run --data {0}/photos --out {0}/none.csv",
    ],
)
def test_a_device_that_is_not_there_is_named(place, capsys, words):
    split = [word.format(place) for word in words.split()]
    assert main([*split, "--device", "tpuu"]) == 2
    assert "device='tpuu' cannot be used here" in capsys.readouterr().err
    assert not list(place.glob("none*"))


def test_evaluate_checks_its_output_before_the_work(place, capsys):
    for name, message in (("x.xlsx", "must end in .csv"), ("names.txt/x.csv", "is a file")):
        words = ["evaluate", "--run", str(place / "run"), "--out", str(place / name)]
        assert main(words) == 2
        said = capsys.readouterr()
        assert message in said.err
        assert "zero-shot" not in said.out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--out x", "give --data, the images, and --classes"),
        ("--data photos --classes missing.txt", "missing.txt"),
        ("--data missing --classes names.txt", "missing does not exist"),
        ("--data empty --classes names.txt", "has no image"),
        ("--dataset officehome --root .", "needs --domain and --root"),
        ("--data photos --classes names.txt --eps 1e-5 --method tent --trade-off 2", "trade_off"),
        ("--data photos --classes names.txt --prompt-template photo", "{} once"),
        ("--data photos --classes names.txt --model RN5O --pretrained openai", "RN50"),
        ("--data photos --classes names.txt --model RN50 --pretrained opnai", "openai"),
        ("--data photos --classes names.txt --batch-size 0", "batch_size must be at least 1"),
        ("--data photos --classes names.txt --threads 0", "threads must be at least 1, got 0"),
        ("--data photos --classes names.txt --threads 99999", "threads must be at most 1,024"),
        ("--data photos --classes names.txt --workers -1", "workers must be at least 0, got -1"),
        ("--data photos --classes empty", "classes='empty' is a folder"),
        ("--data photos --classes names.txt --scenario PDA", "scenario='PDA'"),
        ("--data photos --classes names.txt --method adabn --train prompt", "train='prompt'"),
        ("--data photos --classes names.txt --method tent --train prompt", "affine parameters"),
        ("--data photos/zero --classes names.txt --method oracle", "method='oracle' reads"),
    ],
)
def test_a_mistake_is_named_and_leaves_nothing(
    place, monkeypatch, tmp_path, capsys, words, message
):
    (tmp_path / "empty").mkdir()
    (tmp_path / "photos").symlink_to(place / "photos")
    (tmp_path / "names.txt").symlink_to(place / "names.txt")
    monkeypatch.chdir(tmp_path)
    assert main(["finetune", *words.split()]) in (1, 2)
    assert message in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} <= {"empty", "photos", "names.txt", "runs"}
    assert not list(tmp_path.glob("runs/*"))


def test_commands_that_use_a_run_say_what_is_missing(tmp_path, capsys):
    for words in (
        f"evaluate --run {tmp_path}",
        f"score --run {tmp_path} --data {tmp_path} --out {tmp_path}/s.csv",
        f"report {tmp_path}",
        f"compare {tmp_path}",
    ):
        assert main(words.split()) in (1, 2), words
        assert str(tmp_path) in capsys.readouterr().err
