"""Tent: one pass over the stream, every batch predicted before it changes anything."""

from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch
from tiny_problem import NAMES, check_gradients, make_classifier, make_images, random_step

from ueo_fast.finetune.clip.model import ClipClassifier
from ueo_fast.finetune.clip.prompt import PromptLearner
from ueo_fast.finetune.demo.tiny_clip import tiny_clip, tiny_tokenizer
from ueo_fast.finetune.engine.hooks import Hooks
from ueo_fast.finetune.engine.trainer import NonFiniteLossError, TrainerConfig
from ueo_fast.finetune.methods import Tent
from ueo_fast.finetune.target import Target

CONFIG = TrainerConfig(batch_size=4, affine_lr=0.05)
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def entropy(logits):
    p = logits.softmax(dim=1)
    return -(p * p.log()).sum(dim=1)


def by_hand(tower, images, batch_size, rates):
    """The stream in a loop of its own, on an unpatched model: cosines, and the model after it."""
    model = tiny_clip(tower, seed=0)
    prompt = PromptLearner(model, tiny_tokenizer(), NAMES)
    classifier = ClipClassifier(model, prompt, patch=False)
    prompt.requires_grad_(False)
    for module in model.visual.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.train()
    affine = classifier.affine_parameters()
    found = []
    for batch, rate in zip(images.split(batch_size), rates, strict=True):
        cosines, logits = classifier(batch)
        found.append(cosines.detach())
        gradients = torch.autograd.grad(entropy(logits).mean(), affine)
        with torch.no_grad():
            for parameter, gradient in zip(affine, gradients, strict=True):
                parameter -= rate * gradient
    return torch.cat(found), classifier.eval()


@pytest.mark.parametrize(("tower", "rate"), [("bn", 0.05), ("vit", 1.0)])
def test_online_predictions_are_those_before_each_update(tower, rate):
    classifier, images, records = make_classifier(tower), make_images(14), []
    history = Tent().adapt(
        classifier,
        Target(images, augmented=images.flip(3)),
        config=dataclasses.replace(CONFIG, affine_lr=rate),
        hooks=Hooks(on_step=records.append),
    )
    rates = [record.learning_rates["affine"] for record in records]
    assert len(history) == 4
    assert rates == [rate] * 4
    expected, after = by_hand(tower, images, 4, rates)
    torch.testing.assert_close(history.online, expected, rtol=1e-4, atol=1e-5)
    state, wanted = classifier.state_dict(), after.state_dict()
    assert state.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(state[name], value, rtol=1e-3, atol=1e-5, msg=name)
    # The first batch is predicted by the untouched weights, later ones are not.
    still, _ = by_hand(tower, images, 4, [0.0] * 4)
    torch.testing.assert_close(history.online[:4], still[:4], rtol=1e-4, atol=1e-5)
    assert (history.online[4:] - still[4:]).abs().max() > 1e-3


def changed_by(tower):
    classifier = make_classifier(tower)
    before = copy.deepcopy(classifier.state_dict())
    Tent().adapt(classifier, Target(make_images()), config=CONFIG)
    assert not any(module.training for module in classifier.modules())
    after = classifier.state_dict()
    return {name for name in before if not torch.equal(before[name], after[name])}


def test_with_batch_norm_its_affine_parameters_and_statistics_change():
    changed = changed_by("bn")
    norms = (".bn", ".downsample.1.")
    assert all(name.startswith("model.visual.") for name in changed)
    assert all(any(norm in name for norm in norms) for name in changed)
    ends = {name.rpartition(".")[2] for name in changed}
    assert ends == {"weight", "bias", *STATISTICS}


def test_without_it_only_the_affine_parameters_change():
    changed = changed_by("vit")
    assert changed
    assert all(name.startswith("model.visual.") and ".ln_" in name for name in changed)


def test_one_pass_in_the_stream_s_own_order():
    images = make_images(12)
    seen = []

    class Stream(torch.utils.data.Dataset):
        def __len__(self):
            return 12

        def __getitem__(self, index):
            seen.append(index)
            return images[index]

    config = dataclasses.replace(CONFIG, epochs=7, prompt_lr=0.3)
    Tent().adapt(make_classifier("vit"), Target(Stream()), config=config)
    assert seen == list(range(12))


def test_loss_is_the_mean_entropy_and_predictions_go_to_their_images():
    objective = Tent().objective(make_classifier("vit"), Target(make_images(6)))
    step = random_step(torch.tensor([4, 0, 5]), classes=3)
    torch.testing.assert_close(objective(step), entropy(step.logits).mean())
    assert objective.online.isnan().all()
    objective.remember(step)
    assert torch.equal(objective.online[[4, 0, 5]], step.cosines.float())
    assert objective.online[[1, 2, 3]].isnan().all()
    check_gradients(objective, torch.tensor([1, 2]))
    twin = Tent().objective(make_classifier("vit"), Target(make_images(6)))
    twin.load_state_dict(objective.state_dict())
    torch.testing.assert_close(twin.online, objective.online, equal_nan=True)


def test_eps_is_the_authors():
    step = random_step(torch.arange(5), classes=3)
    p = step.logits.softmax(dim=1)
    expected = -(p * (p + 1e-5).log()).sum(dim=1).mean()
    objective = Tent(eps=1e-5).objective(make_classifier("vit"), Target(make_images(5)))
    torch.testing.assert_close(objective(step), expected, rtol=1e-12, atol=0)


def test_no_image_is_left_alone_with_batch_norm():
    warnings, sizes = [], []
    classifier = make_classifier()
    hooks = Hooks(on_step=sizes.append, on_warning=warnings.append)
    history = Tent().adapt(classifier, Target(make_images(13)), config=CONFIG, hooks=hooks)
    assert len(sizes) == 3  # 5 + 5 + 3
    assert "batch_size raised from 4 to 5" in warnings[0]
    assert not history.online.isnan().any()
    warnings.clear()
    history = Tent().adapt(
        make_classifier("vit"), Target(make_images(13)), config=CONFIG, hooks=hooks
    )
    assert not any("batch_size" in warning for warning in warnings)
    assert len(history) == 4


@pytest.mark.parametrize(
    ("count", "config", "message"),
    [
        (8, dataclasses.replace(CONFIG, affine_lr=0.0), "affine_lr is 0, but Tent trains"),
        (8, dataclasses.replace(CONFIG, batch_size=1), "batch_size is 1, but this tower has Batch"),
        (8, dataclasses.replace(CONFIG, micro_batch_size=2), "micro_batch_size is 2, but this tow"),
        (1, CONFIG, "there is 1 image, but this tower has BatchNorm"),
    ],
)
def test_refuses_what_it_cannot_do(count, config, message):
    classifier = make_classifier()
    before = copy.deepcopy(classifier.state_dict())
    with pytest.raises(ValueError, match=message):
        Tent().adapt(classifier, Target(make_images(count)), config=config)
    assert all(torch.equal(before[name], value) for name, value in classifier.state_dict().items())
    assert not classifier.training


def test_whoever_is_told_of_the_epoch_sees_the_adapted_model_in_evaluation_mode():
    classifier, images, found = make_classifier(), make_images(12), []

    def on_epoch(record):
        assert not any(module.training for module in classifier.modules())
        with torch.no_grad():
            found.append(classifier(images).cosines)

    Tent().adapt(classifier, Target(images), config=CONFIG, hooks=Hooks(on_epoch=on_epoch))
    assert len(found) == 1
    with torch.no_grad():
        assert torch.equal(classifier(images).cosines, found[0])


def test_a_stream_that_breaks_leaves_the_state_after_the_last_whole_step():
    classifier, images, states = make_classifier(), make_images(12), []
    images[9] = math.nan

    def on_step(record):
        states.append(copy.deepcopy(classifier.state_dict()))

    with pytest.raises(NonFiniteLossError):
        Tent().adapt(classifier, Target(images), config=CONFIG, hooks=Hooks(on_step=on_step))
    assert len(states) == 2
    for name, value in classifier.state_dict().items():
        assert torch.equal(value, states[-1][name]), name
    assert not any(module.training for module in classifier.modules())
