"""A run that was stopped and goes on ends as one that was not, to the bit."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import random

import pytest
import torch
from engine_problem import (
    CONFIG,
    NAMES,
    MemoryStore,
    Remembering,
    Told,
    assert_same_state,
    infomax,
    make_classifier,
    make_images,
    state_of,
)
from torch.utils.data import Dataset

from ueo_fast.finetune.engine.checkpoint import SafetensorsCheckpoints
from ueo_fast.finetune.engine.hooks import Hooks
from ueo_fast.finetune.engine.trainer import train
from ueo_fast.finetune.methods import Tent
from ueo_fast.finetune.target import Target

FULL = dataclasses.replace(
    CONFIG, epochs=3, momentum=0.9, weight_decay=0.01, checkpoint_every=1, early_stop=3
)


class Augmented(Dataset):
    """Each time another image, drawn from the global generators."""

    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index] + random.random() * torch.randn(3, 32, 32)


def run(tower, config, start=None, objective=None):
    images = make_images()
    classifier, told, store = make_classifier(tower), Told(), MemoryStore(start)
    history = train(
        classifier,
        Augmented(images),
        objective or Remembering(infomax(images), 10),
        config=config,
        hooks=told.hooks(store),
    )
    return classifier, history, told, store


@functools.cache
def whole():
    """A run of nine steps that many tests stop somewhere."""
    return run("vit", FULL)


def saved_after(step):
    return copy.deepcopy(whole()[3].saved[step - 1])


def without_seconds(records):
    return [dataclasses.replace(record, seconds=0.0) for record in records]


@pytest.mark.parametrize("tower", ["vit", "bn"])
def test_from_any_step_on_nothing_differs(tower, tmp_path):
    """Momentum, a memory bank, augmentation, early stopping; the middle of an epoch and its end."""
    classifier, history, told, store = run(tower, FULL)
    expected = state_of(classifier)
    assert [saved.step for saved in store.saved] == list(range(1, 10))
    for done in (1, 2, 3, 4, 8, 9):
        on_disk = SafetensorsCheckpoints(tmp_path)
        on_disk.save(store.saved[done - 1])
        again, resumed, told_again, store_again = run(tower, FULL, on_disk.load())
        assert_same_state(again, expected)
        assert resumed == history
        (start,) = told_again.starts
        assert (start.step, start.total, start.epoch) == (done, 9, done // 3)
        assert without_seconds(told_again.steps) == without_seconds(told.steps[done:])
        assert told_again.epochs == told.epochs[done // 3 :]
        for saved, wanted in zip(store_again.saved, store.saved[done:], strict=True):
            assert json.loads(json.dumps(saved.values)) == json.loads(json.dumps(wanted.values))
            assert saved.tensors.keys() == wanted.tensors.keys()
            for name, value in saved.tensors.items():
                assert torch.equal(value, wanted.tensors[name]), (saved.step, name)


def test_workers_and_checkpoints_may_differ():
    expected, *_ = whole()
    start = saved_after(4)
    config = dataclasses.replace(FULL, num_workers=2, checkpoint_every=5)
    again, _, _, store = run("vit", config, start)
    assert_same_state(again, state_of(expected))
    assert [saved.step for saved in store.saved] == [5, 9]


def test_a_run_goes_another_way_without_each_part_of_its_state():
    """Nothing in a checkpoint is there for nothing: the tests above would notice."""
    classifier, *_ = whole()
    start = saved_after(4)
    for name in ("adapted/prompt.context", "objective/bank", "momentum/0"):
        tensors = {**start.tensors, name: torch.zeros_like(start.tensors[name])}
        other, *_ = run("vit", FULL, dataclasses.replace(start, tensors=tensors))
        assert not torch.equal(other.prompt.context, classifier.prompt.context), name


def test_when_checkpoints_are_saved():
    def steps(every):
        return [saved.step for saved in run("vit", dataclasses.replace(CONFIG, **every))[3].saved]

    assert steps({"checkpoint_every": 0}) == [3, 6]
    assert steps({"checkpoint_every": 4}) == [4, 6]
    assert steps({"checkpoint_every": 100}) == [6]


def test_a_log_has_every_step_of_a_checkpoint():
    """What is told comes first; a kill in between leaves a step too many, never one too few."""
    order = []

    class Store(MemoryStore):
        def save(self, checkpoint):
            order.append(("saved", checkpoint.step))

    hooks = Hooks(
        on_step=lambda record: order.append(("step", record.step)),
        on_epoch=lambda record: order.append(("epoch", record.epoch)),
        checkpoints=Store(),
    )
    images = make_images()
    config = dataclasses.replace(CONFIG, epochs=1, batch_size=5, checkpoint_every=1)
    train(make_classifier(), images, infomax(images), config=config, hooks=hooks)
    assert order == [("step", 1), ("saved", 1), ("step", 2), ("epoch", 1), ("saved", 2)]


def test_a_finished_run_does_nothing_more():
    classifier, history, *_ = whole()
    again, resumed, told, store_again = run("vit", FULL, saved_after(9))
    assert_same_state(again, state_of(classifier))
    assert resumed == history
    assert told.steps == told.epochs == store_again.saved == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 5}, "batch_size=4, and this one has batch_size=5"),
        ({"prompt_lr": 0.06}, "prompt_lr=0.05, and this one has prompt_lr=0.06"),
        ({"seed": 4}, "seed=3, and this one has seed=4"),
        ({"precision": "bf16"}, "precision='fp32', and this one has precision='bf16'"),
        ({"early_stop": None}, "early_stop=3, and this one has early_stop=None"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(change, message):
    start = saved_after(1)
    with pytest.raises(ValueError, match=message):
        run("vit", dataclasses.replace(FULL, **change), start)


def test_a_checkpoint_of_other_classes_images_or_models_is_refused():
    start, images = saved_after(1), make_images()
    hooks = Hooks(checkpoints=MemoryStore(start))
    objective = Remembering(infomax(images), 10)
    with pytest.raises(ValueError, match=r"images=10, and this one has images=9"):
        train(make_classifier(), images[:9], objective, config=FULL, hooks=hooks)
    other = make_classifier(names=[*NAMES[:3], "five"])
    with pytest.raises(ValueError, match=r"classes=.*'four'\], and this one has classes=.*'five'"):
        train(other, images, objective, config=FULL, hooks=hooks)
    with pytest.raises(
        ValueError, match=r"objective='Remembering', .* objective='WeightedEntropy'"
    ):
        train(make_classifier(), images, infomax(images), config=FULL, hooks=hooks)
    before = make_classifier("bn")
    with pytest.raises(ValueError, match="does not fit this run: its state lacks"):
        run("bn", FULL, start)
    assert_same_state(before, state_of(make_classifier("bn")))
    with pytest.raises(ValueError, match="does not fit this run"):
        run("vit", FULL, start, Remembering(infomax(images), 11))
    strange = dataclasses.replace(start, values={})
    with pytest.raises(ValueError, match="delete it to start anew"):
        run("vit", FULL, strange)


FORGED = {
    "a step of 10^30": ({"step": 10**30}, {}, {}, r"step is 1000\d+, and this run has 9"),
    "a step before the first": ({"step": -1}, {}, {}, "step is -1, and this run has 9"),
    "a step too many": ({"step": 5}, {}, {}, r"'history' has \(3, 4\) .*, expected \(3, 5\)"),
    "a history with NaN": (
        *({}, {"history": lambda t: t.fill_(float("nan"))}, {}),
        "'history' has NaN or infinite values",
    ),
    "weights with infinity": (
        *({}, {"adapted/prompt.context": lambda t: t.fill_(float("inf"))}, {}),
        "'adapted/prompt.context' has NaN or infinite values",
    ),
    "no momentum of that shape": (
        *({}, {"momentum/0": lambda t: t[:1]}, {}),
        "'momentum/0' has .* expected ",
    ),
    "weights of another type": (
        *({}, {"adapted/prompt.context": lambda t: t.double()}, {}),
        r"'adapted/prompt.context' has .* torch.float64, expected .* torch.float32",
    ),
    "images less than none": (
        *({}, {"epoch/histogram": lambda t: t - 100}, {}),
        "'epoch/histogram' has negative values",
    ),
    "a tensor too many": (
        *({}, {"best/other": lambda t: torch.ones(1)}, {}),
        r"its state has 'best/other' \(1 differ\)",
    ),
    "a tensor too few": ({}, {"best/prompt.context": None}, {}, "lacks 'best/prompt.context'"),
    "an epoch of 10^9": ({}, {}, {"best": {"information": 0.1, "best_epoch": 10**9}}, "of 3"),
    "no best epoch": ({}, {}, {"best": {"information": 0.1}}, "'best_epoch' is missing"),
    "a reason that is no text": ({}, {}, {"stopped": ["x"]}, "stopped is .* of the wrong type"),
    "warnings of no kind": ({}, {}, {"monitor": {"warned": ["x"]}}, "expected one of entropy"),
    "values that are gone": ({}, {}, {"optimizer": None}, "optimizer is None, of the wrong type"),
}


@pytest.mark.parametrize(
    ("fields", "tensors", "values", "message"), FORGED.values(), ids=list(FORGED)
)
def test_a_checkpoint_with_values_that_no_run_has(tmp_path, fields, tensors, values, message):
    """Its checksum fits: somebody wrote it so."""
    start = saved_after(4)
    changed = dict(start.tensors)
    for name, change in tensors.items():
        if change is None:
            del changed[name]
        else:
            changed[name] = change(changed.get(name, torch.zeros(1)).clone())
    forged = dataclasses.replace(
        start, tensors=changed, values={**start.values, **values}, **fields
    )
    store = SafetensorsCheckpoints(tmp_path)
    store.save(forged)
    with pytest.raises(ValueError, match=f"{store.path} does not fit this run: .*{message}"):
        run("vit", FULL, store.load())


def test_statistics_of_batch_norm_that_follow_a_stream_are_resumed():
    """Tent: in order, BatchNorm in training mode, predictions on the way."""
    images = make_images(14)
    config = dataclasses.replace(CONFIG, checkpoint_every=1)

    def adapted(start=None):
        classifier, store = make_classifier("bn"), MemoryStore(start)
        history = Tent().adapt(
            classifier, Target(images), config=config, hooks=Hooks(checkpoints=store)
        )
        return classifier, history, store

    classifier, history, store = adapted()
    assert [saved.step for saved in store.saved] == [1, 2, 3, 4]
    for start in store.saved:
        again, resumed, _ = adapted(start)
        assert_same_state(again, state_of(classifier))
        assert torch.equal(resumed.online, history.online)
    mean = make_classifier("bn").model.visual.bn1.running_mean
    assert not torch.equal(classifier.model.visual.bn1.running_mean, mean)


def test_a_checkpoint_of_another_prompt_is_refused():
    """Of as many words, so that the context's shape says nothing."""
    start, images = saved_after(1), make_images()
    other = make_classifier()
    other.prompt.suffix_text = " outdoors."
    with pytest.raises(ValueError, match=r"prompt='.* {}\.', and this one has prompt='.* outdoors"):
        train(
            other,
            images,
            Remembering(infomax(images), 10),
            config=FULL,
            hooks=Hooks(checkpoints=MemoryStore(start)),
        )
