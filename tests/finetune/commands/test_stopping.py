"""Ctrl-C and SIGTERM: what was learnt is saved first, and the run goes on as if never stopped."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time

import pytest
import safetensors.torch
import torch
from commands_place import finetune, make_place
from engine_problem import (
    CONFIG,
    MemoryStore,
    Remembering,
    assert_same_state,
    infomax,
    make_classifier,
    make_images,
    state_of,
)

from ueo_fast.cli import main
from ueo_fast.finetune.commands import finetune as command
from ueo_fast.finetune.engine import trainer
from ueo_fast.finetune.engine.hooks import Hooks
from ueo_fast.finetune.engine.tracking import JsonLinesTracker
from ueo_fast.finetune.files.run_folder import RunFolder

RARELY = dataclasses.replace(CONFIG, epochs=3, momentum=0.9, checkpoint_every=100)
HANDLED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@pytest.fixture(autouse=True)
def handled():
    """As in a terminal: started in the background, by nohup or by a daemon, signals are ignored."""
    before = {number: signal.getsignal(number) for number in HANDLED}
    for number in HANDLED:
        interrupts = number == signal.SIGINT
        signal.signal(number, signal.default_int_handler if interrupts else signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def train(store, on_step=lambda record: None):
    images, classifier = make_images(), make_classifier()
    objective = Remembering(infomax(images), 10)
    hooks = Hooks(on_step=on_step, checkpoints=store)
    history = trainer.train(classifier, images, objective, config=RARELY, hooks=hooks)
    return classifier, history


def send_at(step, *numbers):
    def on_step(record):
        if record.step == step:
            for number in numbers:
                signal.raise_signal(number)

    return on_step


def handlers():
    return [signal.getsignal(number) for number in HANDLED]


@pytest.mark.parametrize("step", [1, 4, 9])
def test_ctrl_c_saves_the_step_first(step):
    expected, whole = train(MemoryStore())
    before, store = handlers(), MemoryStore()
    with pytest.raises(KeyboardInterrupt):
        train(store, send_at(step, signal.SIGINT))
    assert handlers() == before
    assert [saved.step for saved in store.saved] == [step]
    again, history = train(MemoryStore(store.saved[0]))
    assert_same_state(again, state_of(expected))
    assert history == whole


@pytest.mark.parametrize("number", HANDLED)
def test_a_handler_of_the_program_is_called_after_the_save(number):
    """One that raises nothing, as those that only take a note: the training goes on."""
    store, seen = MemoryStore(), []

    def note(number, frame):
        seen.append((number, [saved.step for saved in store.saved]))

    before = signal.signal(number, note)
    try:
        _, history = train(store, send_at(2, number))
        assert signal.getsignal(number) is note
    finally:
        signal.signal(number, before)
    assert seen == [(number, [2])]
    assert [saved.step for saved in store.saved] == [2, 9]
    assert len(history) == 9


def test_a_second_signal_ends_at_once():
    store = MemoryStore()
    with pytest.raises(KeyboardInterrupt):
        train(store, send_at(2, signal.SIGINT, signal.SIGINT))
    assert store.saved == []
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_ignored_signal_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        store = MemoryStore()
        train(store, send_at(2, signal.SIGHUP))
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
    assert [saved.step for saved in store.saved] == [9]


def test_without_checkpoints_signals_are_left_alone():
    during = []
    train(None, lambda record: during.append(handlers()))
    assert during == [handlers()] * 9


def test_in_another_thread_nothing_is_installed():
    during, before = [], handlers()
    store = MemoryStore()
    thread = threading.Thread(target=train, args=(store, lambda record: during.append(handlers())))
    thread.start()
    thread.join()
    assert during == [before] * 9
    assert [saved.step for saved in store.saved] == [9]


def test_a_checkpoint_is_saved_when_the_last_one_is_old(monkeypatch):
    monkeypatch.setattr(trainer, "_SECONDS_UNSAVED", 0.2)
    store = MemoryStore()
    train(store, lambda record: time.sleep(0.3 if record.step in (3, 7) else 0.0))
    steps = [saved.step for saved in store.saved]
    assert {3, 7, 9} <= set(steps)
    assert len(steps) < 9  # a slow machine may save more than three


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model, photographs, class names and a finished run of two epochs."""
    return make_place(tmp_path_factory.mktemp("user, 用户"))


def stop_at(monkeypatch, step, *numbers):
    told = JsonLinesTracker._on_step

    def on_step(self, record):
        told(self, record)
        send_at(step, *numbers)(record)

    monkeypatch.setattr(JsonLinesTracker, "_on_step", on_step)


def assert_as_never_stopped(place, out):
    whole, stopped = (
        safetensors.torch.load_file(folder / "delta.safetensors") for folder in (place / "run", out)
    )
    assert all(torch.equal(whole[name], stopped[name]) for name in whole)
    for name in ("train.jsonl", "epochs.jsonl", "metrics.jsonl"):
        first, second = (
            [
                {key: value for key, value in json.loads(line).items() if key != "seconds"}
                for line in (folder / name).read_text().splitlines()
            ]
            for folder in (place / "run", out)
        )
        assert first == second, name
    predictions = [(folder / "predictions.csv").read_bytes() for folder in (place / "run", out)]
    assert predictions[0] == predictions[1]


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_a_stopped_run_says_what_is_saved_and_goes_on(
    place, tmp_path, monkeypatch, capfd, number, status
):
    out, before = tmp_path / "a run", handlers()
    with monkeypatch.context() as patch:
        stop_at(patch, 3, number)
        assert finetune(place, str(out), "--epochs", "2") == status
    said = capfd.readouterr().err
    assert "stopping after this step; the same signal again stops at once" in said
    resume = shlex.join(["ueo-fast", "finetune", "--resume", "--out", str(out)])
    assert said.endswith(f"\nstopped: step 3 is saved; to go on: {resume}\n")
    assert "interrupted" not in said
    assert "Traceback" not in said
    assert handlers() == before
    assert main(["finetune", "--resume", "--out", str(out)]) == 0
    assert "goes on after step 3 of 8" in "".join(capfd.readouterr())
    assert_as_never_stopped(place, out)


def test_what_is_not_saved_is_told(place, tmp_path, monkeypatch, capfd):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        stop_at(patch, 3, signal.SIGTERM, signal.SIGTERM)
        assert finetune(place, str(out), "--epochs", "2") == 143
    assert "stopped: no step is saved yet, so it begins again; to go on: ueo" in (
        capfd.readouterr().err
    )
    assert main(["finetune", "--resume", "--out", str(out)]) == 0
    assert "no step was saved: the training begins again" in capfd.readouterr().out
    assert_as_never_stopped(place, out)


def test_a_stop_before_there_is_a_run_leaves_none(place, tmp_path, monkeypatch, capfd):
    def stop(*_, **__):
        signal.raise_signal(signal.SIGTERM)

    for name in ("load_clip", "read_problem"):
        with monkeypatch.context() as patch:
            patch.setattr(command, name, stop)
            assert finetune(place, str(tmp_path / "run")) == 143
        assert not (tmp_path / "run").exists()
    assert "stopped: nothing was done yet\n" in capfd.readouterr().err


AFTER_TRAINING = [
    (command.Recorder, "after"),
    (RunFolder, "write_csv"),
    (command, "save_delta"),
    (command, "metrics_table"),
    (command, "write_report"),
]


# A kill leaves another folder at each place. What is said and returned of the rest has two places
# in the code: around the report, and around everything before it.
STOPS = [
    pytest.param(
        *(where, name, how),
        id=f"{name}-{how}",
        marks=() if how == "killed" or number in (0, 4) else pytest.mark.slow,
    )
    for number, (where, name) in enumerate(AFTER_TRAINING)
    for how in ("killed", "full disk", "SIGTERM")
]


@pytest.mark.usefixtures("without_charts")
@pytest.mark.parametrize(("where", "name", "how"), STOPS)
def test_what_is_missing_after_the_training_is_finished_later(
    place, tmp_path, monkeypatch, capfd, where, name, how
):
    out = tmp_path / "run"

    class Killed(BaseException):
        pass

    def fail(*_, **__):
        if how == "killed":
            raise Killed
        if how == "full disk":
            raise OSError(28, "No space left on device", "some file")
        signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(where, name, fail)
        if how == "killed":
            with pytest.raises(Killed):
                finetune(place, str(out), "--epochs", "2")
        else:
            assert finetune(place, str(out), "--epochs", "2") == {"SIGTERM": 143}.get(how, 1)
            said = capfd.readouterr().err
            assert "Traceback" not in said
            assert f"go on: ueo-fast finetune --resume --out {out}" in said
    trained = (out / "train.jsonl").read_bytes()
    assert main(["finetune", "--resume", "--out", str(out)]) == 0
    assert (out / "train.jsonl").read_bytes() == trained  # no step was taken again
    assert (out / "report.html").stat().st_size > 10_000
    assert_as_never_stopped(place, out)
    capfd.readouterr()
    assert main(["finetune", "--resume", "--out", str(out)]) == 0
    assert "nothing to resume" in capfd.readouterr().out


def test_a_finished_run_that_lost_a_file_gets_it_again(place, tmp_path):
    out = tmp_path / "run"
    assert finetune(place, str(out), "--epochs", "2") == 0
    for name in ("predictions.csv", "delta.safetensors", "report.html"):
        (out / name).unlink()
        assert main(["finetune", "--resume", "--out", str(out)]) == 0
        assert (out / name).exists()
    assert_as_never_stopped(place, out)


def test_a_second_start_is_refused_and_harms_nothing(place, tmp_path, monkeypatch, capfd):
    """While the first loads its model its folder is empty: nothing tells that it is in use."""
    out, code = tmp_path / "run", []
    load = command.load_clip

    def second_start(*words, **options):
        with monkeypatch.context() as patch:
            patch.setattr(command, "load_clip", load)
            code.append(finetune(place, str(out), "--epochs", "2"))
        return load(*words, **options)

    monkeypatch.setattr(command, "load_clip", second_start)
    assert finetune(place, str(out), "--epochs", "2") == 0
    assert code == [1]
    assert "another process is writing to this run" in capfd.readouterr().err
    assert_as_never_stopped(place, out)


def test_leftover_partial_files_block_nothing(place, tmp_path):
    """Also in odd forms: what a link leads to is left alone, and a pipe is not waited for."""
    out, other = tmp_path / "run", tmp_path / "mine.txt"
    other.write_text("mine")

    def leave_partial_files():
        (out / ".config.json.partial").write_text("{")
        (out / ".delta.safetensors.partial").symlink_to(other)
        os.mkfifo(out / ".predictions.csv.partial")
        (out / ".report.html.partial").mkdir()

    out.mkdir()
    leave_partial_files()
    assert finetune(place, str(out), "--epochs", "2") == 0
    (out / "finished.json").unlink()
    leave_partial_files()
    assert main(["finetune", "--resume", "--out", str(out)]) == 0
    (out / "report.html").unlink()
    os.mkfifo(out / ".report.html.partial")
    assert main(["report", str(out)]) == 0
    assert other.read_text() == "mine"
    assert not list(out.glob(".*partial"))
    assert_as_never_stopped(place, out)


@pytest.mark.slow
@pytest.mark.parametrize("number", HANDLED)
def test_a_signal_to_all_processes_of_a_run(place, tmp_path, number):
    """As a terminal or a batch system sends it: the workers that load images get it too."""
    words = ["--data", place / "photos", "--classes", place / "names.txt", "--epochs", 2]
    words += ["--model", place / "model", "--workers", 2, "--threads", 1, "--batch-size", 16]
    words += ["--prompt-lr", 1e-3, "--affine-lr", 3e-2, "--out", tmp_path / "run"]
    process = subprocess.Popen(
        [sys.executable, "-m", "ueo_fast.cli", "finetune", *map(str, words)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    steps = tmp_path / "run" / "train.jsonl"
    deadline = time.monotonic() + 300
    while not (steps.exists() and steps.read_bytes().count(b"\n") >= 2):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.killpg(process.pid, number)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 128 + number, said
    assert "Traceback" not in said
    assert " is saved; to go on: ueo-fast finetune --resume" in said
    assert main(["finetune", "--resume", "--out", str(tmp_path / "run")]) == 0
    assert_as_never_stopped(place, tmp_path / "run")
