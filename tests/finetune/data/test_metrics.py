"""Metrics against scikit-learn, against hand computation, and at their edges."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from ueo_fast.finetune.evaluation.metrics import (
    compute_metrics,
    detection_metrics,
    harmonic_mean,
)

skm = pytest.importorskip("sklearn.metrics")


def random_test_set(seed: int, n: int = 400, classes: int = 7) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(-1, classes, (n,), generator=generator)
    cosines = torch.randn(n, classes, generator=generator) * 0.1
    known = labels >= 0
    cosines[known, labels[known]] += 0.1
    return cosines, labels


def sklearn_detection(scores: np.ndarray, is_known: np.ndarray) -> tuple[float, float, float]:
    fpr, tpr, _ = skm.roc_curve(is_known, scores, drop_intermediate=False)
    return (
        skm.roc_auc_score(is_known, scores),
        skm.average_precision_score(is_known, scores),
        fpr[tpr >= 0.95].min(),
    )


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("mcm_scale", [1.0, 100.0])
def test_against_scikit_learn(seed: int, mcm_scale: float) -> None:
    cosines, labels = random_test_set(seed)
    metrics = compute_metrics(cosines.double(), labels, mcm_scale=mcm_scale)
    known = (labels >= 0).numpy()
    predicted = cosines.argmax(dim=1).numpy()
    scores = torch.softmax(mcm_scale * cosines.double(), dim=1).amax(dim=1).numpy()
    truth = labels.numpy()
    assert metrics.accuracy == pytest.approx(skm.accuracy_score(truth[known], predicted[known]))
    balanced = skm.balanced_accuracy_score(truth[known], predicted[known])
    assert metrics.per_class_accuracy == pytest.approx(balanced)
    expected = sklearn_detection(scores, known)
    assert (metrics.auroc, metrics.aupr, metrics.fpr95) == pytest.approx(expected, abs=1e-6)
    assert metrics.known_images == known.sum()
    assert metrics.unknown_images == (~known).sum()
    assert metrics.missing_classes == ()


@pytest.mark.parametrize("levels", [1, 2, 5, 20])
def test_ties_against_scikit_learn(levels: int) -> None:
    generator = torch.Generator().manual_seed(levels)
    scores = torch.randint(0, levels, (500,), generator=generator) / 7
    is_known = torch.rand(500, generator=generator) < 0.3
    expected = sklearn_detection(scores.numpy(), is_known.numpy())
    assert detection_metrics(scores, is_known) == pytest.approx(expected, abs=1e-6)


def test_detection_by_hand() -> None:
    """Known 0.9 0.8 0.4, unknown 0.7 0.4: of the six pairs four are right, one a tie, one wrong."""
    scores = torch.tensor([0.9, 0.8, 0.4, 0.7, 0.4])
    is_known = torch.tensor([True, True, True, False, False])
    auroc, aupr, fpr95 = detection_metrics(scores, is_known)
    assert auroc == pytest.approx((4 + 0.5) / 6)
    # Precision at each threshold that adds known images: 1/1, 2/2, then 3/5 for the tie.
    assert aupr == pytest.approx((1 + 1 + 3 / 5) / 3)
    assert fpr95 == 1.0


def test_known_are_the_positive_class() -> None:
    scores = torch.tensor([0.9, 0.8, 0.7, 0.2])
    is_known = torch.tensor([True, True, True, False])
    assert detection_metrics(scores, is_known) == (1.0, 1.0, 0.0)
    auroc, aupr, fpr95 = detection_metrics(-scores, is_known)
    assert auroc == 0.0
    assert aupr == pytest.approx((1 / 2 + 2 / 3 + 3 / 4) / 3)
    assert fpr95 == 1.0


@pytest.mark.parametrize(("known", "expected"), [(20, 0.25), (21, 0.25), (19, 0.5)])
def test_fpr95_needs_at_least_95_percent_exactly(known: int, expected: float) -> None:
    """With 20 known images one may be lost (19 / 20 is 0.95 exactly), with 19 none."""
    # Known scores rank above three unknown images, but for the last: that is below one more.
    scores = torch.cat([torch.linspace(0.9, 0.8, known - 1), torch.tensor([0.3])])
    unknown = torch.tensor([0.95, 0.5, 0.2, 0.1])
    is_known = torch.arange(known + 4) < known
    assert detection_metrics(torch.cat([scores, unknown]), is_known)[2] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("seed", "levels", "expected"),
    [
        (1, 1, (0.5, 0.3140000104904175, 1.0)),
        (2, 3, (0.4764256477355957, 0.30148983001708984, 1.0)),
        (3, 20, (0.4810512661933899, 0.28695911169052124, 1.0)),
        (5, 0, (0.6133314371109009, 0.476349413394928, 0.8599348664283752)),
    ],
)
def test_detection_is_what_torchmetrics_computed(
    seed: int, levels: int, expected: tuple[float, float, float]
) -> None:
    """In float32, with ties and infinite scores: runs of both versions can be compared."""
    generator = torch.Generator().manual_seed(seed)
    if levels:
        scores = torch.randint(0, levels, (500,), generator=generator) / 7
    else:
        scores = torch.randn(500, generator=generator).double() * 100
    is_known = torch.rand(500, generator=generator) < 0.3
    if not levels:
        scores = scores + 60 * is_known
        scores[:5], scores[5:9] = math.inf, -math.inf
    assert detection_metrics(scores, is_known) == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize("shift", [-1e4, 0.0, 50.0, 1e4])
def test_only_the_order_of_the_scores_matters(shift: float) -> None:
    cosines, labels = random_test_set(0)
    scores = cosines.double().amax(dim=1)
    expected = sklearn_detection(scores.numpy(), (labels >= 0).numpy())
    assert detection_metrics(scores + shift, labels >= 0) == pytest.approx(expected, abs=1e-6)


def test_accuracies_by_hand() -> None:
    """Four known classes, two without images; two unknown images do not count."""
    predictions = torch.tensor([0, 0, 1, 1, 3, 0, 2])
    labels = torch.tensor([0, 0, 0, 1, 1, -1, -1])
    heights = torch.tensor([0.5, 0.4, 0.3, 0.2, 0.1, 0.35, 0.05])  # MCM rises with them
    metrics = compute_metrics(
        torch.nn.functional.one_hot(predictions, 4) * heights[:, None], labels
    )
    assert metrics.class_accuracies == (pytest.approx(2 / 3), 0.5, None, None)
    assert metrics.per_class_accuracy == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert metrics.accuracy == pytest.approx(3 / 5)
    assert metrics.missing_classes == (2, 3)
    assert metrics.auroc == pytest.approx(7 / 10)  # 2 of 5 known images beat 0.35, 5 beat 0.05
    assert metrics.hm == pytest.approx(2 / (1 / metrics.per_class_accuracy + 10 / 7))


def test_a_class_that_is_only_predicted_does_not_lower_the_mean() -> None:
    cosines = torch.tensor([[0.9, 0.1, 0.0], [0.1, 0.9, 0.0], [0.1, 0.2, 0.3]])
    metrics = compute_metrics(cosines, torch.tensor([0, 1, -1]))
    assert metrics.per_class_accuracy == 1.0
    assert metrics.missing_classes == (2,)


def test_labels_at_or_above_the_number_of_classes_are_unknown_as_in_the_authors_code() -> None:
    cosines, labels = random_test_set(1)
    unknown = labels == -1
    other = labels.clone()
    other[unknown] = 7 + torch.arange(int(unknown.sum())) % 3
    assert compute_metrics(cosines, other) == compute_metrics(cosines, labels)


def test_unsigned_labels_are_measured_as_signed_ones_are() -> None:
    cosines, labels = random_test_set(1)
    labels[labels == -1] = 255
    expected = compute_metrics(cosines, labels)
    assert expected.unknown_images > 0
    assert compute_metrics(cosines, labels.to(torch.uint8)) == expected


def test_without_unknown_images_detection_is_none() -> None:
    cosines, labels = random_test_set(2)
    known = labels >= 0
    metrics = compute_metrics(cosines[known], labels[known])
    assert metrics.auroc is metrics.aupr is metrics.fpr95 is metrics.hm is None
    assert metrics.unknown_images == 0
    assert 0 < metrics.accuracy < 1


def test_one_known_class() -> None:
    metrics = compute_metrics(torch.tensor([[0.3], [0.2]]), torch.tensor([0, -1]))
    assert (metrics.per_class_accuracy, metrics.accuracy, metrics.auroc) == (1.0, 1.0, 0.5)


def test_mcm_scale_changes_the_ranking() -> None:
    """A peaked row among many small cosines, against two close winners: the scale decides."""
    peaked = torch.tensor([0.30, 0.05, 0.05, 0.05])
    close = torch.tensor([0.30, 0.28, -0.9, -0.9])
    cosines, labels = torch.stack([peaked, close]), torch.tensor([0, -1])
    assert compute_metrics(cosines, labels, mcm_scale=1.0).auroc == 0.0
    assert compute_metrics(cosines, labels, mcm_scale=100.0).auroc == 1.0


def test_as_dict_is_plain_json() -> None:
    predictions = torch.tensor([0, 1])
    cosines = torch.nn.functional.one_hot(predictions, 3) * 0.3
    values = compute_metrics(cosines, torch.tensor([0, 0])).as_dict()
    assert json.loads(json.dumps(values, allow_nan=False)) == {
        "per_class_accuracy": 0.5,
        "accuracy": 0.5,
        "auroc": None,
        "aupr": None,
        "fpr95": None,
        "hm": None,
        "class_accuracies": [0.5, None, None],
        "missing_classes": [1, 2],
        "known_images": 2,
        "unknown_images": 0,
        "positive_class": "known",
    }


def test_metrics_are_frozen() -> None:
    metrics = compute_metrics(torch.tensor([[0.3, 0.1]]), torch.tensor([0]))
    with pytest.raises(dataclasses.FrozenInstanceError):
        metrics.hm = 1.0  # type: ignore[misc]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_and_gradients_are_accepted(dtype: torch.dtype) -> None:
    cosines, labels = random_test_set(3)
    cosines = cosines.to(dtype).requires_grad_()
    metrics = compute_metrics(cosines, labels.int())
    expected = compute_metrics(cosines.detach().double(), labels)
    assert metrics.accuracy == expected.accuracy
    assert metrics.auroc == pytest.approx(expected.auroc, abs=1e-4)


def test_single_precision_cosines_are_ranked_as_in_double() -> None:
    """At scale 1 and with many classes the MCM scores of a test set lie close together."""
    cosines, labels = random_test_set(5, n=3000, classes=345)
    cosines = 0.2 + 0.001 * cosines
    assert compute_metrics(cosines, labels) == compute_metrics(cosines.double(), labels)


def test_harmonic_mean() -> None:
    assert harmonic_mean(0.5, 1.0) == pytest.approx(2 / 3)
    assert harmonic_mean(0.0, 0.0) == 0.0
    assert harmonic_mean(0.0, 1.0) == 0.0


GOOD = torch.tensor([[0.3, 0.1], [0.1, 0.3]])


@pytest.mark.parametrize(
    ("cosines", "labels", "message"),
    [
        (GOOD[0], torch.tensor([0, 1]), r"cosines has shape \(2,\) and labels \(2,\); expected"),
        (GOOD, torch.tensor([0, 1, 1]), r"cosines has shape \(2, 2\) and labels \(3,\)"),
        (GOOD[:, :0], torch.tensor([0, 1]), r"cosines has shape \(2, 0\).*C >= 1"),
        (GOOD, torch.tensor([0.0, 1.0]), "labels has dtype torch.float32; expected integer"),
        (GOOD, torch.tensor([True, False]), "labels has dtype torch.bool"),
        (GOOD, torch.tensor([0, -2]), r"labels has -2; expected 0\.\.1 .* -1 for an unknown"),
        (GOOD * math.nan, torch.tensor([0, 1]), "cosines has 2 of 2 rows that are not finite"),
        (GOOD / torch.tensor([1.0, 0.0]), torch.tensor([0, 1]), "not finite; the model diverged"),
        (GOOD, torch.tensor([-1, 5]), r"none of the 2 labels is a known class \(0\.\.1\)"),
        (GOOD[:0], torch.tensor([], dtype=torch.long), "none of the 0 labels is a known class"),
    ],
)
def test_what_cannot_be_measured_is_refused(cosines: Tensor, labels: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compute_metrics(cosines, labels)


def test_detection_arguments_are_checked() -> None:
    scores = torch.tensor([0.1, math.nan])
    with pytest.raises(ValueError, match="scores has 1 NaN; none can be ranked"):
        detection_metrics(scores, torch.tensor([True, False]))
    for known in (True, False):
        with pytest.raises(ValueError, match=rf"is_known marks {2 * known} of 2 images"):
            detection_metrics(torch.tensor([0.1, 0.2]), torch.tensor([known, known]))
    with pytest.raises(ValueError, match=r"scores has shape \(2,\) and is_known \(3,\)"):
        detection_metrics(torch.zeros(2), torch.tensor([True, False, True]))
