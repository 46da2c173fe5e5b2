"""The adaptation methods: which loss each one is, and what each one may change."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from tiny_problem import make_classifier, make_images, random_features, random_step

from ueo_fast.finetune.data.loader import even_loader
from ueo_fast.finetune.engine.hooks import Hooks
from ueo_fast.finetune.engine.objective import Step
from ueo_fast.finetune.engine.trainer import NonFiniteLossError, TrainerConfig
from ueo_fast.finetune.methods import (
    DANCE,
    POUF,
    UEO,
    UPL,
    AdaBN,
    EntMin,
    InfoMax,
    LossMethod,
    Oracle,
    Tent,
    ZeroShot,
)
from ueo_fast.finetune.target import Target, zero_shot_target

POSITIONS = torch.tensor([17, 3, 0, 11, 5, 8, 19, 2, 14])


@pytest.fixture
def step() -> Step:
    """Nine images of twenty, in no order."""
    return random_step(POSITIONS, classes=5)


@pytest.fixture
def target() -> Target:
    """Twenty images of which only the zero-shot cosines matter."""
    cosines = random_features(20, seed=3, features=5).softmax(dim=1)
    return Target(torch.zeros(20, 3, 2, 2), cosines=cosines)


def loss_of(method: LossMethod, step: Step, target: Target) -> torch.Tensor:
    return method.objective(make_classifier(), target)(step)


def entropy(p: torch.Tensor) -> torch.Tensor:
    return -(p * p.log()).sum(dim=-1)


def test_entmin_is_the_mean_entropy(step, target):
    expected = entropy(step.logits.softmax(dim=1)).mean()
    torch.testing.assert_close(loss_of(EntMin(), step, target), expected)


@pytest.mark.parametrize("trade_off", [0.5, 1.0, 3.0])
def test_infomax_subtracts_the_entropy_of_the_mean(step, target, trade_off):
    p = step.logits.softmax(dim=1)
    expected = entropy(p).mean() - trade_off * entropy(p.mean(dim=0))
    torch.testing.assert_close(loss_of(InfoMax(trade_off), step, target), expected)


@pytest.mark.parametrize("mcm_scale", [1.0, 30.0])
@pytest.mark.parametrize("trade_off", [0.5, 1.0, 3.0])
def test_ueo_weights_entropy_by_confidence_and_marginal_by_its_inverse(
    step, target, trade_off, mcm_scale
):
    """The confidence is the zero-shot one of each image, wherever it is in the batch."""
    w = (mcm_scale * target.cosines).softmax(dim=1).amax(dim=1)[[17, 3, 0, 11, 5, 8, 19, 2, 14]]
    p = step.logits.softmax(dim=1)
    marginal = (p / w[:, None]).sum(dim=0) / (1 / w).sum()
    expected = (w * entropy(p)).sum() / w.sum() - trade_off * entropy(marginal)
    method = UEO(trade_off, mcm_scale=mcm_scale)
    torch.testing.assert_close(loss_of(method, step, target), expected)


def test_the_order_of_a_batch_does_not_matter(step, target):
    order = torch.tensor([4, 2, 8, 0, 1, 7, 3, 6, 5])
    same = step._replace(
        cosines=step.cosines[order], logits=step.logits[order], positions=step.positions[order]
    )
    assert not torch.equal(same.positions, step.positions)
    torch.testing.assert_close(loss_of(UEO(), same, target), loss_of(UEO(), step, target))
    others = step._replace(positions=step.positions.flip(0))
    assert loss_of(UEO(), others, target) != loss_of(UEO(), step, target)


def test_online_confidence_is_the_batch_s_own_and_a_constant(step, target):
    logits = step.logits.clone().requires_grad_()
    changing = step._replace(cosines=logits / 7, logits=logits)
    w = (0.3 * step.cosines).softmax(dim=1).amax(dim=1)
    p = logits.softmax(dim=1)
    marginal = (p / w[:, None]).sum(dim=0) / (1 / w).sum()
    expected = (w * entropy(p)).sum() / w.sum() - entropy(marginal)
    found = loss_of(UEO(confidence="online", mcm_scale=0.3), changing, target)
    torch.testing.assert_close(found, expected)
    (gradient,) = torch.autograd.grad(found, logits)
    (wanted,) = torch.autograd.grad(expected, logits)
    torch.testing.assert_close(gradient, wanted)


def test_ueo_with_equal_confidence_is_infomax(step, target):
    equal = Target(target.images, cosines=torch.zeros(20, 5))
    torch.testing.assert_close(loss_of(UEO(), step, equal), loss_of(InfoMax(), step, equal))
    assert loss_of(UEO(), step, target) != loss_of(InfoMax(), step, target)


def test_eps_reproduces_the_authors_expression(step, target):
    w = target.cosines.softmax(dim=1).amax(dim=1)[step.positions]
    p = step.logits.softmax(dim=1)
    row = torch.sum(-p * torch.log(p + 1e-5), dim=1)
    mean = torch.mm(torch.diag(1 / w), p).sum(dim=0) / torch.sum(1 / w)
    expected = torch.sum(row * w) / torch.sum(w) - torch.sum(-mean * torch.log(mean + 1e-5))
    found = loss_of(UEO(eps=1e-5), step, target)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    assert abs(loss_of(UEO(), step, target) - expected) > 1e-7


def test_ueo_refuses_what_it_cannot_use(target):
    with pytest.raises(ValueError, match=r"confidence='always' is unknown.*zeroshot, online"):
        UEO(confidence="always")
    with pytest.raises(ValueError, match=r"mcm_scale must be from 1e-30 .*, got 0"):
        UEO(mcm_scale=0).objective(make_classifier(), target)
    with pytest.raises(ValueError, match=r"cosines is None.*zero_shot_target"):
        UEO().objective(make_classifier(), Target(target.images))


@pytest.mark.parametrize(
    "method",
    [EntMin(), InfoMax(), UEO(), UPL(k=4), POUF(), DANCE(), Oracle()],
    ids=lambda method: method.title,
)
def test_loss_methods_train_the_prompt_and_the_affine_parameters_only(method):
    classifier = make_classifier()
    before = copy.deepcopy(classifier.state_dict())
    history = method.adapt(
        classifier,
        zero_shot_target(classifier, make_images(), labels=torch.arange(12) % 4 - 1),
        config=TrainerConfig(epochs=1, batch_size=4, prompt_lr=0.1, affine_lr=0.1),
    )
    after = classifier.state_dict()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert 1 <= len(history) <= 3
    assert "prompt.context" in changed
    assert "model.visual.bn1.bias" in changed
    norms = [key for key in changed if key.startswith("model.visual.")]
    assert all(".bn" in key or ".downsample.1" in key for key in norms)
    assert len(norms) == len(changed) - 1
    assert not any("running" in key or "batches" in key for key in changed)


def test_zero_shot_changes_nothing():
    classifier = make_classifier()
    before = copy.deepcopy(classifier.state_dict())
    history = ZeroShot().adapt(classifier, Target(make_images()))
    assert len(history) == 0
    assert all(torch.equal(before[key], value) for key, value in classifier.state_dict().items())


def test_adabn_sets_the_statistics_of_the_target_and_no_weight():
    classifier = make_classifier()
    images = make_images(20)
    before = copy.deepcopy(classifier.state_dict())
    AdaBN(batch_size=20).adapt(classifier, Target(images, augmented=images.flip(3)))
    visual = classifier.model.visual
    with torch.no_grad():
        activations = visual.conv1(images)
    torch.testing.assert_close(visual.bn1.running_mean, activations.mean(dim=(0, 2, 3)))
    torch.testing.assert_close(
        visual.bn1.running_var, activations.transpose(0, 1).flatten(1).var(dim=1)
    )
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    for key, value in classifier.state_dict().items():
        same = torch.equal(before[key], value)
        assert same != key.endswith(statistics[:2]) or key.endswith(statistics[2]), key
    assert not any(module.training for module in classifier.modules())
    assert visual.bn1.momentum == 0.1


@pytest.mark.parametrize(("count", "batch_size"), [(24, 8), (23, 8), (17, 8), (9, 8), (5, 2)])
def test_adabn_weighs_every_image_the_same_however_ragged_the_batches(count, batch_size):
    """The first layer sees the images themselves: its mean is known, and its variance too."""
    classifier = make_classifier()
    visual = classifier.model.visual
    images = make_images(count)
    AdaBN(batch_size=batch_size).adapt(classifier, Target(images))
    with torch.no_grad():
        activations = visual.conv1(images).transpose(0, 1)  # (channels, images, H, W)
    torch.testing.assert_close(visual.bn1.running_mean, activations.mean(dim=(1, 2, 3)))
    loader = even_loader(images, batch_size, seed=TrainerConfig().seed)
    pooled = sum(len(index) * activations[:, index].flatten(1).var(dim=1) for _, index in loader)
    torch.testing.assert_close(visual.bn1.running_var, pooled / count)


@pytest.mark.parametrize(
    ("count", "batch_size", "sizes"),
    [
        (300, 256, [150, 150]),
        (257, 256, [129, 128]),
        (7, 3, [3, 2, 2]),
        (2, 256, [2]),
        (5, 2, [3, 2]),
    ],
)
def test_even_batches_cover_every_image_once(count, batch_size, sizes):
    images = torch.arange(float(count))[:, None, None, None].expand(count, 3, 2, 2)
    indices = []
    for batch, index in even_loader(images, batch_size, seed=4):
        assert torch.equal(batch[:, 0, 0, 0], index.float())
        indices.append(index)
    assert [len(index) for index in indices] == sizes
    assert sorted(torch.cat(indices).tolist()) == list(range(count))


@pytest.mark.parametrize(
    ("count", "batch_size", "message"),
    [
        (0, 256, r"images has 0 images.*at least 2; give more images"),
        (1, 256, r"images has 1 image,"),
        (4, 1, "batch_size must be at least 2.*got 1"),
    ],
)
def test_adabn_refuses_what_has_no_spread(count, batch_size, message):
    classifier = make_classifier()
    before = copy.deepcopy(classifier.state_dict())
    with pytest.raises(ValueError, match=message):
        AdaBN(batch_size=batch_size).adapt(classifier, Target(make_images(count)))
    assert all(torch.equal(before[key], value) for key, value in classifier.state_dict().items())


@pytest.mark.parametrize("training", [False, True])
def test_adabn_that_fails_leaves_the_classifier_as_it_was(training, monkeypatch):
    classifier = make_classifier().train(training)
    layers = [m for m in classifier.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    layers[0].momentum = 0.25
    before = copy.deepcopy(classifier.state_dict())
    batches = []
    image_features = classifier.image_features

    def fails_at_the_second_batch(batch):
        batches.append(len(batch))
        if len(batches) == 2:
            raise KeyboardInterrupt
        return image_features(batch)

    monkeypatch.setattr(classifier, "image_features", fails_at_the_second_batch)
    with pytest.raises(KeyboardInterrupt):
        AdaBN(batch_size=4).adapt(classifier, Target(make_images(8)))
    assert all(torch.equal(before[key], value) for key, value in classifier.state_dict().items())
    assert {layer.training for layer in layers} == {training}
    assert [layer.momentum for layer in layers] == [0.25] + [0.1] * (len(layers) - 1)


def test_adabn_needs_batch_norm():
    with pytest.raises(ValueError, match=r"visual tower has no BatchNorm .*choose another method"):
        AdaBN().adapt(make_classifier("vit"), Target(make_images()))


def test_adabn_that_meets_nan_says_so_and_leaves_the_classifier_as_it_was():
    classifier, images = make_classifier(), make_images(8)
    before = copy.deepcopy(classifier.state_dict())
    images[5] = math.nan
    with pytest.raises(NonFiniteLossError, match=r"statistics of BatchNorm became NaN.*images"):
        AdaBN(batch_size=4).adapt(classifier, Target(images))
    assert all(torch.equal(before[key], value) for key, value in classifier.state_dict().items())


@pytest.mark.parametrize("method", [UEO(), UEO(trade_off=0.5), InfoMax(), Oracle(), POUF()])
def test_a_batch_of_one_image_is_refused_where_images_are_compared(method):
    """``H(p) - H(p)``: nothing would be learnt, and nobody told."""
    config = TrainerConfig(batch_size=1)
    with pytest.raises(ValueError, match=r"batch_size is 1, but .* at least 2 images"):
        method.check(config)
    method.check(TrainerConfig(batch_size=2))
    classifier, images = make_classifier(), make_images(1)
    labels = torch.zeros(1, dtype=torch.int64)
    target = zero_shot_target(classifier, images, labels=labels)
    with pytest.raises(ValueError, match="there is 1 image, but"):
        method.adapt(classifier, target, config=TrainerConfig(batch_size=64))


@pytest.mark.parametrize("method", [EntMin(), DANCE(), UPL(), Tent(), ZeroShot(), UEO(trade_off=0)])
def test_a_batch_of_one_image_is_fine_where_each_is_seen_by_itself(method):
    method.check(TrainerConfig(batch_size=1))


def test_an_image_left_over_alone_adds_nothing_and_harms_nothing():
    """The last of 5 images in batches of 2: its step leaves all weights as they are."""
    classifier = make_classifier()
    target = zero_shot_target(classifier, make_images(5))
    seen = []

    def note(record):
        seen.append(torch.cat([p.detach().flatten() for p in classifier.parameters()]))

    config = TrainerConfig(epochs=2, batch_size=2, prompt_lr=10.0, affine_lr=10.0)
    InfoMax().adapt(classifier, target, config=config, hooks=Hooks(on_step=note))
    moved = [(after - before).abs().amax() for before, after in itertools.pairwise(seen)]
    for alone in (1, 4):  # what is left is rounding of the two entropies
        assert moved[alone] < 0.02 * moved[alone - 1]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: UEO(trade_off=1e31), "trade_off must be from -1e+06 to 1e+06, got 1e+31"),
        (lambda: UEO(trade_off=1e20), "trade_off must be from -1e+06"),
        (lambda: UEO(trade_off=math.nan), "trade_off"),
        (lambda: InfoMax(trade_off="one"), "trade_off must be a number, got str 'one'"),
        (lambda: Oracle(eps=1e-40), "eps must be 0 or from 1e-30"),
        (lambda: EntMin(eps=-1e-5), "eps must be 0 or from 1e-30"),
        (lambda: Tent(eps=1e40), "eps must be 0 or from 1e-30"),
        (lambda: UEO(mcm_scale=1e40), "mcm_scale must be from 1e-30 to 1e"),
        (lambda: UEO(mcm_scale=1e-40), "mcm_scale must be from 1e-30 to 1e"),
        (lambda: POUF(information_weight=math.inf), "information_weight must be from"),
        (lambda: DANCE(temperature=1e-40), "temperature must be from"),
        (lambda: UPL(k=10**29), "k must be at most 1,000,000,000, got 1"),
        (lambda: UPL(k=1.5), "k must be a whole number, got float 1.5"),
        (lambda: AdaBN(batch_size=1), "batch_size must be at least 2, got 1"),
        (lambda: TrainerConfig(batch_size=10**29), "batch_size must be at most 1,000,000,000"),
        (lambda: TrainerConfig(batch_size="64"), "batch_size must be a whole number, got str"),
        (lambda: TrainerConfig(epochs=None), "epochs must be a whole number, got NoneType"),
        (lambda: TrainerConfig(num_workers=10**8), "num_workers must be at most 1,024"),
        (lambda: TrainerConfig(seed=2**64), "seed must be at most 9,223,372,036,854,775,807"),
        (lambda: TrainerConfig(affine_lr=1e39), "affine_lr must be 0 or from 1e-30 to 1e+06"),
        (lambda: TrainerConfig(prompt_lr=1e-46), "prompt_lr must be 0 or from 1e-30 to 1e+06"),
        (lambda: UEO().check(TrainerConfig(prompt_lr=0, affine_lr=0)), "nothing to train"),
        (lambda: Tent().check(TrainerConfig(affine_lr=0)), "affine_lr is 0, but Tent"),
    ],
)
def test_a_choice_that_cannot_work_is_refused_before_anything_is_done(make, message):
    with pytest.raises((TypeError, ValueError)) as caught:
        make()
    assert message in str(caught.value)
