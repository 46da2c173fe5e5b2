"""How the training loop computes: micro-batches, half precision, memory format, compilation."""

from __future__ import annotations

import dataclasses
import functools
import warnings

import pytest
import torch
from engine_problem import (
    CONFIG,
    Breaking,
    MemoryStore,
    NanGradient,
    Remembering,
    Told,
    assert_same_state,
    infomax,
    make_classifier,
    make_images,
    state_of,
)
from saved_activations import saved_bytes

from ueo_fast.finetune.engine import forward
from ueo_fast.finetune.engine.hooks import Hooks
from ueo_fast.finetune.engine.objective import Objective
from ueo_fast.finetune.engine.trainer import NonFiniteLossError, train
from ueo_fast.finetune.engine.training_config import ImagePass
from ueo_fast.finetune.evaluation import predict
from ueo_fast.finetune.evaluation.predict import predict_cosines
from ueo_fast.gradient_cache import GradCache


@functools.cache
def trained_in_double(tower, micro_batch_size):
    """State and losses."""
    images, classifier = make_images(dtype=torch.float64), make_classifier(tower, torch.float64)
    config = dataclasses.replace(
        CONFIG, batch_size=7, momentum=0.9, micro_batch_size=micro_batch_size
    )
    objective, told = Remembering(infomax(images), 10).double(), Told()
    train(classifier, images, objective, config=config, hooks=told.hooks())
    return classifier.state_dict(), [record.loss for record in told.steps]


@pytest.mark.parametrize("tower", ["vit", "bn"])
@pytest.mark.parametrize("micro", [1, 3, 4])
def test_micro_batches_have_the_gradient_of_the_whole_batch(tower, micro):
    """In double, where the only difference left is the order of the sums."""
    state, losses = trained_in_double(tower, micro)
    expected, expected_losses = trained_in_double(tower, None)
    before = make_classifier(tower, torch.float64).state_dict()
    assert losses == pytest.approx(expected_losses, rel=1e-12, abs=1e-14)
    for name, value in expected.items():
        torch.testing.assert_close(state[name], value, rtol=1e-12, atol=1e-12)
    changed = [name for name in expected if not torch.equal(expected[name], before[name])]
    assert "prompt.context" in changed
    assert len(changed) > 1


def test_a_naive_sum_over_micro_batches_would_be_another_gradient(images):
    """The test above can fail: the loss couples the images of a batch."""

    def gradient(parts):
        classifier = make_classifier()
        for part in parts:
            step_logits = classifier(part).logits
            p = step_logits.softmax(dim=1)
            loss = (p.mean(dim=0) * p.mean(dim=0).log()).sum() * len(part) / len(images)
            loss.backward()
        return classifier.prompt.context.grad

    whole, sums = gradient([images]), gradient(images.split(3))
    assert (whole - sums).abs().max() > 1e-2 * whole.abs().max()


def test_micro_batches_hold_the_activations_of_one():
    classifier, images = make_classifier(), make_images(16)
    encode = classifier.image_features

    def cached(micro):
        cache = GradCache(encode, images.split(micro))
        cache.features.sum().backward()
        cache.backward()

    # Saved and freed one after the other; what is alive at a time is that of one micro-batch.
    alive, most = 0, 0

    def count(step):
        nonlocal alive, most

        def pack(tensor):
            nonlocal alive, most
            alive += tensor.untyped_storage().nbytes()
            most = max(most, alive)
            return tensor

        def unpack(tensor):
            nonlocal alive
            alive -= tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            step()
        return most

    whole = count(lambda: encode(images).sum().backward())
    alive, most = 0, 0
    parts = count(lambda: cached(2))
    assert saved_bytes(classifier, lambda: GradCache(encode, images.split(2)).features) == 0
    assert parts < whole / 3


def test_micro_batches_do_not_encode_twice_what_is_not_trained(images, monkeypatch):
    classifier, calls = make_classifier(), []
    encode = classifier.image_features
    monkeypatch.setattr(
        classifier, "image_features", lambda batch: calls.append(len(batch)) or encode(batch)
    )
    config = dataclasses.replace(CONFIG, epochs=1, affine_lr=0.0, micro_batch_size=3)
    train(classifier, images, infomax(images), config=config)
    assert calls == [3, 1, 3, 1, 2]


@pytest.mark.parametrize("kind", [torch.nn.BatchNorm2d, torch.nn.Dropout])
def test_micro_batches_refuse_what_treats_a_batch_as_one(images, kind):
    class Online(Objective):
        def prepare(self, classifier):
            for module in classifier.model.visual.modules():
                if isinstance(module, kind):
                    module.train()

        def forward(self, step):
            return step.logits.sum()

    classifier = make_classifier("bn")
    if kind is torch.nn.Dropout:
        classifier.model.visual.add_module("drop", torch.nn.Dropout(0.1))
    config = dataclasses.replace(CONFIG, micro_batch_size=8)
    before = state_of(classifier)
    with pytest.raises(ValueError, match=r"micro_batch_size=8 does not go .* in training mode"):
        train(classifier, images, Online(), config=config)
    assert_same_state(classifier, before)


@pytest.mark.parametrize("tower", ["vit", "bn"])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_is_for_the_towers_only(images, tower, precision):
    seen = []

    class Spying(Objective):
        def __init__(self):
            super().__init__()
            self.inner = infomax(images)

        def forward(self, step):
            seen.append([value.dtype for value in step[:4]])
            return self.inner(step)

    def trained(precision, objective):
        classifier = make_classifier(tower)
        config = dataclasses.replace(CONFIG, precision=precision)
        history = train(classifier, images, objective, config=config)
        return classifier, history

    classifier, history = trained(precision, Spying())
    expected, expected_history = trained("fp32", infomax(images))
    assert {dtype for step in seen for dtype in step} == {torch.float32}
    assert {p.dtype for p in classifier.parameters()} == {torch.float32}
    # bf16 has 8 bits: a tenth of what training changed would be far more than its rounding.
    assert history.conditional_entropy == pytest.approx(
        expected_history.conditional_entropy, rel=2e-2
    )
    assert not torch.equal(classifier.prompt.context, expected.prompt.context)
    start = make_classifier(tower).prompt.context
    change, wanted = classifier.prompt.context - start, expected.prompt.context - start
    if tower == "vit":  # the untrained "bn" tower says all but the same about every image
        assert (change - wanted).norm() < 0.2 * wanted.norm()


def test_half_precision_really_runs_in_half(images, monkeypatch):
    classifier, dtypes = make_classifier(), []
    convolution = classifier.model.visual.conv1
    convolution.register_forward_hook(lambda module, args, out: dtypes.append(out.dtype))
    for precision in ("fp32", "bf16", "fp16"):
        config = dataclasses.replace(CONFIG, epochs=1, batch_size=10, precision=precision)
        train(classifier, images, infomax(images), config=config)
    assert dtypes == [torch.float32, torch.bfloat16, torch.float16]


def test_a_device_without_autocast_is_named(images, monkeypatch):
    monkeypatch.setattr(forward, "_can_cast", lambda device, dtype: False)
    config = dataclasses.replace(CONFIG, precision="fp16")
    with pytest.raises(ValueError, match=r"precision='fp16' does not run on cpu.*take precision="):
        train(make_classifier(), images, infomax(images), config=config)


def test_fp16_leaves_an_overflow_out_and_lowers_its_scale(images):
    class Overflowing(Breaking):
        def forward(self, step):
            loss = self.inner(step)
            return NanGradient.apply(loss) if int(self.done) == 1 else loss

    classifier, store, states = make_classifier(), MemoryStore(), []
    config = dataclasses.replace(CONFIG, precision="fp16", checkpoint_every=1)
    hooks = Hooks(on_step=lambda record: states.append(state_of(classifier)), checkpoints=store)
    train(classifier, images, Overflowing(infomax(images), 0, None), config=config, hooks=hooks)
    scales = [saved.values["optimizer"]["scale"] for saved in store.saved]
    assert scales == [65536.0, *[32768.0] * 5]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(states[1]["prompt.context"], states[2]["prompt.context"])

    # The scale is part of the checkpoint.
    resumed, again = make_classifier(), MemoryStore(store.saved[2])
    objective = Overflowing(infomax(images), 0, None)
    train(resumed, images, objective, config=config, hooks=Hooks(checkpoints=again))
    assert_same_state(resumed, state_of(classifier))
    assert again.saved[-1].values == store.saved[-1].values


def test_fp16_that_overflows_for_ever_stops(images):
    classifier = make_classifier()
    before = state_of(classifier)
    config = dataclasses.replace(CONFIG, precision="fp16", epochs=20)
    objective = Breaking(infomax(images), 0, NanGradient.apply)
    with pytest.raises(NonFiniteLossError, match=r"overflowed in 32 steps in a row.*bf16"):
        train(classifier, images, objective, config=config)
    assert_same_state(classifier, before)


def test_channels_last_changes_the_layout_and_not_the_result(images):
    def trained(channels_last):
        classifier = make_classifier("bn")
        config = dataclasses.replace(CONFIG, channels_last=channels_last)
        history = train(classifier, images, infomax(images), config=config)
        return classifier, history

    classifier, history = trained(True)
    expected, expected_history = trained(False)
    weight = classifier.model.visual.conv2.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert not expected.model.visual.conv2.weight.is_contiguous(memory_format=torch.channels_last)
    assert history.conditional_entropy == pytest.approx(expected_history.conditional_entropy)
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(classifier.state_dict()[name], value, rtol=1e-4, atol=1e-6)


def test_compile_asks_for_one_graph_each_and_trains_the_same(images, monkeypatch):
    """With a backend that runs the captured graph as it is: capturing is what may fail."""
    graphs, compile = [], torch.compile

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def spied(function, **options):
        assert options == {"fullgraph": True}
        return compile(function, **options, backend=backend)

    monkeypatch.setattr(torch, "compile", spied)
    config = dataclasses.replace(CONFIG, epochs=1, batch_size=5)
    classifier, expected = make_classifier(), make_classifier()
    history = train(
        classifier, images, infomax(images), config=dataclasses.replace(config, compile=True)
    )
    assert len(graphs) == 2  # image tower and text tower
    assert history.loss == pytest.approx(
        train(expected, images, infomax(images), config=config).loss, rel=1e-3
    )
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(classifier.state_dict()[name], value, rtol=1e-4, atol=1e-6)


def test_what_cannot_be_compiled_is_an_error(images, monkeypatch):
    classifier = make_classifier()
    encode = classifier.image_features

    def breaks(batch):
        torch._dynamo.graph_break()
        return encode(batch)

    monkeypatch.setattr(classifier, "image_features", breaks)
    config = dataclasses.replace(CONFIG, compile=True)
    with pytest.raises(Exception, match="graph_break"):
        train(classifier, images, infomax(images), config=config)


@pytest.mark.slow  # the C++ compiler needs half a minute
@pytest.mark.parametrize("tower", ["vit", "bn"])
def test_inductor_compiles_both_towers(images, tower):
    config = dataclasses.replace(CONFIG, epochs=1)
    classifier, expected = make_classifier(tower), make_classifier(tower)
    train(classifier, images, infomax(images), config=dataclasses.replace(config, compile=True))
    train(expected, images, infomax(images), config=config)
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(classifier.state_dict()[name], value, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("native", [True, False])
def test_bfloat16_that_the_processor_emulates_is_warned_of_once(images, monkeypatch, native):
    monkeypatch.setattr(predict.platform, "machine", lambda: "x86_64")
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: native, raising=False)
    predict._warn_of_emulation.cache_clear()
    classifier = make_classifier()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        forward.Forward(classifier, dataclasses.replace(CONFIG, precision="fp32"))
        assert not caught
        for _ in range(2):
            forward.Forward(classifier, dataclasses.replace(CONFIG, precision="bf16"))
            predict_cosines(classifier, images, ImagePass(precision="bf16"))
    found = [str(warning.message) for warning in caught]
    assert len(found) == (0 if native else 1)
    assert all("times slower" in text and "--precision fp32" in text for text in found)
