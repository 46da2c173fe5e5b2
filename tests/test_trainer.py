"""The classifier, its batches, the zero-shot confidence and the training loop."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch.utils.data import TensorDataset

from ueo_fast.finetune.batches import indexed_loader
from ueo_fast.finetune.confidence import zero_shot_confidence
from ueo_fast.finetune.demo.tiny_clip import tiny_clip, tiny_tokenizer
from ueo_fast.finetune.methods import UEO, InfoMax
from ueo_fast.finetune.model import ClipClassifier
from ueo_fast.finetune.predict import predict_cosines
from ueo_fast.finetune.prompt import PromptLearner
from ueo_fast.finetune.trainer import NonFiniteLossError, TrainerConfig, train

NAMES = ["one", "two", "three", "four"]


def make_classifier(dtype: torch.dtype = torch.float32, tower: str = "vit") -> ClipClassifier:
    model = tiny_clip(tower, seed=0).to(dtype)
    return ClipClassifier(model, PromptLearner(model, tiny_tokenizer(), NAMES))


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(10, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1


CONFIG = TrainerConfig(epochs=2, batch_size=4, prompt_lr=0.05, affine_lr=0.02, seed=3)


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
    classifier = make_classifier(torch.bfloat16)
    assert {p.dtype for p in classifier.parameters()} == {torch.float32}
    assert {b.dtype for b in classifier.buffers()} <= {torch.float32, torch.int64}
    trained = {name for name, p in classifier.named_parameters() if p.requires_grad}
    assert "prompt.context" in trained
    assert "model.logit_scale" not in trained


def test_classifier_deep_copy_is_independent(images):
    classifier = make_classifier()
    twin = copy.deepcopy(classifier)
    before = predict_cosines(classifier, images)
    train(twin, images, InfoMax().loss, config=CONFIG)
    assert torch.equal(predict_cosines(classifier, images), before)
    assert not torch.equal(predict_cosines(twin, images), before)


def test_predictions_do_not_depend_on_the_batch_size(images):
    classifier = make_classifier(tower="bn")
    whole = predict_cosines(classifier, images)
    assert whole.shape == (10, 4)
    torch.testing.assert_close(
        predict_cosines(classifier, images, batch_size=3), whole, rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("mcm_scale", [1.0, 100.0])
def test_confidence_is_the_largest_softmax_of_scaled_cosines(images, mcm_scale):
    classifier = make_classifier()
    confidence = zero_shot_confidence(classifier, images, mcm_scale=mcm_scale)
    cosines = predict_cosines(classifier, images)
    torch.testing.assert_close(confidence, (mcm_scale * cosines).softmax(dim=1).amax(dim=1))
    assert not confidence.requires_grad


def test_confidence_scale_is_checked(images):
    with pytest.raises(ValueError, match="mcm_scale must be positive, got 0"):
        zero_shot_confidence(make_classifier(), images, mcm_scale=0)


def test_batches_carry_the_index_of_their_images():
    images = torch.arange(10.0)[:, None, None, None].expand(10, 3, 2, 2)
    labels = torch.zeros(10)
    for source in (images, TensorDataset(images, labels)):
        seen = []
        for batch, index in indexed_loader(source, 4, shuffle_seed=5):
            assert torch.equal(batch[:, 0, 0, 0], index.float())
            seen.append(index)
        assert [len(index) for index in seen] == [4, 4, 2]
        assert torch.cat(seen).sort().values.tolist() == list(range(10))
        assert torch.cat(seen).tolist() != list(range(10))
    with pytest.raises(ValueError, match="images is empty"):
        indexed_loader(images[:0], 4)


def test_training_is_plain_sgd_on_a_cosine_schedule(images):
    """The loop against one written out: gradient, learning rate of each step, order of images."""
    classifier, expected = make_classifier(), make_classifier()
    history = train(classifier, images, InfoMax().loss, config=CONFIG)

    loader = indexed_loader(images, CONFIG.batch_size, shuffle_seed=CONFIG.seed)
    groups = (
        (expected.prompt_parameters(), CONFIG.prompt_lr),
        (expected.affine_parameters(), CONFIG.affine_lr),
    )
    step, losses = 0, []
    for _ in range(CONFIG.epochs):
        for batch, _ in loader:
            loss = InfoMax().loss(expected(batch).logits, None)
            losses.append(loss.item())
            expected.zero_grad()
            loss.backward()
            decay = 0.5 * (1 + math.cos(math.pi * step / 6))
            with torch.no_grad():
                for parameters, rate in groups:
                    for parameter in parameters:
                        parameter -= rate * decay * parameter.grad
            step += 1
    assert step == len(history) == 6
    assert history.loss == pytest.approx(losses, rel=1e-4, abs=1e-6)
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(classifier.state_dict()[name], value, rtol=1e-4, atol=1e-6)


def test_statistics_of_batch_norm_stay_frozen(images):
    classifier = make_classifier(tower="bn")
    classifier.train()
    before = copy.deepcopy(dict(classifier.named_buffers()))
    train(classifier, images, InfoMax().loss, config=CONFIG)
    assert not classifier.training
    for name, value in classifier.named_buffers():
        assert torch.equal(value, before[name]), name


def test_a_frozen_prompt_is_encoded_in_evaluation_mode(images, monkeypatch):
    classifier = make_classifier().train()
    text_features = classifier.text_features
    modes = []

    def spied():
        modes.append(classifier.training)
        return text_features()

    monkeypatch.setattr(classifier, "text_features", spied)
    config = TrainerConfig(epochs=1, prompt_lr=0.0, affine_lr=0.05)
    train(classifier, images, InfoMax().loss, config=config)
    assert modes == [False]


@pytest.mark.parametrize("frozen", ["prompt_lr", "affine_lr"])
def test_a_learning_rate_of_zero_freezes(images, frozen):
    classifier = make_classifier()
    before = copy.deepcopy(classifier.state_dict())
    rates = {"prompt_lr": 0.05, "affine_lr": 0.05, frozen: 0.0}
    train(classifier, images, InfoMax().loss, config=TrainerConfig(epochs=1, **rates))
    changed = {k for k, v in classifier.state_dict().items() if not torch.equal(v, before[k])}
    assert changed
    assert ("prompt.context" in changed) == (frozen != "prompt_lr")
    assert any(key.startswith("model.visual") for key in changed) == (frozen != "affine_lr")


def test_confidence_is_looked_up_by_image_index(images):
    confidence = torch.linspace(0.1, 1.0, 10)
    seen = []

    def loss(logits, weights):
        seen.append(weights)
        return UEO().loss(logits, weights)

    train(make_classifier(), images, loss, confidence=confidence, config=CONFIG)
    loader = indexed_loader(images, CONFIG.batch_size, shuffle_seed=CONFIG.seed)
    order = torch.cat([index for _ in range(CONFIG.epochs) for _, index in loader])
    assert torch.equal(torch.cat(seen), confidence[order])


def test_history_has_the_entropies_of_each_step(images):
    classifier = make_classifier()
    config = TrainerConfig(epochs=1, batch_size=10, prompt_lr=0.01, affine_lr=0.01)
    with torch.no_grad():
        p = classifier(images).logits.softmax(dim=1)
    steps = []
    history = train(
        classifier,
        images,
        InfoMax().loss,
        config=config,
        on_step=lambda *report: steps.append(report),
    )
    mean = p.mean(dim=0)
    conditional = -(p * p.log()).sum(dim=1).mean().item()
    marginal = -(mean * mean.log()).sum().item()
    assert history.conditional_entropy == [pytest.approx(conditional, rel=1e-4)]
    assert history.marginal_entropy == [pytest.approx(marginal, rel=1e-4)]
    assert history.loss == [pytest.approx(conditional - marginal, rel=1e-3)]
    assert steps == [(1, 1, history.loss[0])]


def test_a_seed_decides_everything(images):
    def weights(seed):
        classifier = make_classifier()
        config = TrainerConfig(epochs=1, batch_size=4, prompt_lr=0.05, affine_lr=0.05, seed=seed)
        train(classifier, images, InfoMax().loss, config=config)
        return torch.cat([p.flatten() for p in classifier.parameters()])

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


def test_a_nan_loss_stops_before_it_reaches_the_weights(images):
    classifier = make_classifier()
    snapshots = []

    def loss(logits, confidence):
        value = InfoMax().loss(logits, confidence)
        return value * float("nan") if snapshots else value

    def on_step(done, total, value):
        snapshots.append(copy.deepcopy(classifier.state_dict()))

    with pytest.raises(NonFiniteLossError, match=r"became nan at step 2 of 6.*Lower the learning"):
        train(classifier, images, loss, config=CONFIG, on_step=on_step)
    (after_first,) = snapshots
    assert all(torch.equal(after_first[k], v) for k, v in classifier.state_dict().items())


def test_wrong_arguments_are_named(images):
    classifier = make_classifier()
    with pytest.raises(ValueError, match=r"confidence has shape \(9,\), but there are 10 images"):
        train(classifier, images, UEO().loss, confidence=torch.ones(9))
    config = TrainerConfig(prompt_lr=0, affine_lr=0)
    with pytest.raises(ValueError, match="nothing to train: prompt_lr and affine_lr are both 0"):
        train(classifier, images, UEO().loss, config=config)
    with pytest.raises(ValueError, match="epochs must be at least 1, got 0"):
        TrainerConfig(epochs=0)
    with pytest.raises(ValueError, match="affine_lr must not be negative, got -1"):
        TrainerConfig(affine_lr=-1)
