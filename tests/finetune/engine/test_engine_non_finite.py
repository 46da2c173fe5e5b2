"""A loss or gradient that is not finite: it stops the run and never reaches the weights."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from engine_problem import (
    CONFIG,
    Breaking,
    MemoryStore,
    NanGradient,
    assert_same_state,
    infomax,
    make_classifier,
    state_of,
)

from ueo_fast.finetune.engine.hooks import Hooks
from ueo_fast.finetune.engine.objective import Objective
from ueo_fast.finetune.engine.trainer import NonFiniteLossError, train
from ueo_fast.finetune.methods import UEO
from ueo_fast.finetune.target import zero_shot_target
from ueo_fast.ranges import LARGEST_FACTOR


@pytest.mark.parametrize(
    ("spoil", "what"),
    [
        (lambda loss: loss * float("nan"), "the loss became nan"),
        (lambda loss: loss * float("inf"), "the loss became -?inf"),
        (NanGradient.apply, "the gradient became nan"),
        (lambda loss: loss * 1e36, "the gradient became .*e"),
    ],
    ids=["nan", "inf", "gradient", "huge gradient"],
)
def test_what_is_not_finite_never_reaches_the_weights(images, spoil, what):
    classifier, store, states = make_classifier(), MemoryStore(), []
    hooks = Hooks(on_step=lambda record: states.append(state_of(classifier)), checkpoints=store)
    objective = Breaking(infomax(images), 2, spoil)
    config = dataclasses.replace(CONFIG, momentum=0.9)
    with pytest.raises(NonFiniteLossError, match=what + r".* at step 3 of 6.*Lower the learning"):
        train(classifier, images, objective, config=config, hooks=hooks)
    assert len(states) == 2
    assert_same_state(classifier, states[-1])
    (checkpoint,) = store.saved
    assert checkpoint.step == 2
    assert torch.equal(checkpoint.tensors["adapted/prompt.context"], classifier.prompt.context)
    assert all(value.isfinite().all() for value in checkpoint.tensors.values())

    # What was saved is whole: a run with a loss that is in order goes on from there.
    healthy = Breaking(infomax(images), 100, spoil)
    hooks = Hooks(checkpoints=MemoryStore(checkpoint))
    assert len(train(make_classifier(), images, healthy, config=config, hooks=hooks)) == 6
    # And it leads where the run would have gone.
    expected = make_classifier()
    train(expected, images, Breaking(infomax(images), 100, spoil), config=config)
    resumed = make_classifier()
    train(resumed, images, Breaking(infomax(images), 100, spoil), config=config, hooks=hooks)
    assert_same_state(resumed, state_of(expected))


def test_a_nan_image_says_that_the_checkpoint_could_not_be_saved_either(images):
    class Full(MemoryStore):
        def save(self, checkpoint):
            raise OSError(28, "No space left on device")

    images[3] = math.nan
    with pytest.raises(NonFiniteLossError, match=r"no checkpoint of them could be saved.*No space"):
        train(
            make_classifier(),
            images,
            infomax(images),
            config=CONFIG,
            hooks=Hooks(checkpoints=Full()),
        )


@pytest.mark.parametrize("size", [1e14, 1e30])
@pytest.mark.parametrize("rate", ["prompt_lr", "affine_lr"])
def test_a_step_that_would_be_too_large_is_not_taken(images, rate, size):
    """The gradient is in order, and what the learning rate makes of it is not."""
    classifier, store = make_classifier(), MemoryStore()
    before = state_of(classifier)
    config = dataclasses.replace(CONFIG, **{rate: LARGEST_FACTOR})
    objective = Breaking(infomax(images), 0, lambda loss: loss * size)
    hooks = Hooks(checkpoints=store)
    with pytest.raises(NonFiniteLossError, match=r"the gradient became .* at step 1 "):
        train(classifier, images, objective, config=config, hooks=hooks)
    assert_same_state(classifier, before)
    assert classifier(images).cosines.isfinite().all()


@pytest.mark.parametrize("confidence", ["zeroshot", "online"])
def test_a_confidence_that_is_nan_stops_as_a_loss_that_is(images, confidence):
    """The loss refuses it before there is a value; the last good state is saved all the same."""
    images[3] = math.nan
    classifier, store = make_classifier(), MemoryStore()
    target = zero_shot_target(classifier, images)
    with pytest.raises(NonFiniteLossError, match=r"no longer finite \(confidence .*images for NaN"):
        UEO(confidence=confidence).adapt(
            classifier, target, config=CONFIG, hooks=Hooks(checkpoints=store)
        )
    (checkpoint,) = store.saved
    assert torch.equal(checkpoint.tensors["adapted/prompt.context"], classifier.prompt.context)


def test_a_refusal_of_finite_predictions_is_told_as_it_is(images):
    class Refusing(Objective):
        def forward(self, step):
            raise ValueError("eps is wrong")

    with pytest.raises(ValueError, match=r"^eps is wrong$"):
        train(make_classifier(), images, Refusing(), config=CONFIG)
