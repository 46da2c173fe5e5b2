"""`ueo-fast finetune`, `evaluate`, `score`, `report`, `compare`, as a new user would try them."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pyarrow.parquet
import pytest
import safetensors.torch
import torch
from commands_place import finetune, lines, make_place, rows
from photo_folder import CORRUPT, KNOWN, ODD, picture
from report_page import parse_file

from ueo_fast.cli import main
from ueo_fast.finetune.clip.delta import read_delta
from ueo_fast.finetune.data.benchmarks import class_names
from ueo_fast.finetune.demo.digits import load_digits
from ueo_fast.finetune.scoring.thresholds import choose_threshold


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model, photographs, class names and a finished run of two epochs."""
    return make_place(tmp_path_factory.mktemp("user, 用户"))


def test_a_run_leaves_all_that_it_promises(place):
    run = place / "run"
    found = {path.name for path in run.iterdir()} - {".lock"}
    assert found == {
        *("config.json", "environment.json", "problem.json", "images.json"),
        *("zero_shot.safetensors", "metrics.jsonl", "train.jsonl", "epochs.jsonl"),
        *("predictions.csv", "delta.safetensors", "report.html", "finished.json"),
        *("thumbnails.json", "checkpoint.safetensors", "base_model.json"),
    }
    problem = json.loads((run / "problem.json").read_text())
    assert problem["known"] == list(KNOWN)
    assert problem["unknown"] == ["seven", "six"]
    assert [skipped["image"] for skipped in problem["skipped"]] == [CORRUPT]
    assert problem["train_images"] == 8 * 6 + len(ODD)
    steps = lines(run / "train.jsonl")
    assert [step["step"] for step in steps] == list(range(1, 9))
    assert [epoch["epoch"] for epoch in lines(run / "epochs.jsonl")] == [1, 2]


def test_metrics_are_there_before_and_after(place):
    records = lines(place / "run" / "metrics.jsonl")
    assert [(r["method"], r["stage"], r["split"]) for r in records] == [
        ("zeroshot", "before", "test"),
        ("ueo", "after", "test"),
    ]
    for record in records:
        assert record["positive_class"] == "known"
        assert record["known_images"] + record["unknown_images"] == 8 * 6 + len(ODD)


def test_a_preset_and_a_temperature_are_the_runs_own(place, capsys):
    words = ["--epochs", "1", "--preset", "authors", "--logit-scale", "30"]
    assert finetune(place, "authors", *words) == 0
    kept = json.loads((place / "authors" / "config.json").read_text())
    wanted = {"eps": 1e-5, "affine_scope": "authors", "seed": 2023, "logit_scale": 30.0}
    assert {name: kept[name] for name in wanted} == wanted
    assert read_delta(place / "authors" / "delta.safetensors").logit_scale == 30
    assert main(["finetune", "--resume", "--out", str(place / "authors"), "--preset=authors"]) == 2
    assert "logit_scale=100.0 differs from 30.0" in capsys.readouterr().err


def test_metrics_are_printed_before_during_and_after(place, capsys):
    assert finetune(place, "told", "--epochs", "2", "--eval-every", "1") == 0
    printed = capsys.readouterr().out
    before, during = (
        printed.index("zero-shot: per-class accuracy"),
        printed.index("epoch 1: per-class accuracy"),
    )
    found = re.search(
        r"^(Slightly |)(better|mixed|worse|no change): UEO .* per-class accuracy .*\.$",
        printed,
        re.M,
    )
    after = printed.index("method     per-class accuracy")
    assert before < during < found.start() < after
    page = (place / "told" / "report.html").read_text(encoding="utf-8")
    assert f'<p class="lead"><bdi>{found[0]}</bdi></p>' in page
    assert "not defined" not in printed  # there are unknown images


def test_a_data_set_of_the_paper_needs_no_class_list(place, tmp_path, capsys):
    names = class_names("office31")
    digits = load_digits()
    for label, name in enumerate(names):
        folder = tmp_path / "office" / "webcam" / "images" / name
        folder.mkdir(parents=True)
        for copy in range(2):
            picture(digits.images[2 * label + copy]).save(folder / f"frame_{copy}.png")
    words = ["--dataset", "office31", "--domain", "webcam", "--root", tmp_path / "office"]
    words += ["--model", place / "model", "--epochs", 1, "--workers", 0, "--threads", 1]
    command = ["finetune", *map(str, words)]
    assert main([*command, "--out", str(tmp_path / "run")]) == 2
    assert "--check-counts false" in capsys.readouterr().err
    assert main([*command, "--check-counts", "false", "--out", str(tmp_path / "run")]) == 0
    problem = json.loads((tmp_path / "run" / "problem.json").read_text())
    assert problem["known"] == [name.replace("_", " ") for name in names[:25]]
    assert problem["train_images"] == 2 * (15 + 3)  # OPDA
    assert problem["test_images"] == 2 * 31
    assert len(problem["unknown"]) == 6
    table = rows(tmp_path / "run" / "predictions.csv")
    known = [row for row in table if row["label"] in problem["known"]]
    assert len(known) == 2 * 25  # spelt alike, so that the report can tell known from unknown


def test_predictions_name_every_image_and_its_label(place):
    table = rows(place / "run" / "predictions.csv")
    names = [row["image"] for row in table]
    assert set(ODD.values()) <= set(names)
    assert CORRUPT not in names
    assert len(names) == len(set(names)) == 8 * 6 + len(ODD)
    for row in table:
        assert row["label"] == row["image"].split("/")[0]
        assert row["adapted_class"] in KNOWN
        assert 1 / 6 < float(row["adapted_mcm"]) < 1
        assert float(row["mcm_scale"]) == 1.0


def test_predictions_say_what_is_known_by_the_threshold_that_the_run_keeps(place):
    table = rows(place / "run" / "predictions.csv")
    kept = json.loads((place / "run" / "finished.json").read_text())["threshold"]
    scores = [float(row["adapted_mcm"]) for row in table]
    assert kept == {"rule": "otsu", "value": choose_threshold("otsu", scores)}
    assert [row["known"] for row in table] == [
        "true" if score >= kept["value"] else "false" for score in scores
    ]
    assert {row["known"] for row in table} == {"true", "false"}


def test_a_list_of_one_class_allows_no_threshold(place, tmp_path, capsys):
    (tmp_path / "one.txt").write_text("zero\n")
    words = ["--classes", str(tmp_path / "one.txt"), "--epochs", "1"]
    assert finetune(place, "one class", *words) == 0
    printed = capsys.readouterr().out
    assert "the scores allow no threshold (otsu), so no image counts as known or unknown" in printed
    found = re.findall(r"^warning: (the list has a single class, 'zero'.*)$", printed, re.M)
    assert len(found) == 2  # before hours are spent, and with the results
    (warning,) = set(found)
    assert printed.index(warning) < printed.index("per-class accuracy at")
    run = place / "one class"
    page = parse_file(run / "report.html")
    assert page.one("aside", **{"aria-label": "Warnings"}).text == f"1 warning {warning}"
    assert {row["known"] for row in rows(run / "predictions.csv")} == {""}
    assert json.loads((run / "finished.json").read_text())["threshold"]["value"] is None


def test_what_was_learnt_is_small_and_differs_from_the_start(place):
    path = place / "run" / "delta.safetensors"
    assert path.stat().st_size < 300_000
    learnt = safetensors.torch.load_file(path)
    base = safetensors.torch.load_file(place / "model" / "open_clip_model.safetensors")
    moved = [name for name in learnt if name in base and not torch.equal(learnt[name], base[name])]
    assert moved
    assert all(name.startswith("visual.") for name in moved)


def test_the_same_command_gives_the_same_bits(place):
    assert finetune(place, "again", "--epochs", "2") == 0
    first, second = (
        safetensors.torch.load_file(place / name / "delta.safetensors") for name in ("run", "again")
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_config_is_printed_and_read_back(place, capsys):
    config = place / "run" / "config.json"
    capsys.readouterr()
    assert main(["finetune", "--config", str(config), "--print_config"]) == 0
    (place / "printed.yaml").write_text(capsys.readouterr().out)
    out = place / "from yaml"
    words = ["--config", str(place / "printed.yaml"), "--out", str(out), "--epochs", "1"]
    assert main(["finetune", *words]) == 0
    saved = json.loads((out / "config.json").read_text())
    assert saved == {**json.loads(config.read_text()), "epochs": 1}


def test_labels_are_not_needed(place, tmp_path, capsys):
    listed = tmp_path / "list.txt"
    paths = sorted((place / "photos").glob("*/IMG*.png"))
    listed.write_text("\n".join(map(str, paths)), encoding="utf-8")
    assert finetune(place, "unlabelled", "--epochs", "1", "--data", str(listed)) == 0
    assert "Not measured, because there are no labels: UEO changed" in capsys.readouterr().out
    assert not (place / "unlabelled" / "metrics.jsonl").exists()
    assert all(row["label"] == "" for row in rows(place / "unlabelled" / "predictions.csv"))


@pytest.mark.parametrize(
    "method",
    ["zeroshot", "infomax", "entmin", "adabn", "tent", "upl", "pouf", "dance", "oracle"],
)
def test_every_method_runs_and_reports(place, method):
    assert finetune(place, f"run {method}", "--epochs", "1", "--method", method) == 0
    run = place / f"run {method}"
    seen = [(r["method"], r["split"]) for r in lines(run / "metrics.jsonl")]
    after = {"zeroshot": [], "tent": [("tent", "test"), ("tent", "online")]}
    assert seen == [("zeroshot", "test"), *after.get(method, [(method, "test")])]
    assert (run / "report.html").stat().st_size > 10_000


def test_evaluate_puts_zero_shot_beside_adapted(place, tmp_path, capsys):
    out = tmp_path / "again.csv"
    words = ["--run", place / "run", "--workers", 0, "--out", out]
    assert main(["evaluate", *map(str, words)]) == 0
    printed = capsys.readouterr().out
    assert "54 images, 41 of known classes and 13 of others" in printed
    first = next(line for line in printed.splitlines() if not line.startswith("note: "))
    report = (place / "run" / "report.html").read_text(encoding="utf-8")
    assert f'<p class="lead"><bdi>{first}</bdi></p>' in report
    for record in lines(place / "run" / "metrics.jsonl"):
        title = {"zeroshot": "zero-shot", "ueo": "UEO"}[record["method"]]
        (line,) = re.findall(rf"^{title} .*$", printed, re.M)
        assert f"{100 * record['auroc']:.1f}" in line
        assert f"{100 * record['hm']:.1f}" in line
    before = rows(place / "run" / "predictions.csv")
    for now, then in zip(rows(out), before, strict=True):
        assert now["adapted_class"] == then["adapted_class"]
        assert float(now["adapted_mcm"]) == pytest.approx(float(then["adapted_mcm"]), abs=1e-6)
    assert main(["evaluate", *map(str, words)]) == 2  # nothing is overwritten


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_score_tables_every_image(place, tmp_path, capsys, kind):
    out = tmp_path / f"scores.{kind}"
    words = ["--run", place / "run", "--data", place / "photos", "--out", out, "--workers", 0]
    assert main(["score", *map(str, words), "--top-k", "3", "--threshold", "tpr95"]) == 0
    printed = capsys.readouterr().out
    assert "54 images scored" in printed
    assert CORRUPT in printed
    table = rows(out) if kind == "csv" else pyarrow.parquet.read_table(out).to_pylist()
    known = {row["image"]: row for row in rows(place / "run" / "predictions.csv")}
    assert [row["image"] for row in table] == list(known)
    for row in table:
        assert row["class_1"] == known[row["image"]]["adapted_class"]
        scores = [float(row[f"probability_{rank}"]) for rank in (1, 2, 3)]
        assert scores == sorted(scores, reverse=True)
        assert float(row["mcm"]) == pytest.approx(
            float(known[row["image"]]["adapted_mcm"]), abs=1e-6
        )
    kept = [str(row["known"]).lower() == "true" for row in table if row["label"] in KNOWN]
    assert sum(kept) / len(kept) >= 0.95


def test_score_takes_its_threshold_from_validation_images(place, tmp_path, capsys):
    listed = tmp_path / "unlabelled.txt"
    paths = sorted((place / "photos").glob("*/IMG*.png"))
    listed.write_text("\n".join(map(str, paths)), encoding="utf-8")
    validation = tmp_path / "validation"
    for path in paths:
        if path.parent.name in KNOWN[:2] or path.parent.name == "six":
            (validation / path.parent.name).mkdir(parents=True, exist_ok=True)
            (validation / path.parent.name / path.name).write_bytes(path.read_bytes())
    words = ["score", "--run", place / "run", "--data", listed, "--workers", 0]
    words += ["--validation", validation, "--out"]
    assert main([*map(str, words), str(tmp_path / "scores.csv")]) == 0
    printed = capsys.readouterr().out
    assert "threshold from 12 validation images of known classes" in printed
    assert "warning: threshold='tpr95' rests on 12 labelled images" in printed
    before = rows(place / "run" / "predictions.csv")
    lowest = min(
        float(row["adapted_mcm"])
        for row in before
        if row["label"] in KNOWN[:2] and "IMG" in row["image"]
    )
    table = rows(tmp_path / "scores.csv")
    assert len(table) == len(paths)
    assert {row["known"] for row in table} == {"true", "false"}
    for row in table:
        if abs(float(row["mcm"]) - lowest) > 1e-6:
            assert (row["known"] == "true") == (float(row["mcm"]) >= lowest)
    other = str(tmp_path / "other.csv")
    assert main([*map(str, words), other, "--threshold", "otsu"]) == 2
    assert "threshold='otsu' has no use for validation=" in capsys.readouterr().err
    words[words.index("--validation") + 1] = listed
    assert main([*map(str, words), other]) == 2
    assert "has no labels to take the threshold from" in capsys.readouterr().err
    assert not (tmp_path / "other.csv").exists()


def test_score_takes_a_delta_alone_and_the_scale_that_its_run_had(place, tmp_path, capsys):
    assert finetune(place, "scaled", "--epochs", "1", "--mcm-scale", "30") == 0
    run = place / "scaled"
    alone = Path(shutil.copy(run / "delta.safetensors", tmp_path / "sent by mail.safetensors"))
    tables = []
    for source in (run, alone):
        out = tmp_path / f"{source.stem}.csv"
        words = ["--run", source, "--data", place / "photos", "--out", out, "--workers", 0]
        assert main(["score", *map(str, words)]) == 0
        assert "MCM at scale 30, probabilities at the model's own scale" in capsys.readouterr().out
        tables.append(rows(out))
    assert tables[0] == tables[1]
    assert {row["mcm_scale"] for row in tables[0]} == {"30.0"}
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(alone.read_bytes()[:-1])
    other = ["--data", place / "photos", "--out", tmp_path / "other.csv"]
    assert main(["score", *map(str, ["--run", broken, *other])]) == 2
    assert "broken.safetensors" in capsys.readouterr().err
    assert main(["score", *map(str, ["--run", tmp_path / "nowhere.safetensors", *other])]) == 1
    assert "does not exist; give the folder of a run" in capsys.readouterr().err
    assert not (tmp_path / "other.csv").exists()


def test_a_batch_of_one_is_refused_before_anything_is_read(place, capsys):
    assert finetune(place, "alone", "--batch-size", "1") == 2
    assert "batch_size is 1, but UEO compares the images" in capsys.readouterr().err
    assert not (place / "alone").exists()


def test_score_is_strict_where_it_is_asked_to_be(place, tmp_path, capsys):
    out = tmp_path / "scores.csv"
    words = ["--run", place / "run", "--data", place / "photos", "--out", out, "--workers", 0]
    assert main(["score", *map(str, words), "--strict", "true"]) == 2
    assert CORRUPT in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_report_is_written_where_it_is_wanted(place, tmp_path, capsys):
    assert main(["report", str(place / "run"), "--out", str(tmp_path / "page.html")]) == 0
    assert str(tmp_path / "page.html") in capsys.readouterr().out
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert page.startswith("<!DOCTYPE html>")


def test_compare_shows_mean_and_spread(place, capsys):
    for seed in (1, 2):
        assert finetune(place, f"seed {seed}", "--epochs", "2", "--seed", str(seed)) == 0
    capsys.readouterr()
    runs = [str(place / name) for name in ("run", "seed 1", "seed 2")]
    assert main(["compare", *runs]) == 0
    printed = capsys.readouterr().out
    (line,) = re.findall(r"^UEO .*±.*$", printed, re.M)
    values = [
        next(r["hm"] for r in lines(place / name / "metrics.jsonl") if r["stage"] == "after")
        for name in ("run", "seed 1", "seed 2")
    ]
    assert f"{100 * sum(values) / 3:.1f} ±" in line
    assert "zero-shot" in printed
    assert main(["compare", *runs, "--markdown", "true"]) == 0
    assert "| --- |" in capsys.readouterr().out


def test_a_finished_run_has_nothing_to_resume(place, capsys):
    before = {path.name: path.read_bytes() for path in (place / "run").iterdir()}
    assert main(["finetune", "--resume", "true", "--out", str(place / "run")]) == 0
    assert "nothing to resume" in capsys.readouterr().out
    assert before == {path.name: path.read_bytes() for path in (place / "run").iterdir()}


def test_a_resumed_run_keeps_its_options(place, capsys):
    out = str(place / "run")
    assert main(["finetune", "--resume", "true", "--out", out, "--epochs", "7"]) == 2
    assert "epochs=7 differs from 2" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["finetune", "evaluate", "score", "report", "compare"])
def test_help_explains_every_option(command, capsys):
    assert main([command, "--help"]) == 0
    text = capsys.readouterr().out
    assert "--config" in text
    assert "--print_config" in text
    for option in re.findall(r"^  (--[a-z-]+) ", text, re.M):
        assert option.replace("_", "-") == option
