"""Label-free early stopping: at a plateau, at a collapse, and across a resume."""

from __future__ import annotations

import dataclasses

import torch
from engine_problem import (
    CONFIG,
    MemoryStore,
    Told,
    assert_same_state,
    infomax,
    make_classifier,
    make_images,
    state_of,
)

from ueo_fast.finetune.engine.monitor import EarlyStop
from ueo_fast.finetune.engine.objective import Objective
from ueo_fast.finetune.engine.trainer import train
from ueo_fast.finetune.files.run_files import EpochRecord


class Collapsing(Objective):
    """Puts everything into class 0."""

    def forward(self, step):
        return -step.logits[:, 0].mean() + step.logits[:, 1:].mean()


def test_training_that_collapses_warns_and_with_early_stopping_goes_back():
    images = make_images(60)
    config = dataclasses.replace(CONFIG, epochs=4, batch_size=10, prompt_lr=0.0, affine_lr=0.5)

    def trained(early_stop, start=None):
        classifier, told, store, states = make_classifier(), Told(), MemoryStore(start), []
        history = train(
            classifier,
            images,
            Collapsing(),
            config=dataclasses.replace(config, early_stop=early_stop, checkpoint_every=6),
            hooks=dataclasses.replace(
                told.hooks(store), on_epoch=lambda record: states.append(state_of(classifier))
            ),
            zero_shot=torch.eye(4).repeat(15, 1),  # 15 images of each class
        )
        return classifier, told, history, store, states

    classifier, told, history, _, _ = trained(None)
    assert len(history) == 24
    assert history.stopped is None
    assert history.kept_epoch is None
    assert [warning[:14] for warning in told.warnings] == ["step 12 of 24:"]

    classifier, told, history, store, states = trained(3)
    assert history.stopped.startswith("after step 12 of 24: the predictions are collapsing")
    assert history.kept_epoch == 1
    assert len(history) == len(told.steps) == 12
    assert_same_state(classifier, states[0])

    # A resumed run knows that it was stopped; one from before is stopped again.
    assert [saved.step for saved in store.saved] == [6, 12]
    for saved, steps in zip(store.saved, (6, 0), strict=True):
        again, told_again, resumed, _, _ = trained(3, saved)
        assert resumed == history
        assert len(told_again.steps) == steps
        assert len(told_again.warnings) == (1 if steps else 0)
        assert_same_state(again, state_of(classifier))


def record(epoch, information):
    return EpochRecord(epoch, 0.0, 1.0, 1.0 + information, (1, 1))


def test_early_stopping_waits_and_keeps_the_best():
    classifier = make_classifier()
    stop = EarlyStop(classifier, patience=2)
    zero_shot = state_of(classifier)
    with torch.no_grad():
        classifier.prompt.context.zero_()
    assert stop.restore() == 0  # no epoch yet: back to before the training
    assert_same_state(classifier, zero_shot)
    values = {1: 0.1, 2: 0.3, 3: 0.2, 4: 0.31, 5: 0.31, 6: 0.1}
    for epoch, information in values.items():
        with torch.no_grad():
            classifier.prompt.context.fill_(epoch)
        reason = stop.epoch(record(epoch, information))
        assert (reason is not None) == (epoch == 6)
    assert reason == (
        "the mutual information has not risen for 2 epoch(s) since epoch 4, whose state was kept"
    )
    assert stop.restore() == 4
    assert (classifier.prompt.context == 4).all()


class Rising(Objective):
    """Raises the mutual information for ``good`` steps, and lowers it from then on."""

    def __init__(self, images, good):
        super().__init__()
        self.inner = infomax(images)
        self.good = good
        self.register_buffer("done", torch.zeros((), dtype=torch.int64))

    def forward(self, step):
        loss = self.inner(step)
        return loss if int(self.done) < self.good else -loss

    def remember(self, step):
        self.done += 1


def test_training_stops_early_and_leaves_the_best_epochs_state():
    images = make_images(12)
    config = dataclasses.replace(
        CONFIG, epochs=40, batch_size=12, schedule="constant", prompt_lr=0.01, affine_lr=0.01
    )
    config = dataclasses.replace(config, early_stop=2)

    def trained(start=None, epochs=40):
        classifier, told, store, states = make_classifier(), Told(), MemoryStore(start), {}
        hooks = dataclasses.replace(
            told.hooks(store),
            on_epoch=lambda record: (
                told.epochs.append(record),
                states.__setitem__(record.epoch, state_of(classifier)),
            ),
        )
        history = train(
            classifier,
            images,
            Rising(images, good=4),
            config=dataclasses.replace(config, epochs=epochs, checkpoint_every=1),
            hooks=hooks,
        )
        return classifier, told, history, store, states

    classifier, told, history, store, states = trained()
    information = [record.mutual_information for record in told.epochs]
    best = max(range(len(information)), key=information.__getitem__) + 1
    assert 1 < best < len(information) == best + 2
    assert history.kept_epoch == best
    assert f"not risen for 2 epoch(s) since epoch {best}" in history.stopped
    assert f"after step {best + 2} of 40" in history.stopped
    assert_same_state(classifier, states[best])

    # The best state survives a kill: resumed after it, before the stop.
    again, _, resumed, _, _ = trained(store.saved[best])
    assert resumed == history
    assert_same_state(again, states[best])

    # The budget may end before the patience does: the best is kept all the same.
    classifier, _, history, _, states = trained(epochs=best + 1)
    assert history.stopped is None
    assert history.kept_epoch == best
    assert_same_state(classifier, states[best])
