"""The demonstration as a run: its folder, its methods, and its one claim."""

from __future__ import annotations

import copy
import json
import math
import operator

import pytest
import torch

from ueo_fast.finetune.demo import report, run
from ueo_fast.finetune.demo.config import DemoConfig
from ueo_fast.finetune.demo.digits import draw
from ueo_fast.finetune.demo.report import RULE
from ueo_fast.finetune.demo.run import demo_methods, pretrained, run_demo, run_method
from ueo_fast.finetune.demo.tiny_clip import one_thread
from ueo_fast.finetune.methods import UEO, AdaBN, EntMin, InfoMax, LossMethod, ZeroShot

SMALL = {"pretrain_steps": 3, "epochs": 1, "batch_size": 320}


@pytest.fixture
def without_pictures(monkeypatch):
    """Drawing them takes most of the time of a run so small."""
    monkeypatch.setattr(report, "plot", lambda *_: None)


@pytest.mark.parametrize(
    ("tower", "shift", "scenario"),
    [
        ("bn", "contrast", "OPDA"),
        ("vit", "noise", "CSDA"),  # without unknown classes
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("bn", "rotation", "CSDA"),
                ("vit", "noise", "PDA"),
                ("vit", "texture", "ODA"),
                ("vit", "contrast", "CDA"),
            )
        ),
    ],
)
def test_demo_runs_and_leaves_a_complete_folder(tmp_path, capsys, tower, shift, scenario):
    out = tmp_path / "run"
    config = DemoConfig(
        tower=tower, shift=shift, scenario=scenario, seeds=(5,), out=str(out), **SMALL
    )
    assert run_demo(config) == out
    assert {path.name for path in out.iterdir()} == {
        "config.json",
        "environment.json",
        "metrics.jsonl",
        "history.jsonl",
        "results.md",
        "mcm_histogram.png",
        "per_class_accuracy.png",
        "samples.png",
    }
    assert json.loads((out / "config.json").read_text()) == config.as_dict()
    rows = ["zero-shot", "AdaBN", "EntMin", "InfoMax", "UEO"]
    if tower == "vit":
        rows.remove("AdaBN")
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [record["method"] for record in records] == rows
    for record in records:
        assert record["positive_class"] == "known"
        assert (record["auroc"] is None) == (record["hm"] is None) == (scenario == "CSDA")
        assert len(record["class_accuracies"]) == (10 if scenario == "CSDA" else 6)
    histories = [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]
    images = {"CSDA": 10, "CDA": 6, "PDA": 4, "ODA": 8, "OPDA": 6}[scenario] * 90
    for history in histories:
        trained = history["method"] in ("EntMin", "InfoMax", "UEO")
        assert len(history["loss"]) == (math.ceil(images / 320) if trained else 0)
    printed = capsys.readouterr().out
    markdown = (out / "results.md").read_text()
    for text in (printed, markdown):
        assert all(row in text for row in rows)
        assert "known as positive" in text
    assert f"`{config.command()}`" in markdown
    assert "says nothing about CLIP on photographs" in markdown
    assert "too few seeds to tell" in markdown
    assert "no clear difference" not in markdown  # nor can one seed claim that
    assert RULE in markdown
    assert str(out) in printed


@pytest.mark.usefixtures("without_pictures")
def test_the_same_seed_gives_the_same_numbers(tmp_path):
    def numbers(name, seed):
        config = DemoConfig(tower="vit", seeds=(seed,), out=str(tmp_path / name), **SMALL)
        lines = (run_demo(config) / "metrics.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        return [{k: v for k, v in record.items() if k != "seconds"} for record in records]

    first = numbers("a", 5)
    torch.manual_seed(99)  # the global state plays no part
    assert numbers("b", 5) == first
    assert numbers("c", 6) != first


@pytest.fixture(scope="module")
def start():
    """A small problem: config, what the seed draws, pre-trained model."""
    config = DemoConfig(pretrain_steps=10, epochs=1, batch_size=320)
    drawn = draw(config, 5)
    return config, drawn, pretrained(config, drawn)


def test_methods_share_no_state(start):
    model = start[2]
    before = copy.deepcopy(model.state_dict())
    alone = run_method(*start, UEO())
    for other in (AdaBN(), InfoMax(), UEO()):
        run_method(*start, other)
        after = model.state_dict()
        assert after.keys() == before.keys()
        assert all(torch.equal(before[key], value) for key, value in after.items()), other.title
    again = run_method(*start, UEO())
    assert again.history == alone.history
    assert (again.scores == alone.scores).all()


def test_options_reach_the_methods():
    methods = demo_methods(DemoConfig(trade_off=2, eps=1e-5, mcm_scale=3))
    trained = {method.title: method for method in methods if isinstance(method, LossMethod)}
    assert list(trained) == ["EntMin", "InfoMax", "UEO"]
    assert all(method.eps == 1e-5 for method in trained.values())
    assert trained["InfoMax"].trade_off == trained["UEO"].trade_off == 2
    assert trained["UEO"].mcm_scale == 3


@pytest.mark.usefixtures("without_pictures")
def test_seeds_in_processes_of_their_own_give_the_same_numbers(tmp_path, capsys):
    def numbers(threads):
        out = tmp_path / str(threads)
        run_demo(DemoConfig(tower="vit", seeds=(6, 5), out=str(out), threads=threads, **SMALL))
        lines = (out / "metrics.jsonl").read_text().splitlines()
        records = [{**json.loads(line), "seconds": None} for line in lines]
        return sorted(records, key=lambda r: r["seed"]), (out / "results.md").read_text()

    one, page = numbers(1)
    two, other = numbers(2)
    assert one == two
    assert page.partition(" s on ")[0].rpartition("\n")[0] == (
        other.partition(" s on ")[0].rpartition("\n")[0].replace(" --threads 2", " --threads 1")
    )
    assert "on 2 threads of" in other
    assert "seed 6: UEO" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("place", "error"), [("_run_elsewhere", TypeError), ("_start", OSError)], ids=["seed", "start"]
)
def test_what_fails_in_another_process_fails_the_run(tmp_path, monkeypatch, place, error):
    monkeypatch.setattr(run, place, operator.index)  # which takes no config, and no queue
    config = DemoConfig(tower="vit", seeds=(5, 6), out=str(tmp_path / "x"), threads=2, **SMALL)
    with pytest.raises(error):
        run_demo(config)


def test_mcm_scale_changes_the_history(start):
    assert (
        run_method(*start, UEO(mcm_scale=1.0)).history
        != run_method(*start, UEO(mcm_scale=10.0)).history
    )


@pytest.mark.usefixtures("without_pictures")
def test_advice_for_a_users_run_is_not_printed(tmp_path, monkeypatch, capfd):
    adapt = EntMin.adapt

    def warns(self, *args, hooks, **options):
        hooks.on_warning("the predictions are collapsing: try --early-stop")
        return adapt(self, *args, hooks=hooks, **options)

    monkeypatch.setattr(EntMin, "adapt", warns)
    run_demo(DemoConfig(tower="vit", seeds=(5,), out=str(tmp_path / "run"), **SMALL))
    printed = "".join(capfd.readouterr())
    assert "EntMin" in printed
    assert "early-stop" not in printed
    assert "UserWarning" not in printed


def test_an_interrupted_run_keeps_what_was_done(tmp_path, monkeypatch, capsys):
    def interrupted(self, *args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(InfoMax, "adapt", interrupted)
    out = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        run_demo(DemoConfig(tower="vit", seeds=(5,), out=str(out), **SMALL))
    for name in ("metrics.jsonl", "history.jsonl"):
        records = [json.loads(line) for line in (out / name).read_text().splitlines()]
        assert [record["method"] for record in records] == ["zero-shot", "EntMin"]
    assert "EntMin" in capsys.readouterr().out


@pytest.mark.usefixtures("without_pictures")
def test_the_thread_count_of_the_process_is_restored(tmp_path):
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        run_demo(DemoConfig(tower="vit", seeds=(5,), out=str(tmp_path / "x"), threads=1, **SMALL))
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("seed", [30, pytest.param(31, marks=pytest.mark.slow)])
def test_ueo_beats_zero_shot_on_its_recipe(seed):
    """The demonstration's one claim, on seeds that chose nothing and are reported nowhere."""
    config = DemoConfig(seeds=(seed,))
    with one_thread():
        drawn = draw(config, seed)
        model = pretrained(config, drawn)
        zero_shot, ueo = (
            run_method(config, drawn, model, method).record["hm"] for method in (ZeroShot(), UEO())
        )
    assert ueo > zero_shot
