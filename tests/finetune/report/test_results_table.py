"""What is said of results, as a sentence and below a table."""

from __future__ import annotations

import pytest

from ueo_fast.finetune.data.names import plural
from ueo_fast.finetune.evaluation.results_table import (
    KnownCounts,
    ResultsTable,
    direction,
    doubts,
    verdict,
)

COUNTS = KnownCounts(known=1, unknown=1234, threshold=0.16678912, rule="otsu")
NONE = KnownCounts(known=0, unknown=0, threshold=None, rule="otsu")


def values(accuracy: float, auroc: float | None) -> dict[str, float | None]:
    return {"per_class_accuracy": accuracy, "auroc": auroc}


@pytest.mark.parametrize(
    ("before", "after", "sentence"),
    [
        (
            *(values(0.602, 0.537), values(0.953, 0.866)),
            "Better: UEO raised per-class accuracy from 60.2% to 95.3% (by 35.1 points) and AUROC "
            "from 53.7% to 86.6% (by 32.9 points).",
        ),
        (
            *(values(0.8, 0.9), values(0.81, 0.85)),
            "Mixed: UEO raised per-class accuracy from 80.0% to 81.0% (by 1.0 point) but lowered "
            "AUROC from 90.0% to 85.0% (by 5.0 points).",
        ),
        (
            *(values(0.8, 0.9), values(0.797, 0.9)),
            "Slightly worse: UEO lowered per-class accuracy from 80.0% to 79.7% (by 0.3 points) "
            "and left AUROC at 90.0%.",
        ),
        (
            *(values(0.8, 0.9), values(0.8004, 0.8996)),
            "No change: UEO left per-class accuracy at 80.0% and AUROC at 90.0%.",
        ),
        (
            *(values(0.8, None), values(0.6, None)),
            "Worse: UEO lowered per-class accuracy from 80.0% to 60.0% (by 20.0 points).",
        ),
        (
            *(values(0.8, 0.9), None),
            "Not compared: only zero-shot was measured (per-class accuracy 80.0%, AUROC 90.0%).",
        ),
        (
            *(None, values(0.8, None)),
            "Not compared: only UEO was measured (per-class accuracy 80.0%).",
        ),
        (None, None, "Not measured yet."),
    ],
)
def test_the_verdict_says_what_got_better_or_worse_and_by_how_much(before, after, sentence):
    assert verdict("UEO", before, after) == sentence


def test_the_verdict_says_how_many_images_are_known_at_which_threshold():
    assert verdict("UEO", None, None, moved=(12, 1235), counts=COUNTS) == (
        "Not measured, because there are no labels: UEO changed the class of 12 of 1,235 images; "
        "at a threshold of 0.166789 on the MCM score (otsu), 1 of 1,235 images "
        "counts as known and 1,234 as unknown."
    )
    assert verdict("zero-shot", None, None, counts=NONE) == (
        "Not measured, because there are no labels; the scores allow no threshold (otsu), so no "
        "image counts as known or unknown."
    )


@pytest.mark.parametrize(
    ("metric", "before", "after", "expected"),
    [
        ("auroc", 0.5, 0.6, "better"),
        ("auroc", 0.6, 0.5, "worse"),
        ("fpr95", 0.5, 0.6, "worse"),
        ("fpr95", 0.6, 0.5, "better"),
        ("auroc", 0.5, 0.5, ""),
        ("auroc", 0.5, 0.5004, ""),
        ("fpr95", None, 0.5, ""),
        ("hm", 0.5, None, ""),
    ],
)
def test_direction(metric, before, after, expected):
    assert direction(metric, before, after) == expected


def table(*records: dict[str, float | None]) -> ResultsTable:
    columns = {"accuracy": "accuracy", "auroc": "AUROC", "fpr95": "FPR95", "hm": "HM"}
    rows = [{"method": "UEO", **dict.fromkeys(columns), **record} for record in records]
    return ResultsTable.from_records(rows, columns)


def test_the_convention_explains_what_the_table_shows_and_nothing_else():
    full = {"accuracy": 0.5, "auroc": 0.5, "fpr95": 0.5, "hm": 0.5}
    assert table(full).convention() == (
        "(percent; AUROC and FPR95 are of the MCM score with known images as the positive class; "
        "HM is the harmonic mean of per-class accuracy and AUROC)"
    )
    spread = ", mean ± standard deviation over seeds (n - 1);"
    assert table(full, full).convention() == table(full).convention().replace(";", spread, 1)
    assert table({"accuracy": 0.5}).convention() == (
        "(percent; - means not defined, because there are no unknown images)"
    )
    assert (
        table({"accuracy": 0.5, "auroc": 0.5})
        .convention()
        .startswith("(percent; AUROC is of the MCM score with")
    )


def test_plural():
    said = [plural(n, word) for n, word in ((1, "image"), (0, "image"), (2, "class"))]
    assert said == ["1 image", "0 images", "2 classes"]
    assert plural(12345, "image") == "12,345 images"


def test_doubts_say_what_the_numbers_mean():
    classes = ("cat", "dog")
    assert doubts(classes=classes, predicted=[0, 1], images=9, auroc=0.5) == []
    assert doubts(classes=classes, predicted=[1], images=4) == []  # too few to say anything
    (one,) = doubts(classes=classes, predicted=[1], images=9)
    assert one.startswith("all 9 images are put into one class, 'dog'")
    assert doubts(classes=classes, predicted=["dog"], images=9) == [one]
    (below,) = doubts(classes=classes, auroc=0.412)
    assert below.startswith("AUROC is 41.2, below 50, which is chance")
    (single,) = doubts(classes=("cat",), predicted=[0], images=9, auroc=0.4)
    assert "a single class, 'cat'" in single
    assert "MCM score 1" in single
