"""The collapse monitor: what it warns of, what it leaves alone, and what it is told."""

from __future__ import annotations

import math

import pytest
import torch
from engine_problem import (
    CONFIG,
    make_classifier,
    make_images,
)

from ueo_fast.finetune.engine.monitor import (
    CollapseMonitor,
    StepStatistics,
    Totals,
    entropy,
    measure,
    totals_of,
)
from ueo_fast.finetune.methods import EntMin, InfoMax
from ueo_fast.finetune.target import zero_shot_target


def predicted(counts, certainty=1.0):
    """Statistics of a batch with ``counts`` images per class, predicted with ``certainty``."""
    counts = torch.tensor(counts)
    images, classes = int(counts.sum()), len(counts)
    p = counts.double() * certainty + (1 - certainty) * images / classes
    return StepStatistics(0.0, 0.0, 0.0, p, counts)


def totals(counts, certainty=1.0):
    sums = Totals(len(counts))
    sums.add(predicted(counts, certainty))
    return sums


def monitor(start, classes=None, **options):
    names = [f"class {index}" for index in range(classes or len(start))]
    return CollapseMonitor(names, sum(start), start=totals(start), **options)


def test_a_collapse_into_one_class_is_told_once_until_recovered():
    watch = monitor([25, 25, 25, 25])
    assert watch.epoch(totals([20, 30, 25, 25])) == []
    assert not watch.collapsed
    warnings = watch.epoch(totals([0, 99, 1, 0]))
    assert len(warnings) == 2
    assert "marginal entropy is 0.056 nats, and was 1.386 at the start" in warnings[0]
    assert "99.0% of the images are taken for 'class 1'" in warnings[1]
    assert "the largest class had 25.0%; lower the learning rates" in warnings[1]
    assert watch.epoch(totals([0, 100, 0, 0])) == []
    assert watch.collapsed
    assert watch.epoch(totals([20, 40, 20, 20])) == []
    assert not watch.collapsed
    assert len(watch.epoch(totals([0, 0, 0, 100]))) == 2


def test_a_slight_recovery_does_not_make_it_warn_again():
    watch = monitor([50, 50])
    assert len(watch.epoch(totals([98, 2]))) == 2
    for counts in ([94, 6], [98, 2], [93, 7]):
        assert watch.epoch(totals(counts)) == []


def test_a_collapse_into_few_of_many_classes_is_told():
    watch = monitor([10] * 65)
    warnings = watch.epoch(totals([300, 350] + [0] * 63))
    assert len(warnings) == 1
    assert "collapsing into few classes" in warnings[0]


@pytest.mark.parametrize(
    ("start", "now"),
    [
        ([70, 30], [95, 5]),  # two classes, which the target has in such shares
        ([960, 40], [980, 20]),  # one class has nearly all images from the start
        ([100, 0], [100, 0]),
        ([0, 100, 0], [3, 97, 0]),
        ([10] * 65, [20] * 25 + [0] * 40),  # partial: not all known classes are there
        ([5, 3, 2], [10, 0, 0]),  # ten images prove nothing
        ([100], [100]),  # one class
    ],
)
def test_it_does_not_cry_wolf(start, now):
    watch = monitor(start)
    assert watch.epoch(totals(now)) == []
    assert not watch.collapsed


def test_predictions_that_become_certain_are_no_collapse():
    watch = CollapseMonitor(["a"] * 10, 1000, start=totals([100] * 10, certainty=0.05))
    assert watch.epoch(totals([100] * 10)) == []


def test_without_zero_shot_predictions_the_first_epoch_is_the_start():
    watch = CollapseMonitor(["a", "b", "c"], 90)
    assert watch.epoch(totals([30, 30, 30])) == []
    assert len(watch.epoch(totals([90, 0, 0]))) == 2
    watch = CollapseMonitor(["a", "b", "c"], 90)
    assert watch.epoch(totals([90, 0, 0])) == []
    assert watch.epoch(totals([90, 0, 0])) == []


def test_in_long_epochs_a_window_is_enough():
    watch = CollapseMonitor(["a", "b"], 100_000)
    for _ in range(32):
        assert watch.step(predicted([32, 32])) == []
    told = [watch.step(predicted([64, 0])) for _ in range(16)]
    assert [len(warnings) for warnings in told] == [0] * 15 + [2]
    assert watch.epoch(totals([100_000, 0])) == []


def test_a_stream_in_its_own_order_is_judged_as_a_whole():
    """Sorted by class, each window is of one class."""
    watch = CollapseMonitor(["a", "b"], 100_000, shuffled=False, start=totals([500, 500]))
    for _ in range(100):
        assert watch.step(predicted([64, 0])) == []
    assert watch.epoch(totals([50_000, 50_000])) == []
    assert len(watch.epoch(totals([100_000, 0]))) == 2


def test_its_state_goes_into_a_checkpoint_and_back():
    def feed(watch, steps):
        return [watch.step(predicted(counts)) for counts in steps]

    steps = [[32, 32]] * 30 + [[64, 0]] * 70
    whole = CollapseMonitor(["a", "b"], 100_000)
    expected = feed(whole, steps)
    assert sum(len(warnings) for warnings in expected) == 2
    for cut in (0, 1, 20, 50, 99):
        first, second = (CollapseMonitor(["a", "b"], 100_000) for _ in range(2))
        found = feed(first, steps[:cut])
        second.load(*first.state())
        assert found + feed(second, steps[cut:]) == expected


def test_statistics_of_a_step_are_those_of_its_softmax():
    logits = torch.randn(50, 7, generator=torch.Generator().manual_seed(0)) * 3
    gradients = [torch.tensor([0.5, -3.0]), torch.tensor([[1.0]])]
    found = measure(torch.tensor(1.25), logits, gradients)
    p = logits.double().softmax(dim=1)
    assert found.loss == 1.25
    assert found.largest_gradient == 3.0
    assert found.images == 50
    assert found.conditional_entropy == pytest.approx(-(p * p.log()).sum(1).mean().item(), rel=1e-5)
    assert found.marginal_entropy == pytest.approx(-(p.mean(0) * p.mean(0).log()).sum().item())
    assert found.histogram.tolist() == p.argmax(dim=1).bincount(minlength=7).tolist()
    assert found.largest_share == int(found.histogram.max()) / 50
    zero_shot = totals_of(logits / 100, 100.0)
    assert zero_shot.marginal_entropy == pytest.approx(found.marginal_entropy, rel=1e-5)
    assert zero_shot.histogram.tolist() == found.histogram.tolist()
    for bad in (math.nan, math.inf):
        value = measure(torch.tensor(0.0), logits, [torch.tensor([1.0, bad])]).largest_gradient
        assert not math.isfinite(value)
    assert entropy(torch.tensor([2.0, 2.0, 0.0])) == pytest.approx(math.log(2))


def test_the_monitor_hears_of_the_zero_shot_predictions(monkeypatch):
    """EntMin collapses; LossMethod hands over what it is compared with."""
    starts = []
    init = CollapseMonitor.__init__

    def spied(self, *args, **options):
        starts.append(options["start"])
        init(self, *args, **options)

    monkeypatch.setattr(CollapseMonitor, "__init__", spied)
    images, classifier = make_images(), make_classifier()
    target = zero_shot_target(classifier, images)
    for method in (EntMin(), InfoMax()):
        method.adapt(classifier, target, config=CONFIG)
    p = (classifier.logit_scale * target.cosines).double().softmax(dim=1)
    for start in starts:
        torch.testing.assert_close(start.probabilities, p.sum(dim=0), rtol=1e-5, atol=1e-6)


def test_zero_shot_predictions_are_summed_in_parts(monkeypatch):
    """In double the cosines of half a million images would be gigabytes."""
    cosines = torch.rand(50, 7, generator=torch.Generator().manual_seed(0))
    whole = totals_of(cosines, 10.0)
    monkeypatch.setattr("ueo_fast.finetune.engine.monitor._ROWS", 8)
    parts = totals_of(cosines, 10.0)
    assert parts.images == whole.images == 50
    assert parts.histogram.tolist() == whole.histogram.tolist()
    torch.testing.assert_close(parts.probabilities, whole.probabilities)
    assert parts.record(0).conditional_entropy == pytest.approx(whole.record(0).conditional_entropy)
