"""The oracle: UEO with the truth for a confidence."""

from __future__ import annotations

import pytest
import torch
from tiny_problem import check_gradients, make_classifier, make_images, random_step

from ueo_fast import ueo_loss
from ueo_fast.finetune.engine.trainer import TrainerConfig
from ueo_fast.finetune.methods import Oracle
from ueo_fast.finetune.target import Target, zero_shot_target

LABELS = torch.tensor([0, -1, 2, 1, 3, -1, 0, 7, 1, 2])  # 3 and 7: classes that are not known
WEIGHTS = [1.001, 0.001, 1.001, 1.001, 0.001, 0.001, 1.001, 0.001, 1.001, 1.001]


def objective(method=None):
    return (method or Oracle()).objective(
        make_classifier("vit"), Target(make_images(10), labels=LABELS)
    )


@pytest.mark.parametrize(("trade_off", "eps"), [(1.0, 0.0), (0.5, 1e-5)])
def test_loss_is_that_of_ueo_with_the_truth_as_weight(trade_off, eps):
    positions = torch.tensor([4, 0, 9, 1, 7, 3])
    step = random_step(positions, classes=3)
    w = torch.tensor([WEIGHTS[i] for i in positions.tolist()], dtype=torch.float64)
    found = objective(Oracle(trade_off, eps)).double()(step)
    expected = ueo_loss(step.logits, w, trade_off=trade_off, eps=eps, backend="reference")
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)  # weights are float32
    p = step.logits.softmax(dim=1)
    rows = -(p * (p + eps).log()).sum(dim=1)
    mean = (p / w[:, None]).sum(dim=0) / (1 / w).sum()
    by_hand = (w * rows).sum() / w.sum() + trade_off * (mean * (mean + eps).log()).sum()
    torch.testing.assert_close(found, by_hand, rtol=1e-6, atol=1e-7)


def test_gradients():
    check_gradients(objective(), torch.tensor([4, 0, 9, 1]), classes=3)


def test_state_round_trips():
    first = objective()
    second = Oracle().objective(make_classifier("vit"), Target(make_images(10), labels=0 * LABELS))
    step = random_step(torch.tensor([1, 2, 3]), classes=3)
    assert first(step) != second(step)
    second.load_state_dict(first.state_dict())
    assert first(step) == second(step)


def test_needs_labels():
    with pytest.raises(ValueError, match=r"labels is None.*class folders.*method 'ueo'"):
        Oracle().objective(make_classifier("vit"), Target(make_images(2)))


def test_adapts():
    classifier = make_classifier()
    images = make_images(10)
    target = zero_shot_target(classifier, images, labels=LABELS)
    config = TrainerConfig(epochs=4, batch_size=10, prompt_lr=0.05, affine_lr=0.05)
    history = Oracle().adapt(classifier, target, config=config)
    assert history.loss[-1] < history.loss[0]
