"""POUF: transport in both directions plus mutual information."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from tiny_problem import check_gradients, make_classifier, make_images, random_step

from ueo_fast.finetune.engine.trainer import TrainerConfig
from ueo_fast.finetune.methods import POUF
from ueo_fast.finetune.target import Target, zero_shot_target


def objective(method=None):
    return (method or POUF()).objective(make_classifier("vit"), Target(make_images(2)))


def by_hand(step, weight, eps=0.0):
    """Both transport costs and the mutual information, with explicit loops."""
    logits, cosines = step.logits.numpy(), step.cosines.numpy()
    rows, classes = logits.shape
    p = np.empty_like(logits)
    for i in range(rows):
        p[i] = np.exp(logits[i]) / sum(math.exp(z) for z in logits[i])
    to_classes = (
        sum(p[i, c] * (1 - cosines[i, c]) for i in range(rows) for c in range(classes)) / rows
    )
    to_images = 0.0
    for c in range(classes):
        total = sum(math.exp(logits[i, c]) for i in range(rows))
        for i in range(rows):
            to_images += math.exp(logits[i, c]) / total * (1 - cosines[i, c])
    to_images /= classes
    conditional = -sum(x * math.log(x + eps) for x in p.ravel()) / rows
    marginal = -sum(x * math.log(x + eps) for x in p.mean(axis=0))
    return to_classes + to_images - weight * (marginal - conditional)


@pytest.mark.parametrize("eps", [0.0, 1e-5])
@pytest.mark.parametrize("weight", [0.0, 0.3, 2.0])
@pytest.mark.parametrize(("rows", "classes"), [(7, 4), (1, 3), (5, 1), (3, 9)])
def test_loss_equals_the_equations(rows, classes, weight, eps):
    step = random_step(torch.arange(rows), classes=classes)
    found = float(objective(POUF(weight, eps))(step))
    assert found == pytest.approx(by_hand(step, weight, eps), rel=1e-12, abs=1e-14)


def test_the_weight_is_the_paper_s():
    step = random_step(torch.arange(6))
    assert float(objective()(step)) == pytest.approx(by_hand(step, 0.3), rel=1e-12)


def test_features_on_their_own_prototype_cost_nothing():
    """A sharp, even, perfect assignment: no cost, and the most information, log C."""
    cosines = torch.eye(3, dtype=torch.float64).repeat(2, 1)
    step = random_step(torch.arange(6), classes=3)._replace(cosines=cosines, logits=100 * cosines)
    assert float(objective()(step)) == pytest.approx(-0.3 * math.log(3), abs=1e-9)


def test_gradients():
    check_gradients(objective(), torch.arange(5))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    step = random_step(torch.arange(6))
    half = step._replace(cosines=step.cosines.to(dtype), logits=step.logits.to(dtype))
    exact = half._replace(cosines=half.cosines.double(), logits=half.logits.double())
    found = objective()(half)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), objective()(exact), rtol=1e-5, atol=1e-6)


def test_training_lowers_the_cost():
    classifier = make_classifier()
    target = zero_shot_target(classifier, make_images(12))
    config = TrainerConfig(epochs=8, batch_size=12, prompt_lr=0.05, affine_lr=0.05)
    history = POUF().adapt(classifier, target, config=config)
    assert history.loss[-1] < history.loss[0]
