"""Runs side by side: what is averaged, what is kept apart, what is left out."""

from __future__ import annotations

import json
import re
import statistics

import pytest

from ueo_fast.finetune.evaluation.compare import compare_runs
from ueo_fast.finetune.files.run_folder import RunFolder

TITLES = {"zeroshot": "zero-shot", "ueo": "UEO", "infomax": "InfoMax", "tent": "Tent"}
CONFIG = {
    "data": "photos",
    "test_data": None,
    "classes": "names.txt",
    "dataset": None,
    "domain": None,
    "scenario": "OPDA",
    "model": "RN50",
    "pretrained": "openai",
    "prompt_template": "a photo of a {}.",
    "mcm_scale": 1.0,
    "epochs": 50,
    "trade_off": 1.0,
    "workers": 2,
}
PROBLEM = {
    "known": ["cat", "dog"],
    "unknown": ["emu"],
    "train_images": 90,
    "test_images": 90,
    "labelled": True,
    "skipped": [],
}
ZERO_SHOT = (0.5, 0.6, 0.55, 0.9, 0.52)


def record(method, seed, values, stage="after", split="test", epoch=50):
    names = ("per_class_accuracy", "accuracy", "auroc", "fpr95", "hm")
    metrics = {**dict(zip(names, values, strict=True)), "aupr": values[2]}
    place = {"epoch": epoch, "stage": stage, "split": split}
    images = {"class_accuracies": [values[1]] * 2, "known_images": 60, "unknown_images": 30}
    return {"method": method, "title": TITLES[method], "seed": seed, **place, **metrics, **images}


def make_run(
    path,
    method="ueo",
    seed=0,
    hm=0.7,
    *,
    config=None,
    problem=None,
    zero_shot=ZERO_SHOT,
    more=(),
    after=True,
):
    """A run folder as the recipe writes it."""
    path.mkdir(parents=True)
    folder = RunFolder(path)
    folder.write_json("config.json", {**CONFIG, "method": method, "seed": seed, **(config or {})})
    folder.write_json("problem.json", {**PROBLEM, **(problem or {})})
    records = [record("zeroshot", seed, zero_shot, stage="before", epoch=0)]
    if method != "zeroshot":
        records.append(record(method, seed, (0.1,) * 5, stage="during", epoch=10))
    if method != "zeroshot" and after:
        records.append(record(method, seed, (hm, hm, 0.8, 0.3, hm)))
    for each in (*records, *more):
        folder.append_json_line("metrics.jsonl", each)
    return path


def test_seeds_are_averaged_and_zero_shot_is_there_once(tmp_path):
    values = {0: 0.7, 1: 0.75, 2: 0.6}
    runs = [make_run(tmp_path / f"u{seed}", "ueo", seed, hm) for seed, hm in values.items()]
    runs.append(make_run(tmp_path / "i0", "infomax", 0, 0.65))
    runs.append(make_run(tmp_path / "z", "zeroshot", 5))
    comparison = compare_runs(runs)
    (group,) = comparison.groups
    assert (comparison.differences, comparison.left_out, comparison.notes) == ((), (), ())
    assert list(group.table.rows) == ["zero-shot", "UEO (3 seeds)", "InfoMax (1 seed)"]
    spread = group.table.rows["UEO (3 seeds)"]["hm"]
    assert spread.mean == pytest.approx(statistics.fmean(values.values()))
    assert spread.std == pytest.approx(statistics.stdev(values.values()))
    zero_shot = group.table.rows["zero-shot"]
    assert [zero_shot[key].mean for key in group.table.columns] == list(ZERO_SHOT)
    assert {cell.std for cell in zero_shot.values()} == {None}  # five runs, no false spread
    assert list(group.seeds.rows) == [
        "zero-shot",
        *(f"UEO, seed {seed}" for seed in values),
        "InfoMax, seed 0",
    ]
    assert group.seeds.rows["UEO, seed 1"]["hm"].mean == 0.75
    text = comparison.text()
    assert text.startswith("photos: 90 test images; 2 known classes and 1 unknown; RN50 (openai)")
    assert re.search(r"^UEO \(3 seeds\) +68\.3 ± 7\.6 .* 30\.0 ± 0\.0 +68\.3 ± 7\.6$", text, re.M)
    assert "seed by seed" in text
    assert text.endswith(
        "(percent, mean ± standard deviation over seeds (n - 1); AUROC and FPR95 are of the MCM "
        "score with known images as the positive class; HM is the harmonic mean of per-class "
        "accuracy and AUROC)"
    )
    assert (
        "\n\nBest of 2 by HM, UEO (3 seeds). Better: UEO (3 seeds) raised per-class accuracy from "
        "50.0% to 68.3% (by 18.3 points) and AUROC from 55.0% to 80.0% (by 25.0 points).\n\nmethod"
    ) in text
    markdown = comparison.markdown()
    assert "| UEO (3 seeds) | 68.3 ± 7.6 | 68.3 ± 7.6 | 80.0 ± 0.0 | 30.0 ± 0.0 |" in markdown
    assert "| zero-shot | 50.0 | 60.0 | 55.0 | 90.0 | 52.0 |" in markdown


def test_a_method_below_chance_is_named_above_the_tables(tmp_path):
    values = (0.7, 0.7, 0.312, 0.9, 0.43)
    run = make_run(tmp_path / "a", more=[record("ueo", 0, values)])
    text = compare_runs([run]).text()
    assert text.startswith(f"note: {run}: AUROC is 31.2, below 50, which is chance: ")


def test_one_run_each_has_no_second_table(tmp_path):
    runs = [make_run(tmp_path / method, method) for method in ("ueo", "infomax")]
    comparison = compare_runs(runs)
    assert comparison.groups[0].seeds is None
    assert comparison.groups[0].runs == tuple(runs)
    assert "seed by seed" not in comparison.text() + comparison.markdown().lower()


def test_settings_that_differ_are_never_averaged(tmp_path):
    make_run(tmp_path / "a", seed=0)
    make_run(tmp_path / "b", seed=1, config={"epochs": 10, "future_option": "x|y", "workers": 9})
    make_run(tmp_path / "c", seed=2, config={"device": "cuda:1", "classes": "elsewhere.txt"})
    comparison = compare_runs(tmp_path / name for name in "abc")
    assert list(comparison.groups[0].table.rows) == [
        "zero-shot",
        "UEO, epochs=50, future_option=None (2 seeds)",
        "UEO, epochs=10, future_option=x|y (1 seed)",
    ]
    assert "future_option=x\\|y (1 seed) |" in comparison.markdown()


@pytest.mark.parametrize(
    ("config", "problem", "difference"),
    [
        ({"model": "ViT-B-16"}, {}, "model: RN50 / ViT-B-16"),
        ({"data": "other/"}, {}, "data: photos / other"),
        ({"pretrained": None}, {}, "pretrained: openai / None"),
        ({"mcm_scale": 100.0}, {}, "mcm_scale: 1.0 / 100.0"),
        ({}, {"test_images": 80}, "test_images: 90 / 80"),
        ({}, {"known": ["cat", "fox"]}, "known: 2 with dog / 2 with fox"),
        ({}, {"known": ["dog", "cat"]}, "known: 2, cat to dog / 2, dog to cat"),
    ],
)
def test_what_cannot_be_compared_gets_its_own_table(tmp_path, config, problem, difference):
    first = make_run(tmp_path / "a", seed=0)
    second = make_run(tmp_path / "b", seed=1, hm=0.4, config=config, problem=problem)
    comparison = compare_runs([first, second])
    assert [group.runs for group in comparison.groups] == [(first,), (second,)]
    assert comparison.differences == (difference,)
    assert all("UEO (1 seed)" in group.table.rows for group in comparison.groups)
    for text in (comparison.text(), comparison.markdown()):
        assert "cannot be compared with each other in one table, because of" in text
        assert difference in text
    titles = [group.title for group in comparison.groups]
    assert titles[0] != titles[1]


def test_paths_that_mean_the_same_are_the_same(tmp_path):
    first = make_run(tmp_path / "a", seed=0, config={"data": "photos/"})
    second = make_run(tmp_path / "b", seed=1, config={"data": "./photos", "scenario": "CDA"})
    comparison = compare_runs([first, f"{second}/", second])  # scenario is for data sets only
    assert list(comparison.groups[0].table.rows) == ["zero-shot", "UEO (2 seeds)"]
    assert comparison.notes == ()


def test_a_repeated_run_is_no_second_seed(tmp_path):
    first = make_run(tmp_path / "a", seed=0, hm=0.7)
    second = make_run(tmp_path / "b", seed=0, hm=0.7)
    comparison = compare_runs([first, second])
    assert list(comparison.groups[0].table.rows) == ["zero-shot", "UEO (1 seed)"]
    expected = f"{second} repeats {first} (UEO, seed 0, the same settings) and is left out"
    assert comparison.notes == (expected,)
    assert f"note: {expected}" in comparison.text()


def test_zero_shot_metrics_that_disagree_are_told(tmp_path):
    changed = (0.5, 0.6, 0.55, 0.9, 0.55)
    rounding = (0.5, 0.6, 0.55, 0.9, 0.5201)
    first = make_run(tmp_path / "a", "ueo", 0)
    second = make_run(tmp_path / "b", "infomax", 0, zero_shot=changed)
    third = make_run(tmp_path / "c", "ueo", 1, zero_shot=rounding)
    comparison = compare_runs([first, second, third])
    assert (
        f"{first} and {second} are of the same images, model and seed, but" in comparison.notes[0]
    )
    assert len(comparison.notes) == 1
    assert comparison.groups[0].table.rows["zero-shot"]["hm"].count == 1
    comparison = compare_runs([first, make_run(tmp_path / "d", "ueo", 3, zero_shot=changed)])
    assert "differ between seeds, though no seed plays a part" in comparison.notes[0]
    assert comparison.groups[0].table.rows["zero-shot"]["hm"].count == 2


def test_training_images_and_online_predictions_have_their_place(tmp_path):
    online = record("tent", 0, (0.6,) * 5, split="online")
    same = make_run(tmp_path / "same", "tent", more=[online])
    (group,) = compare_runs([same]).groups
    assert list(group.table.rows) == ["zero-shot", "Tent (1 seed)", "Tent, online (1 seed)"]
    train = [
        record("zeroshot", 0, (0.3,) * 5, stage="before", split="train", epoch=0),
        record("tent", 0, (0.4,) * 5, split="train"),
        online,
    ]
    separate = make_run(
        tmp_path / "separate",
        "tent",
        more=train,
        config={"test_data": "tests"},
        problem={"train_images": 70},
    )
    comparison = compare_runs([separate])
    test, trained = comparison.groups
    assert list(test.table.rows) == ["zero-shot", "Tent (1 seed)"]
    assert list(trained.table.rows) == ["zero-shot", "Tent (1 seed)", "Tent, online (1 seed)"]
    assert trained.table.rows["zero-shot"]["hm"].mean == 0.3
    assert test.title.startswith("tests: 90 test images")
    assert trained.title.startswith("photos: 70 training images")
    assert "cannot be compared" not in comparison.text()


def test_a_resumed_run_counts_its_last_line(tmp_path):
    again = record("ueo", 0, (0.9,) * 5)
    run = make_run(tmp_path / "a", more=[again])
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"method": "ueo", "see')  # cut off by a crash
    assert compare_runs([run]).groups[0].table.rows["UEO (1 seed)"]["hm"].mean == 0.9


def test_undefined_metrics_are_a_dash(tmp_path):
    closed = (0.5, 0.6, None, None, None)
    run = make_run(
        tmp_path / "a",
        "zeroshot",
        zero_shot=closed,
        config={"dataset": "office31", "domain": "dslr", "scenario": "CSDA", "data": None},
        problem={"unknown": []},
    )
    text = compare_runs([run]).text()
    assert re.search(r"^zero-shot +50\.0 +60\.0 +- +- +-$", text, re.M)
    assert "office31 dslr, CSDA: 90 test images; 2 known classes and 0 unknown" in text


DAMAGED = "the file was changed or damaged: restore it"


def test_runs_without_numbers_are_named_with_the_reason(tmp_path):
    good = make_run(tmp_path / "good")
    unlabelled = make_run(tmp_path / "unlabelled", problem={"labelled": False})
    (unlabelled / "metrics.jsonl").unlink()
    unfinished = make_run(tmp_path / "unfinished", after=False)
    early = make_run(tmp_path / "early")
    (early / "problem.json").unlink()
    damaged = make_run(tmp_path / "damaged")
    (damaged / "metrics.jsonl").write_text('{"method": "ueo"}\n')
    partial = make_run(tmp_path / "partial", more=[{"method": "ueo", "stage": "after"}])
    comparison = compare_runs([unlabelled, good, unfinished, early, damaged, partial])
    assert {each.run.name: each.reason for each in comparison.left_out} == {
        "unlabelled": "its images have no labels, so it has no metrics",
        "unfinished": "it is not finished: there are no metrics from its end; go on with "
        f"ueo-fast finetune --resume --out {unfinished}",
        "early": "it is not finished: there is no problem.json",
        "damaged": f"{damaged}/metrics.jsonl, line 1: 'title' is missing; {DAMAGED}",
        "partial": f"{partial}/metrics.jsonl, line 4: 'title' is missing; {DAMAGED}",
    }
    text = comparison.text()
    assert f"left out: {unlabelled}: its images have no labels" in text
    assert [group.runs for group in comparison.groups] == [(good,)]
    with pytest.raises(ValueError, match=r"none of the 2 runs has metrics .* it is not finished"):
        compare_runs([unlabelled, unfinished])


def test_errors_name_the_folder(tmp_path):
    good = make_run(tmp_path / "runs" / "good")
    with pytest.raises(FileNotFoundError, match=r"nowhere does not exist; give the folder"):
        compare_runs([good, tmp_path / "nowhere"])
    with pytest.raises(
        FileNotFoundError, match=r"runs is not .* but good in it may be \(compare takes .*/\*\)"
    ):
        compare_runs([tmp_path / "runs"])
    with pytest.raises(NotADirectoryError, match=r"config\.json is a file; give the folder of"):
        compare_runs([good / "config.json"])
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "config.json").write_text(json.dumps({"tower": "bn", "seeds": [0]}))
    with pytest.raises(
        ValueError, match=r"demo/config\.json names no method, model, seed, so this is"
    ):
        compare_runs([tmp_path / "demo"])
    (tmp_path / "demo" / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"demo/config\.json, line 1: Expecting property name"):
        compare_runs([tmp_path / "demo"])
    with pytest.raises(ValueError, match="runs is empty: give at least one run folder"):
        compare_runs([])


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("problem.json", {"known": 3}, "problem.json: known is 3, of the wrong type"),
        (
            "problem.json",
            {"unknown": [["emu"]]},
            "problem.json: unknown is ['emu'], of the wrong type",
        ),
        (
            "metrics.jsonl",
            {"split": "val"},
            "metrics.jsonl, line 1: split is 'val', expected one of test",
        ),
        (
            "metrics.jsonl",
            {"title": None},
            "metrics.jsonl, line 1: title is None, of the wrong type",
        ),
        ("metrics.jsonl", {"hm": float("nan")}, "metrics.jsonl, line 1: NaN is not a JSON number"),
        (
            "metrics.jsonl",
            {"auroc": 61.4},
            "metrics.jsonl, line 1: auroc is 61.4, expected a fraction in 0..1",
        ),
        ("metrics.jsonl", None, "metrics.jsonl: it is a folder, expected a file"),
    ],
)
def test_a_damaged_run_costs_no_other_its_table(tmp_path, name, change, reason):
    good, bad = make_run(tmp_path / "good"), make_run(tmp_path / "bad", seed=1)
    first, *rest = (bad / name).read_text().splitlines()
    (bad / name).unlink()
    if change is None:
        (bad / name).mkdir()
    elif rest and name == "metrics.jsonl":
        lines = [json.dumps({**json.loads(first), **change}), *rest]
        (bad / name).write_text("\n".join(lines) + "\n")
    else:
        (bad / name).write_text(json.dumps({**PROBLEM, **change}))
    comparison = compare_runs([good, bad])
    assert [group.runs for group in comparison.groups] == [(good,)]
    assert reason in comparison.left_out[0].reason


def test_options_that_are_lists_of_lists_are_shown(tmp_path):
    runs = [
        make_run(tmp_path / str(seed), seed=seed, config={"later": [["a", seed]]})
        for seed in (0, 1)
    ]
    assert "later=[['a', 0]]" in compare_runs(runs).text()
