"""DANCE: neighbourhood clustering with its memory bank, and entropy separation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from tiny_problem import (
    check_gradients,
    make_classifier,
    make_images,
    random_features,
    random_step,
    step_of,
)

from ueo_fast.finetune.engine.trainer import TrainerConfig
from ueo_fast.finetune.methods import DANCE
from ueo_fast.finetune.target import Target, zero_shot_target

FEATURES = 6
IMAGES = 10


class Model:
    """As much of a classifier as the objective asks for: the width of the features."""

    def text_features(self):
        return torch.zeros(4, FEATURES)


def objective(method=None, images=IMAGES):
    return (method or DANCE()).objective(Model(), Target(torch.zeros(images, 3, 1, 1))).double()


def entropy(p, eps=0.0):
    return -sum(x * math.log(x + eps) for x in p if x > 0)


def softmax(z):
    e = np.exp(np.asarray(z) - max(z))
    return e / e.sum()


def by_hand(step, bank, *, temperature=0.05, margin=0.5, eps=0.0):
    """Every neighbour of every image, in loops; ``bank`` holds features by image."""
    f, w = step.image_features.numpy(), step.text_features.numpy()
    batch = step.positions.tolist()
    clustering = separation = 0.0
    for i in range(len(f)):
        neighbours = [*w]
        neighbours += [feature for image, feature in bank.items() if image not in batch]
        neighbours += [f[j] for j in range(len(f)) if j != i]
        clustering += entropy(softmax([f[i] @ v / temperature for v in neighbours]), eps)
        p = softmax(step.logits[i].numpy())
        distance = abs(entropy(p, eps) - math.log(len(p)) / 2)
        separation -= distance if distance > margin else 0.0
    return (clustering + separation) / len(f)


def test_the_first_batch_has_no_neighbours_but_the_classes_and_itself():
    step = random_step(torch.tensor([7, 2, 5]))
    assert float(objective()(step)) == pytest.approx(by_hand(step, {}), rel=1e-10)


@pytest.mark.parametrize("eps", [0.0, 1e-5])
@pytest.mark.parametrize(("temperature", "margin"), [(0.05, 0.5), (0.5, 0.1), (0.2, 0.0)])
def test_the_bank_holds_each_image_as_it_was_last_seen(temperature, margin, eps):
    found = objective(DANCE(temperature, margin, eps))
    bank = {}
    for seed, positions in enumerate([[7, 2, 5], [0, 9, 2], [5, 3], [2, 7, 0, 8], [4]]):
        step = random_step(torch.tensor(positions), seed=10 * seed)
        options = {"temperature": temperature, "margin": margin, "eps": eps}
        expected = by_hand(step, bank, **options)
        assert float(found(step)) == pytest.approx(expected, rel=1e-10), positions
        assert float(found(step)) == pytest.approx(expected, rel=1e-10), "forward changed the bank"
        with torch.no_grad():
            found.remember(step)
        bank |= dict(zip(positions, step.image_features.numpy(), strict=True))
    assert found.seen.tolist() == [image in bank for image in range(IMAGES)]
    assert not found.seen[[1, 6]].any()


def test_only_predictions_far_from_half_the_largest_entropy_are_separated():
    """Four classes: the middle is log 4 / 2 = 0.693, so below 0.193 and above 1.193 nats."""
    sure = [12.0, 0, 0, 0]
    middle = [9.0, 9.0, 0, 0]  # 0.693 nats
    unsure = [0.1, 0, 0, 0]
    logits = torch.tensor([sure, middle, unsure], dtype=torch.float64, requires_grad=True)
    step = random_step(torch.tensor([0, 1, 2]))._replace(logits=logits)
    whole, clustering = objective()(step), by_hand(step_without_separation(step), {}, margin=99)
    entropies = [entropy(softmax(row)) for row in (sure, middle, unsure)]
    expected = -(abs(entropies[0] - math.log(2)) + abs(entropies[2] - math.log(2))) / 3
    assert float(whole.detach()) - clustering == pytest.approx(expected, rel=1e-9)
    (gradient,) = torch.autograd.grad(whole, logits)
    assert torch.equal(gradient[1], torch.zeros(4, dtype=torch.float64))
    lower = (logits - 0.01 * gradient).softmax(dim=1).tolist()
    assert entropy(lower[0]) < entropies[0]
    assert entropy(lower[2]) > entropies[2]


def step_without_separation(step):
    return step._replace(logits=step.logits.detach())


def test_gradients():
    found = objective()
    found.remember(random_step(torch.tensor([1, 2, 3, 4, 5]), seed=3))
    check_gradients(found, torch.tensor([8, 3, 1, 9]))


def test_no_gradient_reaches_the_bank_and_none_is_nan():
    found = objective()
    images = random_features(3, seed=1).requires_grad_()
    positions = torch.tensor([0, 1, 2])
    step = step_of(images, random_features(4, seed=2), positions)
    with torch.no_grad():
        found.remember(step)
    assert not found.bank.requires_grad
    (gradient,) = torch.autograd.grad(found(step), images)
    assert gradient.isfinite().all()
    assert gradient.any()


def test_half_features_are_stored_normalised_and_compared_in_float32():
    found = DANCE().objective(Model(), Target(torch.zeros(IMAGES, 3, 1, 1)))
    step = random_step(torch.tensor([4, 6]))
    half = step._replace(
        image_features=step.image_features.bfloat16(),
        text_features=step.text_features.float(),
        logits=step.logits.bfloat16(),
    )
    found.remember(half)
    norms = found.bank[[4, 6]].norm(dim=1)
    torch.testing.assert_close(norms, torch.ones(2))
    loss = found(half)
    assert loss.dtype == torch.float32
    exact = step._replace(
        image_features=half.image_features.double(),
        text_features=half.text_features.double(),
        logits=half.logits.double(),
    )
    assert float(loss) == pytest.approx(by_hand(exact, {}), rel=1e-4)


def test_state_round_trips():
    first, second = objective(), objective()
    first.remember(random_step(torch.tensor([1, 2, 3]), seed=3))
    step = random_step(torch.tensor([8, 3, 9]))
    assert first(step) != second(step)
    second.load_state_dict(first.state_dict())
    assert first(step) == second(step)


def test_refuses_what_makes_no_sense():
    with pytest.raises(ValueError, match=r"temperature must be from 1e-30 .*, got 0"):
        DANCE(temperature=0)
    with pytest.raises(ValueError, match=r"margin must be 0 or from .*, got -1"):
        DANCE(margin=-1)


def test_every_image_is_in_the_bank_after_an_epoch(monkeypatch):
    classifier = make_classifier()
    target = zero_shot_target(classifier, make_images(11))
    method = DANCE()
    made = method.objective(classifier, target)
    monkeypatch.setattr(DANCE, "objective", lambda *_: made)
    config = TrainerConfig(epochs=1, batch_size=4, prompt_lr=0.0, affine_lr=1e-12)
    history = method.adapt(classifier, target, config=config)
    assert len(history) == 3
    assert made.seen.all()
    with torch.no_grad():
        features = classifier.image_features(target.images)
    torch.testing.assert_close(made.bank, features, rtol=1e-4, atol=1e-5)
