"""The classifier, and the training loop: what it computes, freezes, tells and refuses."""

from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch
from engine_problem import (
    CONFIG,
    NAMES,
    Told,
    infomax,
    make_classifier,
    state_of,
)
from torch.utils.data import TensorDataset

from ueo_fast.finetune.data.loader import training_batches
from ueo_fast.finetune.demo.tiny_clip import tiny_tokenizer
from ueo_fast.finetune.engine.hooks import Hooks
from ueo_fast.finetune.engine.objective import Objective
from ueo_fast.finetune.engine.trainer import TrainerConfig, train
from ueo_fast.finetune.engine.training_config import ImagePass
from ueo_fast.finetune.evaluation.predict import predict_cosines


def test_classifier_is_scaled_cosine_of_encoders(images):
    classifier = make_classifier()
    model = classifier.model
    tokens = tiny_tokenizer()([f"a photo of a {name}." for name in NAMES])
    with torch.no_grad():
        cosines, logits = classifier(images)
        expected = (
            model.encode_image(images, normalize=True) @ model.encode_text(tokens, normalize=True).T
        )
    torch.testing.assert_close(cosines, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(logits, model.logit_scale.exp() * expected, rtol=1e-5, atol=1e-5)


def test_classifier_trains_float32_masters_of_a_half_model():
    classifier = make_classifier(dtype=torch.bfloat16)
    assert {p.dtype for p in classifier.parameters()} == {torch.float32}
    assert {b.dtype for b in classifier.buffers()} <= {torch.float32, torch.int64}
    trained = {name for name, p in classifier.named_parameters() if p.requires_grad}
    assert "prompt.context" in trained
    assert "model.logit_scale" not in trained


def test_classifier_deep_copy_is_independent(images):
    classifier = make_classifier()
    twin = copy.deepcopy(classifier)
    before = predict_cosines(classifier, images)
    train(twin, images, infomax(images), config=CONFIG)
    assert torch.equal(predict_cosines(classifier, images), before)
    assert not torch.equal(predict_cosines(twin, images), before)


def test_predictions_do_not_depend_on_the_batch_size(images):
    classifier = make_classifier("bn")
    whole = predict_cosines(classifier, images)
    assert whole.shape == (10, 4)
    torch.testing.assert_close(
        predict_cosines(classifier, images, ImagePass(batch_size=3)), whole, rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
@pytest.mark.parametrize(("momentum", "weight_decay"), [(0.0, 0.0), (0.9, 0.3)])
def test_training_is_sgd_written_out(images, schedule, momentum, weight_decay):
    """Against a loop by hand: gradient, momentum, decay, learning rates, order of the images."""
    config = dataclasses.replace(
        CONFIG, schedule=schedule, momentum=momentum, weight_decay=weight_decay
    )
    classifier, expected, told = make_classifier(), make_classifier(), Told()
    history = train(classifier, images, infomax(images), config=config, hooks=told.hooks())

    groups = {
        "prompt": (expected.prompt_parameters(), config.prompt_lr),
        "affine": (expected.affine_parameters(), config.affine_lr),
    }
    velocity: dict[torch.Tensor, torch.Tensor] = {}
    losses, rates = [], []
    for step, batch in enumerate(training_batches(images, 4, seed=config.seed, epochs=2)):
        logits = expected(batch.images).logits
        p = logits.softmax(dim=1)
        loss = -(p * p.log()).sum(dim=1).mean() + (p.mean(dim=0) * p.mean(dim=0).log()).sum()
        losses.append(loss.item())
        expected.zero_grad()
        loss.backward()
        factor = 0.5 * (1 + math.cos(math.pi * step / 6)) if schedule == "cosine" else 1.0
        rates.append({name: rate * factor for name, (_, rate) in groups.items()})
        with torch.no_grad():
            for name, (parameters, _) in groups.items():
                for parameter in parameters:
                    change = parameter.grad + weight_decay * parameter
                    if parameter in velocity:
                        change = change + momentum * velocity[parameter]
                    velocity[parameter] = change
                    parameter -= rates[-1][name] * change
    assert len(losses) == len(history) == 6
    assert [record.learning_rates for record in told.steps] == rates
    assert history.loss == pytest.approx(losses, rel=1e-3, abs=1e-6)
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(classifier.state_dict()[name], value, rtol=1e-4, atol=1e-6)


def test_statistics_of_batch_norm_stay_frozen(images):
    classifier = make_classifier("bn")
    classifier.train()
    before = copy.deepcopy(dict(classifier.named_buffers()))
    train(classifier, images, infomax(images), config=CONFIG)
    assert not classifier.training
    for name, value in classifier.named_buffers():
        assert torch.equal(value, before[name]), name


def test_evaluation_mode_is_restored_whatever_is_raised(images):
    class Failing(Objective):
        def prepare(self, classifier):
            classifier.train()

        def forward(self, step):
            raise RuntimeError("out of luck")

    classifier = make_classifier()
    with pytest.raises(RuntimeError, match="out of luck"):
        train(classifier, images, Failing(), config=CONFIG)
    assert not any(module.training for module in classifier.modules())


def test_hooks_see_evaluation_mode_after_an_epoch_and_training_goes_on_as_it_was(images):
    class Online(Objective):
        modes: list[bool] = []  # noqa: RUF012

        def prepare(self, classifier):
            self.inner = infomax(images)
            object.__setattr__(self, "norm", classifier.model.visual.bn1)
            self.norm.train()

        def forward(self, step):
            self.modes.append(self.norm.training)
            return self.inner(step)

    classifier, seen = make_classifier("bn"), []
    hooks = Hooks(on_epoch=lambda record: seen.append(classifier.model.visual.bn1.training))
    train(classifier, images, Online(), config=CONFIG, hooks=hooks)
    assert Online.modes == [True] * 6
    assert seen == [False, False]


@pytest.mark.parametrize("frozen", ["prompt_lr", "affine_lr"])
def test_a_learning_rate_of_zero_freezes(images, frozen):
    classifier, told = make_classifier(), Told()
    before = state_of(classifier)
    rates = {"prompt_lr": 0.05, "affine_lr": 0.05, frozen: 0.0}
    config = TrainerConfig(epochs=1, **rates)
    train(classifier, images, infomax(images), config=config, hooks=told.hooks())
    changed = {k for k, v in classifier.state_dict().items() if not torch.equal(v, before[k])}
    assert changed
    assert ("prompt.context" in changed) == (frozen != "prompt_lr")
    assert any(key.startswith("model.visual") for key in changed) == (frozen != "affine_lr")
    assert told.steps[0].learning_rates == {
        "prompt": rates["prompt_lr"],
        "affine": rates["affine_lr"],
    }


def test_fixed_text_is_computed_once_and_in_evaluation_mode(images, monkeypatch):
    classifier = make_classifier().train()
    text_features = classifier.text_features
    modes = []

    def spied():
        modes.append((classifier.training, torch.is_grad_enabled()))
        return text_features()

    monkeypatch.setattr(classifier, "text_features", spied)
    config = dataclasses.replace(CONFIG, prompt_lr=0.0)
    assert len(train(classifier, images, infomax(images), config=config)) == 6
    assert modes == [(False, False)]


def test_records_say_what_the_batches_were_predicted_as(images):
    classifier, told = make_classifier(), Told()
    config = dataclasses.replace(CONFIG, epochs=1, batch_size=6, prompt_lr=1e-9, affine_lr=1e-9)
    with torch.no_grad():
        p = classifier(images).logits.softmax(dim=1).double()
    history = train(classifier, images, infomax(images), config=config, hooks=told.hooks())

    def conditional(p):
        return -(p * p.log()).sum(dim=1).mean().item()

    def marginal(p):
        return -(p.mean(dim=0) * p.mean(dim=0).log()).sum().item()

    batches = list(training_batches(images, 6, seed=config.seed, epochs=1))
    for step, (record, batch) in enumerate(zip(told.steps, batches, strict=True)):
        q = p[batch.positions]
        assert (record.step, record.total, record.epoch) == (step + 1, 2, 1)
        assert record.conditional_entropy == pytest.approx(conditional(q), rel=1e-4)
        assert record.marginal_entropy == pytest.approx(marginal(q), rel=1e-4)
        assert record.loss == pytest.approx(conditional(q) - marginal(q), abs=1e-5)
        counts = q.argmax(dim=1).bincount(minlength=4)
        assert record.largest_share == pytest.approx(int(counts.max()) / len(q))
        assert record.seconds > 0
        assert history.loss[step] == record.loss
    (epoch,) = told.epochs
    assert epoch.histogram == tuple(p.argmax(dim=1).bincount(minlength=4).tolist())
    assert epoch.conditional_entropy == pytest.approx(conditional(p), rel=1e-4)
    assert epoch.marginal_entropy == pytest.approx(marginal(p), rel=1e-4)
    assert epoch.loss == pytest.approx(sum(history.loss) / 2)
    (start,) = told.starts
    assert (start.step, start.total, start.epoch) == (0, 2, 0)


def test_images_may_be_a_dataset_and_keep_their_order(images):
    seen = []

    class Spying(Objective):
        def __init__(self):
            super().__init__(torch.tensor([7, 1, 4, 2, 9]))
            self.inner = infomax(images)

        def forward(self, step):
            seen.append(step.positions.tolist())
            return self.inner(step)

    config = dataclasses.replace(CONFIG, shuffle=False)
    train(make_classifier(), TensorDataset(images, torch.zeros(10)), Spying(), config=config)
    assert seen == [[7, 1, 4, 2], [9]] * 2


def test_a_seed_decides_everything(images):
    def weights(seed):
        classifier = make_classifier()
        config = TrainerConfig(epochs=1, batch_size=4, prompt_lr=0.05, affine_lr=0.05, seed=seed)
        train(classifier, images, infomax(images), config=config)
        return torch.cat([p.flatten() for p in classifier.parameters()])

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"affine_lr": -1}, r"affine_lr must be 0 or from 1e-30 to 1e\+06, got -1"),
        ({"prompt_lr": math.nan}, r"prompt_lr must be 0 or from 1e-30 to 1e\+06, got nan"),
        ({"weight_decay": math.inf}, "weight_decay must be 0 or from .*, got inf"),
        ({"momentum": 1.0}, r"momentum must lie in \[0, 1\), got 1.0"),
        ({"micro_batch_size": 0}, "micro_batch_size must be at least 1, got 0"),
        ({"early_stop": 0}, "early_stop must be at least 1, got 0"),
        ({"checkpoint_every": -1}, "checkpoint_every must be at least 0, got -1"),
        ({"schedule": "linear"}, "schedule='linear' is unknown: choose one of cosine, constant"),
        ({"precision": "int8"}, "precision='int8' is unknown: choose one of fp32, bf16, fp16"),
    ],
)
def test_choices_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        TrainerConfig(**options)


def test_nothing_to_train_is_an_error(images):
    config = TrainerConfig(prompt_lr=0, affine_lr=0)
    with pytest.raises(ValueError, match="nothing to train: prompt_lr and affine_lr are both 0"):
        train(make_classifier(), images, infomax(images), config=config)
    with pytest.raises(ValueError, match="images is empty"):
        train(make_classifier(), images[:0], infomax(images))
