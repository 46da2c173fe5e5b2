"""Where a run's numbers go: JSON lines, TensorBoard, Weights & Biases."""

from __future__ import annotations

import builtins
import dataclasses
import json
import sys

import pytest
from engine_problem import CONFIG, MemoryStore, Told, infomax, make_classifier, make_images

from ueo_fast.finetune.engine.hooks import Hooks, StartRecord, combine
from ueo_fast.finetune.engine.tracking import JsonLinesTracker, TensorBoardTracker, WandbTracker
from ueo_fast.finetune.engine.trainer import train
from ueo_fast.finetune.files.run_files import EpochRecord, StepRecord
from ueo_fast.finetune.files.run_folder import RunFolder


def step_record(step: int, loss: float = 0.5) -> StepRecord:
    return StepRecord(step, 6, 1, loss, 0.25, 1.0, 0.75, {"prompt": 0.1, "affine": 0.0}, 0.01)


EPOCH = EpochRecord(1, 0.5, 0.25, 1.0, (3, 0, 1))


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_hooks_are_combined_in_their_order():
    order, store = [], MemoryStore()

    def named(name, **options):
        return Hooks(
            *[lambda record, k=k: order.append((name, k, record)) for k in "sten"], **options
        )

    both = combine(named("a"), named("b", checkpoints=store))
    assert both.checkpoints is store
    for call in (both.on_start, both.on_step, both.on_epoch, both.on_warning):
        call("x")
    assert order == [(name, kind, "x") for kind in "sten" for name in "ab"]
    assert combine().checkpoints is None
    with pytest.raises(ValueError, match="2 of the hooks have checkpoints"):
        combine(both, both)


def test_json_lines_have_each_step_once_after_a_resume(tmp_path):
    images, folder = make_images(), RunFolder(tmp_path)
    config = dataclasses.replace(CONFIG, checkpoint_every=1)

    def run(start):
        told, store = Told(), MemoryStore(start)
        hooks = combine(JsonLinesTracker(folder).hooks(), told.hooks(store))
        train(make_classifier(), images, infomax(images), config=config, hooks=hooks)
        return told, store

    def contents():
        steps = [{**line, "seconds": 0.0} for line in lines(tmp_path / "train.jsonl")]
        return steps, lines(tmp_path / "epochs.jsonl")

    told, store = run(None)
    steps, epochs = contents()
    assert [line["step"] for line in steps] == list(range(1, 7))
    expected = json.loads(json.dumps([dataclasses.asdict(record) for record in told.steps]))
    assert steps == [{**line, "seconds": 0.0} for line in expected]
    assert epochs == json.loads(json.dumps([dataclasses.asdict(each) for each in told.epochs]))
    for saved in store.saved:  # killed when all had been said, but less had been saved
        with open(tmp_path / "train.jsonl", "ab") as file:
            file.write(b'{"step": 7, "los')
        run(saved)
        assert contents() == (steps, epochs)
    run(None)  # killed before its first checkpoint
    assert contents() == (steps, epochs)


def test_warnings_are_kept_with_their_step_and_once(tmp_path):
    def run(begin, last):
        hooks = JsonLinesTracker(RunFolder(tmp_path)).hooks()
        hooks.on_warning("before the start, ü")
        hooks.on_start(StartRecord(begin, 6, 0))
        for step in range(begin + 1, last + 1):
            hooks.on_step(step_record(step))
            if step in (2, 4):
                hooks.on_warning("collapse")

    run(0, 6)
    expected = [
        {"step": 0, "text": "before the start, ü"},
        {"step": 2, "text": "collapse"},
        {"step": 4, "text": "collapse"},
    ]
    assert lines(tmp_path / "warnings.jsonl") == expected
    run(3, 6)
    assert lines(tmp_path / "warnings.jsonl") == expected


def test_tensorboard_shows_each_step_once_after_a_resume(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def run(begin, loss):
        with TensorBoardTracker(tmp_path) as tracker:
            hooks = tracker.hooks()
            hooks.on_start(StartRecord(begin, 6, 0))
            for step in range(begin + 1, 7):
                hooks.on_step(step_record(step, loss))
            hooks.on_warning("collapse")
            hooks.on_epoch(EPOCH)

    run(0, 0.75)  # killed before its first checkpoint: it begins again
    run(0, 0.5)
    run(4, 0.125)  # the checkpoint was of step 4
    events = EventAccumulator(str(tmp_path), size_guidance={"scalars": 0, "histograms": 0})
    events.Reload()
    loss = events.Scalars("train/loss")
    assert [(event.step, event.value) for event in loss] == [
        (1, 0.5), (2, 0.5), (3, 0.5), (4, 0.5), (5, 0.125), (6, 0.125),
    ]  # fmt: skip
    values = {
        "train/conditional_entropy": 0.25,
        "train/marginal_entropy": 1.0,
        "train/largest_share": 0.75,
        "learning_rate/prompt": 0.1,
        "learning_rate/affine": 0.0,
    }
    for name, value in values.items():
        assert [event.value for event in events.Scalars(name)] == [pytest.approx(value)] * 6
    (information,) = events.Scalars("epoch/mutual_information")
    assert (information.step, information.value) == (6, 0.75)
    (histogram,) = events.Histograms("epoch/predicted_class")
    assert histogram.histogram_value.num == 4
    assert list(histogram.histogram_value.bucket) == [3, 0, 1]


def test_tensorboard_that_is_not_installed_says_how_to(tmp_path, monkeypatch):
    real = builtins.__import__

    def refuse(name, *args, **options):
        if name.startswith("tensorboard"):
            raise ModuleNotFoundError("No module named 'tensorboard'", name="tensorboard")
        return real(name, *args, **options)

    for name in [*sys.modules]:
        if name.startswith(("tensorboard", "torch.utils.tensorboard")):
            monkeypatch.delitem(sys.modules, name)
    import torch.utils

    monkeypatch.delattr(torch.utils, "tensorboard", raising=False)
    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ModuleNotFoundError, match="pip install tensorboard"):
        TensorBoardTracker(tmp_path)
    assert not list(tmp_path.iterdir())


def test_wandb_that_is_not_installed_says_how_to(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ModuleNotFoundError, match="pip install wandb"):
        WandbTracker("project", RunFolder(tmp_path))
    assert not list(tmp_path.iterdir())


class RecordedWandb:
    """Stands in for the module, and records what it is told."""

    def __init__(self):
        self.runs = []

    def init(self, **options):
        self.runs.append(RecordedRun(options))
        return self.runs[-1]


class RecordedRun:
    def __init__(self, options):
        self.options, self.logged, self.alerts, self.code = options, [], [], None

    def log(self, values, step):
        self.logged.append((step, values))

    def alert(self, title, text):
        self.alerts.append((title, text))

    def finish(self, exit_code=0):
        self.code = exit_code


def test_wandb_is_told_everything_under_one_id(tmp_path, monkeypatch):
    module, folder = RecordedWandb(), RunFolder(tmp_path)
    monkeypatch.setitem(sys.modules, "wandb", module)
    with WandbTracker("project", folder, name="n", config={"lr": 1}, mode="offline") as tracker:
        hooks = tracker.hooks()
        hooks.on_start(StartRecord(0, 6, 0))
        hooks.on_step(step_record(1))
        hooks.on_epoch(EPOCH)
        hooks.on_warning("collapse")
    with pytest.raises(KeyError), WandbTracker("project", folder):
        raise KeyError
    first, second = module.runs
    assert first.options["project"] == "project"
    assert first.options["dir"] == str(tmp_path)
    assert (first.options["name"], first.options["config"]) == ("n", {"lr": 1})
    assert first.options["mode"] == "offline"
    assert first.options["resume"] == "allow"
    assert first.options["id"] == second.options["id"]
    assert [step for step, _ in first.logged] == [1, 1]
    assert first.logged[0][1]["train/loss"] == 0.5
    assert first.logged[1][1]["epoch/mutual_information"] == 0.75
    assert first.logged[1][1]["epoch/largest_share"] == 0.75
    assert first.alerts == [("ueo_fast", "collapse")]
    assert (first.code, second.code) == (0, 1)


@pytest.mark.slow  # starts a process of wandb's own
def test_wandb_takes_it_offline(tmp_path):
    wandb = pytest.importorskip("wandb")
    with WandbTracker("project", RunFolder(tmp_path), mode="offline") as tracker:
        hooks = tracker.hooks()
        hooks.on_start(StartRecord(0, 6, 0))
        hooks.on_step(step_record(1))
        hooks.on_warning("collapse")
        hooks.on_epoch(EPOCH)
    wandb.teardown()  # as at the end of the program: its process writes what it still holds
    (log,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    assert b"train/loss" in log.read_bytes()
