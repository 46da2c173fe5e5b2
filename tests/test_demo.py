"""The bundled demonstration: data, model, problem, report, and its one claim."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import statistics

import pytest
import torch

from ueo_fast.finetune.confidence import zero_shot_confidence
from ueo_fast.finetune.demo.config import DemoConfig
from ueo_fast.finetune.demo.digits import (
    DIGIT_NAMES,
    SHIFTS,
    apply_shift,
    load_digits,
    split_domains,
)
from ueo_fast.finetune.demo.problem import make_problem
from ueo_fast.finetune.demo.run import (
    demo_methods,
    pretrained_classifier,
    run_demo,
    run_method,
)
from ueo_fast.finetune.demo.tiny_clip import pretrain, tiny_clip, tiny_tokenizer
from ueo_fast.finetune.demo.verdict import RULE, compare, verdict
from ueo_fast.finetune.methods import UEO, AdaBN, InfoMax, LossMethod, ZeroShot

ALL_SCENARIOS = ("CSDA", "CDA", "PDA", "ODA", "OPDA")


@pytest.fixture(scope="module")
def digits():
    return load_digits()


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_digits_are_the_1797_of_scikit_learn(digits):
    assert digits.images.shape == (1797, 3, 32, 32)
    assert digits.images.dtype == torch.float32
    assert (digits.images.min().item(), digits.images.max().item()) == (-1.0, 1.0)
    assert torch.bincount(digits.labels).tolist() == [
        178, 182, 177, 183, 181, 182, 181, 179, 174, 180,
    ]  # fmt: skip


def test_no_image_is_in_both_domains(digits):
    source, target = split_domains(digits, generator())
    assert not set(source.index.tolist()) & set(target.index.tolist())
    assert sorted([*source.index.tolist(), *target.index.tolist()]) == list(range(1797))
    difference = torch.bincount(target.labels) - torch.bincount(source.labels)
    assert set(difference.tolist()) <= {0, 1}
    for domain in (source, target):
        assert torch.equal(domain.images, digits.images[domain.index])
        assert torch.equal(domain.labels, digits.labels[domain.index])
    other, _ = split_domains(digits, generator(1))
    assert set(other.index.tolist()) != set(source.index.tolist())


@pytest.mark.parametrize("shift", SHIFTS)
def test_shifts_grow_from_nothing_and_are_reproducible(digits, shift):
    domain = digits.of_classes((3,))
    unshifted = apply_shift(domain, shift, 0.0, generator())
    torch.testing.assert_close(unshifted.images, domain.images, rtol=0, atol=1e-5)
    distances = []
    for severity in (0.3, 0.6, 0.9):
        shifted = apply_shift(domain, shift, severity, generator())
        again = apply_shift(domain, shift, severity, generator())
        assert torch.equal(shifted.images, again.images)
        assert torch.equal(shifted.labels, domain.labels)
        assert shifted.images.min() >= -1.0 - 1e-5
        assert shifted.images.max() <= 1.0 + 1e-5
        distances.append((shifted.images - domain.images).abs().mean().item())
    assert distances == sorted(distances)
    assert distances[0] > 0.02


def test_rotation_by_the_full_severity_is_a_quarter_turn(digits):
    domain = digits.of_classes((7,))
    turned = apply_shift(domain, "rotation", 1.0, generator()).images
    quarter = [torch.rot90(domain.images, turns, dims=(2, 3)) for turns in (1, 3)]
    assert min((turned - q).abs().max().item() for q in quarter) < 1e-4


def test_textures_differ_between_images_and_leave_the_ink(digits):
    domain = digits.of_classes((1,))
    shifted = apply_shift(domain, "texture", 0.9, generator()).images
    corner = shifted[:, :, 0, 0]
    assert len({tuple(row) for row in corner.tolist()}) > 0.5 * len(corner)
    ink = domain.images == 1.0
    assert torch.equal(shifted[ink], domain.images[ink])


def test_shift_errors_name_the_choices(digits):
    with pytest.raises(ValueError, match="unknown shift 'blur': choose one of contrast, noise"):
        apply_shift(digits, "blur", 0.5, generator())
    with pytest.raises(ValueError, match=r"severity must lie in \[0, 1\], got 1.5"):
        apply_shift(digits, "noise", 1.5, generator())


def test_tiny_clip_is_seeded_and_leaves_the_global_state():
    state = torch.get_rng_state()
    first, second, third = (tiny_clip("bn", seed).visual.conv1.weight for seed in (1, 1, 2))
    assert torch.equal(first, second)
    assert not torch.equal(first, third)
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(ValueError, match="unknown tower 'mlp': choose one of bn, vit"):
        tiny_clip("mlp", 0)


@pytest.mark.parametrize("tower", ["bn", "vit"])
def test_pretraining_lowers_the_loss(digits, tower):
    losses = []
    model = tiny_clip(tower, 0)
    last = pretrain(
        model,
        tiny_tokenizer(),
        digits.images,
        digits.labels,
        DIGIT_NAMES,
        steps=25,
        on_step=lambda done, total, loss: losses.append(loss),
    )
    assert losses[0] == pytest.approx(math.log(10), abs=0.7)
    assert last == pytest.approx(statistics.fmean(losses[-10:]))
    assert last < losses[0] - (0.5 if tower == "bn" else 0.02)
    assert not model.training


@pytest.mark.parametrize("scenario", ALL_SCENARIOS)
def test_problem_hides_classes_as_the_scenario_says(digits, scenario):
    problem = make_problem(DemoConfig(scenario=scenario), digits, seed=7)
    known = set(problem.split.known)
    trained = {DIGIT_NAMES[label] for label in problem.train.labels.tolist()}
    tested = {DIGIT_NAMES[label] for label in problem.target.labels.tolist()}
    counts = {
        "CSDA": (10, 10, 0),
        "CDA": (6, 6, 0),
        "PDA": (6, 4, 0),
        "ODA": (6, 6, 2),
        "OPDA": (6, 4, 2),
    }
    assert (len(known), len(trained & known), len(trained - known)) == counts[scenario]
    assert tested == set(DIGIT_NAMES)
    for digit, label in zip(problem.target.labels.tolist(), problem.labels.tolist(), strict=True):
        name = DIGIT_NAMES[digit]
        assert label == (problem.split.known.index(name) if name in known else -1)
    assert not set(problem.source.index.tolist()) & set(problem.train.index.tolist())


def test_the_known_digits_differ_between_seeds(digits):
    problems = [make_problem(DemoConfig(), digits, seed) for seed in range(4)]
    assert len({problem.split.known for problem in problems}) == 4


@pytest.mark.parametrize("scenario", ["PDA", "OPDA"])
def test_a_seed_has_the_same_known_digits_under_every_shift(digits, scenario):
    for seed in (0, 1):
        problems = [
            make_problem(DemoConfig(tower=tower, shift=shift, scenario=scenario), digits, seed)
            for tower in ("bn", "vit")
            for shift in SHIFTS
        ]
        assert len({problem.split for problem in problems}) == 1
        assert len({tuple(problem.train.index.tolist()) for problem in problems}) == 1


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"seeds": ()}, "seeds is empty"),
        ({"seeds": (0, -1)}, r"seeds must lie in 0\.\.2\*\*63-1, got -1"),
        ({"seeds": (2**63,)}, r"seeds must lie in 0\.\.2\*\*63-1, got 9223372036854775808"),
        ({"out": ""}, "out is empty: name a folder, or leave it out"),
        ({"eps": -1e-5}, "eps must be finite and not negative, got -1e-05"),
        ({"eps": math.inf}, "eps must be finite and not negative, got inf"),
        ({"eps": math.nan}, "eps must be finite and not negative, got nan"),
        ({"trade_off": math.nan}, "trade_off must be finite, got nan"),
        ({"trade_off": math.inf}, "trade_off must be finite, got inf"),
        ({"seeds": (1, 1)}, "seeds has repetitions"),
        ({"severity": -0.1}, r"severity must lie in \[0, 1\], got -0.1"),
        ({"known_classes": 10}, r"known_classes must lie in 2..9.*use --scenario CSDA"),
        ({"pretrain_steps": 0}, "pretrain_steps must be at least 1, got 0"),
        ({"threads": 0}, "threads must be at least 1, got 0"),
        ({"mcm_scale": 0.0}, "mcm_scale must be positive, got 0"),
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"prompt_lr": 0.0, "affine_lr": 0.0}, "nothing to train"),
    ],
)
def test_config_errors_name_the_option(option, message):
    with pytest.raises(ValueError, match=message):
        DemoConfig(**option)


def test_the_largest_seed_is_one_that_torch_takes():
    (seed,) = DemoConfig(seeds=(2**63 - 1,)).seeds
    generator(seed)


def test_config_prints_the_command_that_repeats_it():
    assert DemoConfig().command() == "ueo-fast demo"
    config = DemoConfig(tower="vit", shift="noise", seeds=(3, 4), out="x", prompt_lr=0.5)
    assert config.command() == (
        "ueo-fast demo --tower vit --shift noise --seeds 3 4 --prompt-lr 0.5"
    )
    assert DemoConfig(**config.as_dict()) == dataclasses.replace(config, out=None)


SMALL = {"pretrain_steps": 3, "epochs": 1, "batch_size": 320}


@pytest.mark.parametrize(
    ("tower", "shift", "scenario"),
    [
        ("bn", "contrast", "OPDA"),
        ("bn", "rotation", "CSDA"),
        ("vit", "noise", "PDA"),
        ("vit", "texture", "ODA"),
        ("vit", "contrast", "CDA"),
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
def start(digits):
    """A small problem: config, problem, zero-shot classifier, confidence."""
    config = DemoConfig(pretrain_steps=10, epochs=1, batch_size=320)
    problem = make_problem(config, digits, 5)
    zero_shot = pretrained_classifier(config, problem)
    return config, problem, zero_shot, zero_shot_confidence(zero_shot, problem.train.images)


def test_methods_share_no_state(start):
    zero_shot = start[2]
    before = copy.deepcopy(zero_shot.state_dict())
    alone = run_method(*start, UEO())
    for other in (AdaBN(), InfoMax(), UEO()):
        run_method(*start, other)
        after = zero_shot.state_dict()
        assert after.keys() == before.keys()
        assert all(torch.equal(before[key], value) for key, value in after.items()), other.title
    again = run_method(*start, UEO())
    assert again.history == alone.history
    assert torch.equal(again.scores, alone.scores)


def test_options_reach_the_methods():
    methods = demo_methods(DemoConfig(trade_off=2, eps=1e-5))
    trained = {method.title: method for method in methods if isinstance(method, LossMethod)}
    assert list(trained) == ["EntMin", "InfoMax", "UEO"]
    assert all(method.eps == 1e-5 for method in trained.values())
    assert trained["InfoMax"].trade_off == trained["UEO"].trade_off == 2


def test_mcm_scale_changes_ueo_and_not_infomax(start):
    config, problem, zero_shot, _ = start

    def history(method, mcm_scale):
        images = problem.train.images
        confidence = zero_shot_confidence(zero_shot, images, mcm_scale=mcm_scale)
        return run_method(config, problem, zero_shot, confidence, method).history

    assert history(UEO(), 1.0) != history(UEO(), 10.0)
    assert history(InfoMax(), 1.0) == history(InfoMax(), 10.0)


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


def test_the_thread_count_of_the_process_is_restored(tmp_path):
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        run_demo(DemoConfig(tower="vit", seeds=(5,), out=str(tmp_path / "x"), threads=1, **SMALL))
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


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


def test_ueo_beats_zero_shot_on_its_recipe(digits):
    """The demonstration's one claim, on seeds that chose nothing and are reported nowhere."""
    config = DemoConfig(seeds=(30, 31))
    gains = []
    before = torch.get_num_threads()
    torch.set_num_threads(config.threads)
    try:
        for seed in config.seeds:
            problem = make_problem(config, digits, seed)
            start = pretrained_classifier(config, problem)
            confidence = zero_shot_confidence(start, problem.train.images)
            zero_shot, ueo = (
                run_method(config, problem, start, confidence, method).metrics.hm
                for method in (ZeroShot(), UEO())
            )
            gains.append(ueo - zero_shot)
    finally:
        torch.set_num_threads(before)
    assert statistics.fmean(gains) > 0, gains
