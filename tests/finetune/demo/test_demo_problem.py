"""What the demonstration is made of: digits, shifts, the tiny CLIP, a seed's draw, its options."""

from __future__ import annotations

import dataclasses
import math
import statistics

import pytest
import torch

from ueo_fast.finetune.demo.config import DemoConfig
from ueo_fast.finetune.demo.digits import (
    DIGIT_NAMES,
    SHIFTS,
    apply_shift,
    draw,
    load_digits,
    split_domains,
)
from ueo_fast.finetune.demo.tiny_clip import pretrain, tiny_clip, tiny_tokenizer

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
def test_pretraining_gives_the_same_bits_on_any_number_of_threads(digits, tower):
    before = torch.get_num_threads()
    states = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            model = tiny_clip(tower, seed=0)
            pretrain(model, tiny_tokenizer(), digits.images, digits.labels, DIGIT_NAMES, steps=3)
            assert torch.get_num_threads() == threads
            states.append(model.state_dict())
    finally:
        torch.set_num_threads(before)
    for state in states[1:]:
        assert all(torch.equal(value, states[0][name]) for name, value in state.items())


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
def test_a_draw_hides_classes_as_the_scenario_says(scenario):
    drawn = draw(DemoConfig(scenario=scenario), 7)
    known = set(drawn.split.known)
    trained = {DIGIT_NAMES[label] for label in drawn.train.labels.tolist()}
    tested = {DIGIT_NAMES[label] for label in drawn.target.labels.tolist()}
    counts = {
        "CSDA": (10, 10, 0),
        "CDA": (6, 6, 0),
        "PDA": (6, 4, 0),
        "ODA": (6, 6, 2),
        "OPDA": (6, 4, 2),
    }
    assert (len(known), len(trained & known), len(trained - known)) == counts[scenario]
    assert tested == set(DIGIT_NAMES)
    for digit, label in zip(drawn.target.labels.tolist(), drawn.labels.tolist(), strict=True):
        name = DIGIT_NAMES[digit]
        assert label == (drawn.split.known.index(name) if name in known else -1)
    assert not set(drawn.source.index.tolist()) & set(drawn.train.index.tolist())


def test_the_known_digits_differ_between_seeds():
    draws = [draw(DemoConfig(), seed) for seed in range(4)]
    assert len({drawn.split.known for drawn in draws}) == 4


@pytest.mark.parametrize("scenario", ["PDA", "OPDA"])
def test_a_seed_has_the_same_known_digits_under_every_shift(scenario):
    for seed in (0, 1):
        draws = [
            draw(DemoConfig(tower=tower, shift=shift, scenario=scenario), seed)
            for tower in ("bn", "vit")
            for shift in SHIFTS
        ]
        assert len({drawn.split for drawn in draws}) == 1
        assert len({tuple(drawn.train.index.tolist()) for drawn in draws}) == 1


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"tower": "mlp"}, "tower='mlp' is unknown: choose one of bn, vit"),
        ({"shift": "blur"}, "shift='blur' is unknown: choose one of contrast, noise, rotation, t"),
        ({"scenario": "opda"}, "scenario='opda' is unknown: choose one of CSDA, CDA, PDA, ODA, OP"),
        ({"seeds": ()}, "seeds is empty"),
        ({"seeds": (0, -1)}, "seeds must be at least 0, got -1"),
        (
            {"seeds": (2**63,)},
            "seeds must be at most 9,223,372,036,854,775,807, got 9223372036854775808",
        ),
        ({"out": ""}, "out is empty: name a folder, or leave it out"),
        ({"eps": -1e-5}, r"eps must be 0 or from 1e-30 to 1e\+30, got -1e-05"),
        ({"eps": math.inf}, r"eps must be 0 or from 1e-30 to 1e\+30, got inf"),
        ({"eps": math.nan}, r"eps must be 0 or from 1e-30 to 1e\+30, got nan"),
        ({"trade_off": math.nan}, r"trade_off must be from -1e\+06 to 1e\+06, got nan"),
        ({"trade_off": math.inf}, r"trade_off must be from -1e\+06 to 1e\+06, got inf"),
        ({"seeds": (1, 1)}, "seeds has repetitions"),
        ({"severity": -0.1}, r"severity must lie in \[0, 1\], got -0.1"),
        ({"known_classes": 10}, r"known_classes must lie in 2..9.*use --scenario CSDA"),
        ({"pretrain_steps": 0}, "pretrain_steps must be at least 1, got 0"),
        ({"threads": 0}, "threads must be at least 1, got 0"),
        ({"mcm_scale": 0.0}, r"mcm_scale must be from 1e-30 to 1e\+30, got 0"),
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"affine_lr": -1.0}, r"affine_lr must be 0 or from 1e-30 to 1e\+06, got -1"),
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
