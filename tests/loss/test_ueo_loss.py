"""Values and gradients of the loss against float64 truth (tests/truth.py states the rule)."""

from __future__ import annotations

import math

import pytest
import torch
from loss_backends import BACKENDS, COMPILED
from torch.nn.functional import pad
from truth import assert_exact

from ueo_fast import UEOLoss, ueo_loss, ueo_loss_and_grad
from ueo_fast.ops import ueo_loss as op

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
DTYPE_IDS = [str(dtype).removeprefix("torch.") for dtype in DTYPES]

# What each shape is there for.
SHAPES = {
    (1, 1): "the smallest",
    (1, 5): "one row: p equals q",
    (5, 1): "one class: no entropy anywhere",
    (3, 15): "below the width of one register",
    (4, 16): "exactly one register, one group of rows",
    (5, 17): "one register and one column, one group and one row",
    (31, 63): "below a block of rows",
    (32, 64): "exactly a block",
    (33, 65): "one more",
    (64, 345): "DomainNet's batch",
    (257, 7): "several blocks of few columns",
    (2, 1023): "below a tile",
    (2, 1024): "exactly a tile",
    (7, 1025): "a tile and one column",
    (130, 1000): "threads share the rows",
    (3, 50000): "few long rows: long sums in one row",
    (70000, 7): "many short rows: long sums in one column",
}


def make_logits(shape, dtype, backend, scale=3.0):
    generator = torch.Generator().manual_seed(0)
    return (scale * torch.randn(shape, generator=generator)).to(dtype).to(backend.device)


def loss_and_grad(logits, upstream=1.0, **options):
    leaf = logits.detach().requires_grad_()
    loss = ueo_loss(leaf, **options)
    (grad,) = torch.autograd.grad(loss * upstream, leaf)
    return loss.detach(), grad


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes_and_dtypes(shape, dtype, backend):
    logits = make_logits(shape, dtype, backend)
    loss, grad = loss_and_grad(logits, backend=backend)
    assert_exact(loss, grad, logits)


OPTIONS = {
    "no marginal": {"trade_off": 0.0},
    "negative trade-off": {"trade_off": -0.7},
    "large trade-off": {"trade_off": 1e3},
    "eps": {"eps": 1e-5},
    "large eps": {"eps": 0.1},
    "confidence at the authors' scale": {"confidence_scale": 0.01},
    "confidence at a large scale": {"confidence_scale": 20.0},
    "eps and scale": {"eps": 1e-5, "confidence_scale": 0.01, "trade_off": 0.5},
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_options(options, dtype, backend):
    logits = make_logits((61, 83), dtype, backend)
    loss, grad = loss_and_grad(logits, **options, backend=backend)
    assert_exact(loss, grad, logits, **options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("weights_dtype", [torch.float32, torch.float64, torch.float16])
def test_given_weights(dtype, weights_dtype, backend):
    logits = make_logits((61, 83), dtype, backend)
    confidence = (torch.rand(61, device=backend.device) + 0.05).to(weights_dtype)
    marginal = torch.rand(61, device=backend.device).to(weights_dtype)
    marginal[3] = 0
    for given in (
        {"confidence": confidence},
        {"marginal_weights": marginal},
        {"confidence": confidence, "marginal_weights": marginal, "eps": 1e-5},
        {"confidence": confidence.repeat(2)[::2]},
    ):
        loss, grad = loss_and_grad(logits, **given, backend=backend)
        assert_exact(loss, grad, logits, **given)


STRIDES = {
    "row slice": lambda z: z[::3],
    "column slice": lambda z: z[:, 5:71],
    "column step": lambda z: z[:, ::2],
    "transposed": lambda z: z.t(),
    "expanded row": lambda z: z[:1].expand(40, -1),
    "expanded column": lambda z: z[:, :1].expand(-1, 33),
    "expanded both": lambda z: z[:1, :1].expand(9, 33),
    "reversed by flip": lambda z: z.flip(1),
    "offset storage": lambda z: z.flatten()[7:].as_strided((30, 50), (51, 1)),
    "overlapping rows": lambda z: z.flatten().as_strided((30, 50), (3, 1)),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("view", STRIDES.values(), ids=STRIDES.keys())
def test_strides(view, dtype, backend):
    logits = view(make_logits((90, 83), dtype, backend))
    before = logits.clone()
    loss, grad = loss_and_grad(logits, backend=backend)
    assert_exact(loss, grad, logits)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
def test_gradient_of_a_large_batch_is_streamed_past_the_cache(dtype, backend):
    # 9 MiB of gradient is above kStreamBytes; 1,001 columns leave rows at every alignment.
    rows = (9 << 20) // (1001 * dtype.itemsize)
    logits = make_logits((rows, 1001), dtype, backend)
    loss, grad = loss_and_grad(logits, backend=backend)
    assert_exact(loss, grad, logits)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
def test_logits_ten_thousand_apart(dtype, backend):
    logits = make_logits((33, 50), dtype, backend, scale=1e4)
    logits[:, 0] = 1e4
    loss, grad = loss_and_grad(logits, backend=backend)
    assert torch.isfinite(grad).all()
    assert_exact(loss, grad, logits)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("eps", [0.0, 1e-5])
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
def test_minus_infinity_masks_a_class(dtype, eps, backend):
    logits = make_logits((40, 33), dtype, backend)
    masked = pad(logits, (0, 2), value=-math.inf)
    masked[:, [0, -1]] = masked[:, [-1, 0]]
    masked[3, 5:20] = -math.inf
    loss, grad = loss_and_grad(masked, eps=eps, backend=backend)
    assert (grad[masked == -math.inf] == 0).all()
    assert_exact(loss, grad, masked, eps=eps)


@pytest.mark.parametrize("backend", BACKENDS)
def test_masked_columns_change_nothing(backend):
    logits = make_logits((40, 33), torch.float32, backend)
    masked = pad(logits, (0, 31), value=-math.inf)
    torch.testing.assert_close(ueo_loss(masked, backend=backend), ueo_loss(logits, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("options", [{}, {"eps": 1e-5}, {"confidence_scale": 0.5}], ids=str)
@pytest.mark.parametrize("column", [0, 16, 36])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_and_infinity_are_never_a_silent_number(value, column, options, dtype, backend):
    logits = make_logits((40, 37), dtype, backend)
    logits[11, column] = value
    loss, stats = ueo_loss(logits, return_stats=True, backend=backend, **options)
    assert loss.isnan()
    assert stats.marginal_entropy.isnan()


# math.nan, all ones, the smallest quiet and signalling payloads, with either sign.
NAN_BITS = [0x7FC00000, -1, 0x7FC00001, 0x7F800001, -0x7FFFFF]


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("bits", NAN_BITS, ids=hex)
@pytest.mark.parametrize("column", [0, 36])
@pytest.mark.parametrize("options", [{}, {"eps": 1e-5}, {"confidence_scale": 0.5}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_every_nan_is_a_nan(dtype, options, column, bits, backend):
    logits = make_logits((40, 37), dtype, backend)
    if dtype == torch.float32:
        logits.view(torch.int32)[11, column] = bits
    else:
        logits.view(torch.int64)[11, column] = -1 if bits == -1 else (bits << 32) | 1
        logits[12, column] = torch.nan
    assert logits.isnan().any()
    loss, stats = ueo_loss(logits, return_stats=True, backend=backend, **options)
    assert loss.isnan()
    assert stats.marginal_entropy.isnan()
    assert op.max_softmax(backend, logits, 1.0).isnan().sum() == logits.isnan().sum()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_without_any_class_gives_nan(backend):
    logits = make_logits((40, 37), torch.float32, backend)
    logits[7] = -math.inf
    assert ueo_loss(logits, backend=backend).isnan()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
def test_an_empty_batch_gives_zero(dtype, backend):
    logits = torch.empty(0, 7, dtype=dtype, device=backend.device, requires_grad=True)
    confidence = torch.empty(0, device=backend.device)
    loss, stats = ueo_loss(logits, confidence, return_stats=True, backend=backend)
    loss.backward()
    assert loss == 0
    assert logits.grad.shape == (0, 7)
    assert all((value == 0).all() for value in stats)
    assert stats.marginal.shape == (7,)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["confidence", "marginal_weights"])
@pytest.mark.parametrize("scale", [2e-38, 1e-20, 1e20, 1e38])
def test_weights_at_the_ends_of_float32(scale, name, backend):
    logits = make_logits((64, 100), torch.float32, backend)
    weights = torch.rand(64, device=backend.device) + 1
    loss, stats = ueo_loss(logits, **{name: scale * weights}, return_stats=True, backend=backend)
    if name == "confidence":
        assert float(stats.mean_confidence) == pytest.approx(scale * float(weights.mean()))
    _, grad = loss_and_grad(logits, **{name: scale * weights}, backend=backend)
    assert_exact(loss, grad, logits, **{name: weights})


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
def test_statistics(dtype, backend):
    logits = make_logits((50, 21), dtype, backend)
    confidence = torch.rand(50, device=backend.device) + 0.1
    loss, stats = ueo_loss(logits, confidence, trade_off=0.4, return_stats=True, backend=backend)
    p = logits.double().softmax(1)
    w = confidence.double()
    q = ((1 / w) / (1 / w).sum()) @ p
    conditional = -(w / w.sum()) @ (p * p.log()).sum(1)
    marginal = -(q * q.log()).sum()
    tolerance = {"rtol": 1e-6, "atol": 1e-6, "check_dtype": False}
    torch.testing.assert_close(stats.marginal, q, **tolerance)
    torch.testing.assert_close(stats.conditional_entropy, conditional, **tolerance)
    torch.testing.assert_close(stats.marginal_entropy, marginal, **tolerance)
    torch.testing.assert_close(stats.mean_confidence, w.mean(), **tolerance)
    torch.testing.assert_close(loss, conditional - 0.4 * marginal, **tolerance)
    assert not any(value.requires_grad for value in stats)
    assert all(value.dtype == loss.dtype for value in stats)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
def test_loss_and_grad_at_once(dtype, backend):
    logits = make_logits((50, 21), dtype, backend).requires_grad_()
    loss, grad = ueo_loss_and_grad(logits, trade_off=0.4, backend=backend)
    assert_exact(loss, grad, logits, trade_off=0.4)
    if backend not in ("cuda", "cuda_host"):  # where a kernel of its own groups sums differently
        separate = loss_and_grad(logits, trade_off=0.4, backend=backend)
        assert torch.equal(loss, separate[0])
        assert torch.equal(grad, separate[1])
    for context in (torch.enable_grad(), torch.no_grad(), torch.inference_mode()):
        with context:
            again, grad_again = ueo_loss_and_grad(logits, trade_off=0.4, backend=backend)
        assert torch.equal(again, loss)
        assert torch.equal(grad_again, grad)
        assert not again.requires_grad
        assert not grad_again.requires_grad
    loss, grad, stats = ueo_loss_and_grad(logits, return_stats=True, backend=backend)
    torch.testing.assert_close(loss, stats.conditional_entropy - stats.marginal_entropy)
    assert grad.shape == logits.shape


@pytest.mark.parametrize("backend", BACKENDS)
def test_loss_and_grad_of_inference_tensors(backend):
    with torch.inference_mode():
        logits = make_logits((50, 21), torch.float32, backend)
        loss, grad = ueo_loss_and_grad(logits, backend=backend)
    assert_exact(loss.clone(), grad.clone(), logits.clone())


def test_module_passes_its_options_on():
    logits = torch.randn(50, 21)
    confidence = torch.rand(50) + 0.1
    marginal = torch.rand(50) + 0.1
    module = UEOLoss(0.3, eps=1e-5, return_stats=True, backend="cpp")
    loss, stats = module(logits, confidence, marginal_weights=marginal)
    options = {"marginal_weights": marginal, "trade_off": 0.3, "eps": 1e-5}
    assert torch.equal(loss, ueo_loss(logits, confidence, **options))
    assert stats.marginal.shape == (21,)
    assert torch.equal(
        UEOLoss(confidence_scale=0.1)(logits), ueo_loss(logits, confidence_scale=0.1)
    )
    assert repr(module) == (
        "UEOLoss(trade_off=0.3, confidence_scale=1.0, eps=1e-05, return_stats=True, backend='cpp')"
    )
    assert module.state_dict() == {}
