"""Thresholds against independent computations, and at their edges."""

from __future__ import annotations

import math
import sys
import warnings
from fractions import Fraction

import numpy as np
import pytest
import torch

from ueo_fast.finetune.evaluation.metrics import detection_metrics
from ueo_fast.finetune.scoring import thresholds
from ueo_fast.finetune.scoring.thresholds import (
    Threshold,
    choose_threshold,
    lowest_known,
    parse_threshold,
)


def two_groups(seed: int, count: int = 300, apart: float = 6.0) -> np.ndarray:
    """Scores as MCM at scale 1 with 65 classes has them: they differ in the fourth digit."""
    generator = np.random.default_rng(seed)
    upper = generator.random(count) < 0.6
    return 1 / 65 + 1e-5 * (20 + generator.normal(size=count) + apart * upper)


def brute_force_otsu(scores: np.ndarray) -> tuple[float, float]:
    """Largest between-class variance over all splits, in exact arithmetic, and its gap's ends."""
    values = sorted(map(Fraction, scores.tolist()))
    best = (Fraction(-1), values[0], values[0])
    for i in range(1, len(values)):
        if values[i] == values[i - 1]:
            continue
        low, high = values[:i], values[i:]
        distance = sum(high) / len(high) - sum(low) / len(low)
        variance = distance**2 * len(low) * len(high)
        if variance > best[0]:
            best = (variance, values[i - 1], values[i])
    return float(best[1]), float(best[2])


@pytest.mark.parametrize("seed", range(4))
def test_otsu_is_the_best_of_all_splits(seed):
    scores = two_groups(seed, count=120, apart=float(seed))
    low, high = brute_force_otsu(scores)
    assert choose_threshold("otsu", scores) == pytest.approx((low + high) / 2, rel=1e-15)


def test_otsu_takes_the_lowest_of_equally_good_gaps():
    assert choose_threshold("otsu", [0.0, 0.5, 1.0]) == 0.25


def test_otsu_of_many_scores_lies_between_the_groups():
    scores = two_groups(0, count=300_000)
    upper = scores > 1 / 65 + 23e-5  # the middle of the two groups
    threshold = choose_threshold("otsu", scores)
    assert threshold == pytest.approx((scores[upper].mean() + scores[~upper].mean()) / 2, abs=1e-7)


def test_otsu_with_ties_and_unequal_groups():
    scores = [0.1] * 50 + [0.2] + [0.9] * 3
    low, high = brute_force_otsu(np.array(scores))
    assert (low, high) == (0.2, 0.9)
    assert choose_threshold("otsu", scores) == pytest.approx(0.55)
    # Neighbouring doubles have nothing between them: the upper one is the threshold.
    one = 0.5
    next_one = math.nextafter(one, 1)
    assert choose_threshold("otsu", [one, next_one]) == next_one


@pytest.mark.parametrize("seed", range(4))
def test_gmm_threshold_has_posterior_one_half(seed):
    mixture = pytest.importorskip("sklearn.mixture")
    scores = two_groups(seed, count=2000)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        threshold = choose_threshold("gmm", scores)
    # In other units, where the fit's floor for variances has no say.
    scaled = ((scores - 1 / 65) * 1e5)[:, None]
    fitted = mixture.GaussianMixture(2, random_state=7, n_init=5, tol=1e-8, max_iter=5000)
    fitted.fit(scaled)
    upper = int(fitted.means_.argmax())
    point = (threshold - 1 / 65) * 1e5
    assert fitted.predict_proba([[point]])[0, upper] == pytest.approx(0.5, abs=0.01)
    # The groups were made around 20 and 26 with spread 1: both methods find the gap.
    assert 22 < point < 24
    otsu = (choose_threshold("otsu", scores) - 1 / 65) * 1e5
    assert point == pytest.approx(otsu, abs=0.5)


def test_gmm_of_many_scores_uses_quantiles(monkeypatch):
    pytest.importorskip("sklearn")
    scores = two_groups(0, count=40_000)
    exact = choose_threshold("gmm", scores)
    monkeypatch.setattr(thresholds, "MIXTURE_POINTS", 4000)
    coarse = choose_threshold("gmm", scores)
    assert coarse != exact
    assert (coarse - exact) / 1e-5 == pytest.approx(0, abs=0.02)  # of groups with spread 1


def test_gmm_says_when_groups_overlap_or_lie_within_each_other():
    pytest.importorskip("sklearn")
    with pytest.warns(UserWarning, match=r"overlap \(Ashman's D = 1\.\d\d; .* tpr95 with labelled"):
        choose_threshold("gmm", two_groups(1, count=3000, apart=1.7))
    generator = np.random.default_rng(0)
    # A narrow peak on a wide hill of the same centre.
    nested = np.concatenate([generator.normal(0.5, 0.001, 3000), generator.normal(0.5, 0.05, 3000)])
    told: list[str] = []
    with pytest.raises(ValueError, match=r"do not fall into two groups .* choose otsu, a number"):
        choose_threshold("gmm", nested, on_warning=told.append)
    assert told == []


def test_gmm_takes_repeated_images_for_no_group():
    pytest.importorskip("sklearn")
    scores = two_groups(0, count=2000)
    repeated = np.concatenate([scores, np.full(20, np.quantile(scores, 0.1))])
    distance = choose_threshold("gmm", repeated) - choose_threshold("gmm", scores)
    assert distance / 1e-5 == pytest.approx(0, abs=0.1)  # of groups with spread 1


def test_gmm_of_all_but_equal_scores():
    pytest.importorskip("sklearn")
    scores = np.full(thresholds.MIXTURE_POINTS * 3, 0.25)
    scores[-1] = 0.5
    with pytest.raises(ValueError, match=r"nearly all of the 60000 scores are 0\.25; give a num"):
        choose_threshold("gmm", scores)


def test_gmm_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.mixture", None)
    with pytest.raises(ImportError, match="pip install scikit-learn, or choose otsu"):
        choose_threshold("gmm", [0.1, 0.2, 0.9])


@pytest.mark.parametrize("count", [20, 39, 40, 41, 100, 1001])
def test_tpr95_is_the_highest_that_keeps_95_percent(count):
    generator = np.random.default_rng(count)
    scores = generator.integers(0, 30, count) / 30  # ties
    is_known = generator.random(count) < 0.9
    is_known[:20] = True
    threshold = choose_threshold("tpr95", scores, is_known)
    known = scores[is_known].tolist()

    def kept(value: float) -> Fraction:
        return Fraction(sum(score >= value for score in known), len(known))

    assert kept(threshold) >= Fraction(95, 100)
    assert all(kept(value) < Fraction(95, 100) for value in set(known) if value > threshold)
    assert kept(math.nextafter(threshold, 1)) < Fraction(95, 100)


def test_tpr95_gives_the_fpr95_of_the_metrics():
    scores = torch.from_numpy(two_groups(3, count=500, apart=2.0))
    is_known = torch.rand(500, generator=torch.Generator().manual_seed(0)) < 0.5
    threshold = choose_threshold("tpr95", scores.numpy(), is_known.numpy())
    taken = float((scores[~is_known] >= threshold).double().mean())
    assert taken == pytest.approx(detection_metrics(scores, is_known)[2], abs=1e-6)


def test_tpr95_of_few_images_warns_and_is_their_lowest_score():
    with pytest.warns(UserWarning, match=r"rests on 3 labelled images"):
        assert choose_threshold("tpr95", [0.3, 0.2, 0.9, 0.1], [True, True, True, False]) == 0.2


def test_what_was_chosen_elsewhere_is_taken_as_it_is():
    assert choose_threshold(0.25, []) == 0.25
    assert choose_threshold(Threshold("tpr95", 0.125), []) == 0.125


@pytest.mark.parametrize(
    ("kind", "scores", "is_known", "message"),
    [
        ("otsu", [], None, "so it needs at least 2, got 0; score more images, or give"),
        ("gmm", [0.5], None, "so it needs at least 2, got 1; score more images"),
        ("otsu", [0.5] * 4, None, "but all 4 are 0.5 (with a single class the MCM score is always"),
        ("gmm", [1.0] * 4, None, "but all 4 are 1.0 (with a single class"),
        ("otsu", [0.1, math.nan], None, "scores has NaN or infinity; none can be ranked"),
        ("gmm", [-math.inf, 0.2], None, "scores has NaN or infinity"),
        ("tpr95", [0.1, math.nan], [True, True], "scores has NaN or infinity"),
        ("tpr95", [0.1], None, "needs the scores of labelled images of known classes, but is_kn"),
        ("tpr95", [0.1], [False], "but there is none; score images in class folders or a list"),
        ("tpr95", [0.1], [1], "is_known has dtype int64 and shape (1,); expected bool and (1,)"),
        ("tpr95", [0.1], [True, True], "shape (2,); expected bool and (1,), as the scores"),
        ("otsu", [[0.1, 0.2]], None, "scores has shape (1, 2); expected (N,)"),
        (
            "kmeans",
            [0.1],
            None,
            "threshold='kmeans' is unknown; choose a number between 0 and 1, o",
        ),
        ("value", [0.1], None, "threshold='value' is unknown; choose a number"),
        ("95", [0.1], None, "threshold=95.0 lies outside 0..1, but the MCM score is a probability"),
        ("nan", [0.1], None, "threshold=nan lies outside 0..1"),
    ],
)
def test_errors_name_the_way_out(kind, scores, is_known, message):
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        choose_threshold(kind, scores, is_known)
    assert message in str(caught.value)


def test_choices_are_read_as_users_write_them():
    assert parse_threshold(" OTSU ") == Threshold("otsu")
    assert parse_threshold("0.25") == parse_threshold(0.25) == Threshold("value", 0.25)
    assert parse_threshold(1) == Threshold("value", 1.0)
    chosen = Threshold("tpr95", 0.5)
    assert parse_threshold(chosen) is chosen
    assert not chosen.needs_labels
    assert Threshold("tpr95").needs_labels
    with pytest.raises(ValueError, match=r"needs a value, e\.g\. Threshold\('value', 0\.5\)"):
        Threshold("value")
    with pytest.raises(ValueError, match="kind='median' is unknown"):
        Threshold("median")


def test_scores_are_left_as_they_were():
    scores = np.array([0.9, 0.1, 0.5, 0.2])
    before = scores.copy()
    for kind in ("otsu", "tpr95"):
        choose_threshold(kind, scores, np.ones(4, dtype=bool), on_warning=lambda text: None)
    assert (scores == before).all()


@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0, 100.0, 1e4])
@pytest.mark.parametrize("error", [1e-7, 2e-6, 1e-3])
def test_a_score_is_known_whatever_rounding_did_to_its_cosines(scale, error):
    generator = torch.Generator().manual_seed(0)
    cosines = torch.rand(200, 20, generator=generator, dtype=torch.float64) * 0.3
    worst = cosines + error  # the best class down, all others up
    best = cosines.argmax(dim=1, keepdim=True)
    worst.scatter_(1, best, cosines.gather(1, best) - error)
    scores = (scale * cosines).softmax(dim=1).amax(dim=1).tolist()
    rows = (scale * worst).softmax(dim=1).gather(1, best).flatten().tolist()
    for score, moved in zip(scores, rows, strict=True):
        cutoff = lowest_known(score, scale, error)
        assert moved >= cutoff * (1 - 1e-12)
        assert cutoff == pytest.approx(moved, rel=1e-6)  # and no lower than that
        assert cutoff <= score


def test_the_lowest_known_score_at_the_edges():
    assert lowest_known(0.0, 1.0, 1e-6) == 0
    assert 1 - 1e-15 < lowest_known(1.0, 1.0, 1e-6) < 1  # 1 - 1e-16 is a rounded 1
    assert lowest_known(0.5, 1e30, 1e-6) < 1e-300
    assert lowest_known(0.25, 1.0, 0.0) == pytest.approx(0.25, rel=1e-15)
