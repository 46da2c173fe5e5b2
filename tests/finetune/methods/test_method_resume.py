"""What a method remembers between batches survives a kill: the resumed run ends the same."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tiny_problem import make_classifier, make_images

from ueo_fast.finetune.engine.hooks import Checkpoint, Hooks
from ueo_fast.finetune.engine.trainer import TrainerConfig
from ueo_fast.finetune.methods import DANCE, METHODS, POUF, UEO, UPL, Oracle, Tent
from ueo_fast.finetune.methods.base import choices_of
from ueo_fast.finetune.target import zero_shot_target

CONFIG = TrainerConfig(
    epochs=2, batch_size=4, prompt_lr=0.05, affine_lr=0.05, checkpoint_every=1, seed=3
)
LABELS = torch.arange(14) % 5 - 1


class Memory:
    """Checkpoints that live as long as the test."""

    checkpoint: Checkpoint | None = None

    def load(self):
        return self.checkpoint

    def save(self, checkpoint):
        self.checkpoint = checkpoint


def run(method, store=None, killed_after=None):
    classifier = make_classifier()
    target = zero_shot_target(classifier, make_images(14), labels=LABELS)
    done = []

    def on_step(record):
        if len(done) == killed_after:
            raise KeyboardInterrupt
        done.append(record.step)

    hooks = Hooks(on_step=on_step, checkpoints=store)
    history = method.adapt(classifier, target, config=CONFIG, hooks=hooks)
    return classifier.state_dict(), history, done


@pytest.mark.parametrize(
    "method",
    [UEO(), UEO(confidence="online"), UPL(k=6), POUF(), DANCE(), Tent(), Oracle()],
    ids=lambda method: f"{method.name}-{getattr(method, 'confidence', '')}",
)
@pytest.mark.parametrize("killed_after", [1, 2])
def test_a_resumed_run_ends_as_an_uninterrupted_one(method, killed_after):
    expected, whole, steps = run(method)
    assert len(steps) > killed_after
    store = Memory()
    with pytest.raises(KeyboardInterrupt):
        run(method, store, killed_after)
    state, history, resumed = run(method, store)
    assert resumed == steps[killed_after:]
    assert history == whole
    for name, value in expected.items():
        assert torch.equal(state[name], value), name
    if isinstance(method, Tent):
        assert not history.online.isnan().any()
        assert torch.equal(history.online, whole.online)
    else:
        assert history.online is None


def test_what_a_method_remembers_matters_here():
    """A bank that is lost on the way changes the end of the run, so the test above can fail."""
    expected, _, _ = run(DANCE())
    store = Memory()
    with pytest.raises(KeyboardInterrupt):
        run(DANCE(), store, killed_after=2)
    tensors = dict(store.checkpoint.tensors)
    tensors["objective/seen"] = torch.zeros_like(tensors["objective/seen"])
    store.checkpoint = dataclasses.replace(store.checkpoint, tensors=tensors)
    state, _, _ = run(DANCE(), store)
    assert any(not torch.equal(state[name], value) for name, value in expected.items())


def test_every_method_with_a_memory_is_tested():
    """A new method whose objective has buffers belongs into the list above."""
    classifier = make_classifier()
    target = zero_shot_target(classifier, make_images(14), labels=LABELS)
    stateful = {
        name
        for name, method in METHODS.items()
        if hasattr(method, "objective") and method().objective(classifier, target).state_dict()
    }
    assert stateful == {"ueo", "upl", "dance", "tent", "oracle"}


@pytest.mark.parametrize(
    ("method", "other", "message"),
    [
        (UEO(), UEO(trade_off=0.5), "choices='trade_off=1.0, .* has choices='trade_off=0.5, "),
        (Tent(), Tent(eps=1e-5), "choices='eps=0.0', and this one has choices='eps=1e-05'"),
    ],
    ids=["loss method", "tent"],
)
def test_a_run_does_not_go_on_with_other_choices_of_the_method(method, other, message):
    store = Memory()
    with pytest.raises(KeyboardInterrupt):
        run(method, store, killed_after=1)
    with pytest.raises(ValueError, match=message):
        run(other, store)


def test_choices_are_the_same_in_another_process():
    """Options that are objects have an address in their repr, so they are left out."""

    @dataclasses.dataclass(frozen=True)
    class Own(UEO):
        helper: object = dataclasses.field(default_factory=object)

    assert choices_of(Own()) == choices_of(UEO())
    assert "mcm_scale=1.0" in choices_of(UEO())
