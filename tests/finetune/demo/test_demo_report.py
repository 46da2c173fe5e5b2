"""What the demonstration's report says and shows."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings

import numpy as np
import pytest

from ueo_fast.finetune.demo.config import DemoConfig
from ueo_fast.finetune.demo.digits import draw
from ueo_fast.finetune.demo.report import Result, plot, verdict


def records_of(**hm_by_method: list[float]) -> list[dict[str, object]]:
    return [
        {"method": method.replace("_", "-"), "seed": seed, "hm": hm}
        for method, values in hm_by_method.items()
        for seed, hm in enumerate(values)
    ]


@pytest.mark.parametrize(
    ("differences", "words"),
    [
        ([0.10, 0.12, 0.02], "UEO beats InfoMax, its special case with equal weights, on every"),
        ([-0.10, -0.12, -0.02], "InfoMax, its special case with equal weights, beats UEO on every"),
        (
            [0.10, 0.12, 0.11, 0.10, -0.01],
            "UEO beats InfoMax, its special case with equal weights, on average",
        ),
        (
            [-0.10, -0.12, -0.11, -0.10, 0.01],
            "InfoMax, its special case with equal weights, beats UEO on average",
        ),
        ([0.30, -0.25, 0.02], "UEO shows no clear difference from InfoMax"),
        ([0.004, 0.003, 0.004], "UEO shows no clear difference"),  # all agree, on next to nothing
        ([0.2, 0.2], "There are too few seeds"),
        ([0.001], "There are too few seeds"),
    ],
)
def test_a_difference_needs_size_and_agreement(differences, words):
    values = [0.5] * len(differences)
    text = verdict(records_of(UEO=[0.5 + d for d in differences], InfoMax=values))
    assert text.startswith(words)


def test_methods_are_compared_seed_by_seed():
    records = records_of(UEO=[0.9, 0.5, 0.7], AdaBN=[0.8, 0.4, 0.6])
    records.reverse()
    text = verdict(records)
    assert "(UEO minus AdaBN: HM +10.0 ± 0.0 points, higher on 3 of 3 seeds)" in text
    assert "zero-shot" not in text


def test_verdict_says_when_ueo_is_beaten_and_when_it_hurts():
    low, middle, high = [0.4, 0.5, 0.6], [0.6, 0.7, 0.8], [0.9, 0.92, 0.94]
    text = verdict(
        records_of(zero_shot=low, AdaBN=high, EntMin=[0.2] * 3, InfoMax=high, UEO=middle)
    )
    assert "UEO improves on zero-shot on every seed (UEO minus zero-shot: HM +20.0" in text
    assert "beats UEO on every seed (UEO minus AdaBN: HM -" in text
    assert "this table is not evidence for the entropy loss itself" in text
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


def png_size(path) -> int:
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG")
    return len(data)


@pytest.mark.parametrize(
    ("scenario", "lowest", "highest"), [("OPDA", 0.0, 1.0), ("CSDA", 0.25, 0.25), ("ODA", 0.0, 0.0)]
)
def test_plots_are_small_png_files_drawn_without_a_warning(tmp_path, scenario, lowest, highest):
    first = draw(DemoConfig(scenario=scenario), 5)
    count, known = len(first.labels), first.split.known
    results = [
        Result(
            record={
                "seed": seed,
                "method": method,
                "known_classes": list(known),
                "class_accuracies": [None, *np.linspace(0, 1, len(known) - 1)],
            },
            history={},
            scores=np.linspace(lowest, highest, count),
        )
        for seed in (5, 6)
        for method in ("zero-shot", "EntMin", "UEO")
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plot(tmp_path, first, results)
    for name in ("mcm_histogram", "per_class_accuracy", "samples"):
        assert 0 < png_size(tmp_path / f"{name}.png") < 150_000


def test_plots_leave_the_program_its_own_backend():
    code = "import sys, ueo_fast.finetune.demo.report\nprint('matplotlib.pyplot' in sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.strip() == "False"
