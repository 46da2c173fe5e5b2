"""What the demonstration's paragraph may say, and when."""

from __future__ import annotations

import pytest

from ueo_fast.finetune.demo.verdict import compare, verdict


def records_of(**hm_by_method: list[float]) -> list[dict[str, object]]:
    return [
        {"method": method.replace("_", "-"), "seed": seed, "hm": hm}
        for method, values in hm_by_method.items()
        for seed, hm in enumerate(values)
    ]


@pytest.mark.parametrize(
    ("differences", "outcome"),
    [
        ([0.10, 0.12, 0.02], "better"),
        ([-0.10, -0.12, -0.02], "worse"),
        ([0.10, 0.12, 0.11, 0.10, -0.01], "mostly better"),
        ([-0.10, -0.12, -0.11, -0.10, 0.01], "mostly worse"),
        ([0.30, -0.25, 0.02], "unclear"),
        ([0.004, 0.003, 0.004], "unclear"),  # every seed agrees, on next to nothing
        ([0.2, 0.2], "too few"),
        ([0.001], "too few"),
    ],
)
def test_outcome_needs_size_and_agreement(differences, outcome):
    values = [0.5] * len(differences)
    records = records_of(UEO=[0.5 + d for d in differences], InfoMax=values)
    comparison = compare(records, "UEO", "InfoMax", "hm")
    assert comparison.outcome == outcome


def test_comparison_is_paired_by_seed():
    records = records_of(UEO=[0.9, 0.5, 0.7], AdaBN=[0.8, 0.4, 0.6])
    records.reverse()
    comparison = compare(records, "UEO", "AdaBN", "hm")
    assert comparison.differences == pytest.approx((0.1, 0.1, 0.1))
    assert comparison.figures() == "+10.0 ± 0.0 points, higher on 3 of 3 seeds"
    assert compare(records, "UEO", "zero-shot", "hm") is None


def test_verdict_says_when_ueo_is_beaten_and_when_it_hurts():
    low, middle, high = [0.4, 0.5, 0.6], [0.6, 0.7, 0.8], [0.9, 0.92, 0.94]
    text = verdict(
        records_of(zero_shot=low, AdaBN=high, EntMin=[0.2] * 3, InfoMax=high, UEO=middle)
    )
    assert "UEO improves on zero-shot on every seed (UEO minus zero-shot: HM +20.0" in text
    assert "beats UEO on every seed (UEO minus AdaBN: HM -" in text
    assert "this table is no evidence for the entropy loss in particular" in text
    assert "InfoMax, its special case with equal weights, beats UEO on every seed" in text
    assert "EntMin is worse than zero-shot on every seed" in text
    text = verdict(records_of(zero_shot=high, EntMin=high, InfoMax=middle, UEO=middle))
    assert "UEO hurts: it is worse than zero-shot on every seed" in text
    assert "no clear difference from InfoMax" in text
    assert "AdaBN" not in text


def test_verdict_of_two_seeds_measures_and_judges_nothing():
    text = verdict(records_of(zero_shot=[0.5, 0.5], EntMin=[0.4, 0.4], UEO=[0.6, 0.8]))
    assert text.startswith(
        "There are too few seeds to tell the methods apart (UEO minus zero-shot: HM +20.0 ± 14.1 "
        "points, higher on 2 of 2 seeds; EntMin minus zero-shot: HM -10.0 ± 0.0 points, higher on "
        "0 of 2 seeds). This is a tiny model"
    )
    for claim in ("no clear difference", "improves", "worse"):
        assert claim not in text


def test_verdict_without_unknown_classes_speaks_of_accuracy():
    records = [
        {"method": method, "seed": seed, "hm": None, "per_class_accuracy": value}
        for method, value in (("zero-shot", 0.5), ("UEO", 0.7))
        for seed in range(3)
    ]
    assert "(UEO minus zero-shot: per-class accuracy +20.0" in verdict(records)
