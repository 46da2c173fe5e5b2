"""What must hold for any input: invariances, special cases, and random shapes and strides."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from loss_backends import BACKENDS, spared_reason
from torch import Tensor
from truth import assert_exact

from ueo_fast import ueo_loss, ueo_loss_and_grad


def make_logits(rows, columns, seed=0, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(rows, columns, generator=generator, dtype=torch.float64).to(device)


def infomax(logits: Tensor) -> Tensor:
    """Mean entropy minus entropy of the mean (Krause et al., 2010)."""
    p = logits.softmax(1)
    mean = p.mean(0)
    return -(p * p.log()).sum(1).mean() + (mean * mean.log()).sum()


def entropy_minimization(logits: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean entropy (Grandvalet and Bengio, 2004)."""
    p = logits.softmax(1)
    return -(weights * (p * p.log()).sum(1)).sum() / weights.sum()


def authors_expression(logits: Tensor, w: Tensor) -> Tensor:
    """The released code's form: entropies with log(p + 1e-5), a B x B diagonal of the weights."""
    softmax = logits.softmax(1)
    normalized = w / w.sum()
    inverse = (1 / w) / (1 / w).sum()
    entropy = (-softmax * torch.log(softmax + 1e-5)).sum(1)
    conditional = (torch.diag(normalized) @ entropy[:, None]).sum()
    mean = (torch.diag(inverse) @ softmax).sum(0)
    return conditional - (-mean * torch.log(mean + 1e-5)).sum()


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_confidences_give_infomax(backend):
    logits = make_logits(40, 23, device=backend.device)
    loss = ueo_loss(logits, torch.full((40,), 0.37, device=backend.device), backend=backend)
    torch.testing.assert_close(loss, infomax(logits))


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_trade_off_gives_weighted_entropy_minimization(backend):
    logits = make_logits(40, 23, device=backend.device)
    weights = torch.rand(40, dtype=torch.float64, device=backend.device) + 0.1
    loss = ueo_loss(logits, weights, trade_off=0, backend=backend)
    torch.testing.assert_close(loss, entropy_minimization(logits, weights))


@pytest.mark.parametrize("backend", BACKENDS)
def test_eps_reproduces_the_authors_expression(backend):
    logits = make_logits(40, 23, device=backend.device).requires_grad_()
    w = (0.01 * logits.detach()).softmax(1).amax(1)
    theirs = authors_expression(logits, w)
    ours = ueo_loss(logits, w, eps=1e-5, backend=backend)
    internal = ueo_loss(logits, confidence_scale=0.01, eps=1e-5, backend=backend)
    torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(internal, theirs, rtol=1e-13, atol=1e-13)
    (true,) = torch.autograd.grad(theirs, logits)
    (grad,) = torch.autograd.grad(ours, logits)
    torch.testing.assert_close(grad, true, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", [{}, {"eps": 1e-5, "confidence_scale": 0.1}], ids=str)
def test_shifting_a_row_changes_nothing(options, backend):
    logits = make_logits(40, 23, device=backend.device)
    shifted = logits + 100 * torch.randn(40, 1, dtype=torch.float64, device=backend.device)
    loss, grad = ueo_loss_and_grad(logits, backend=backend, **options)
    again, grad_again = ueo_loss_and_grad(shifted, backend=backend, **options)
    torch.testing.assert_close(again, loss, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(grad_again, grad, rtol=1e-9, atol=1e-13)
    torch.testing.assert_close(grad.sum(1), torch.zeros_like(grad[:, 0]), rtol=0, atol=1e-14)


@pytest.mark.parametrize("backend", BACKENDS)
def test_permuting_rows_and_columns_permutes_the_gradient(backend):
    logits = make_logits(300, 23, device=backend.device)
    weights = torch.rand(300, dtype=torch.float64, device=backend.device) + 0.1
    rows, columns = torch.randperm(300), torch.randperm(23)
    loss, grad = ueo_loss_and_grad(logits, weights, backend=backend)
    permuted = logits[rows][:, columns]
    again, grad_again = ueo_loss_and_grad(permuted, weights[rows], backend=backend)
    torch.testing.assert_close(again, loss)
    torch.testing.assert_close(grad_again, grad[rows][:, columns])


@pytest.mark.parametrize("backend", BACKENDS)
def test_scaling_the_weights_changes_nothing(backend):
    logits = make_logits(40, 23, device=backend.device)
    weights = torch.rand(40, dtype=torch.float64, device=backend.device) + 0.1
    loss = ueo_loss(logits, weights, marginal_weights=weights**2, backend=backend)
    for scale in (1e30, 1e300):
        scaled = ueo_loss(
            logits, scale * weights, marginal_weights=weights**2 / scale, backend=backend
        )
        torch.testing.assert_close(scaled, loss)


FLOATS = st.one_of(
    st.floats(-50, 50, width=16),
    st.sampled_from([0.0, -0.0, -math.inf, 1e4, -1e4, 6e-8, 60000.0]),
)


@st.composite
def strided_logits(draw):
    rows, columns = draw(st.integers(1, 40)), draw(st.integers(1, 70))
    dtype = draw(st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]))
    row_step, column_step = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    seed = draw(st.integers(0, 2**31))
    logits = make_logits(rows * row_step, columns * column_step, seed=seed).to(dtype)
    logits = logits[::row_step, ::column_step]
    if draw(st.booleans()):
        logits = logits.t()
    rows, columns = logits.shape
    for _ in range(draw(st.integers(0, 6))):
        row, column = draw(st.integers(0, rows - 1)), draw(st.integers(0, columns - 1))
        logits[row, column] = draw(FLOATS)
    alive = (logits > -math.inf).any(1)
    logits[~alive, 0] = 0  # a row without any class is NaN by contract, and tested elsewhere
    return logits


def on_device(logits, backend):
    """A copy with the same strides."""
    copy = torch.empty_strided(
        logits.shape, logits.stride(), dtype=logits.dtype, device=backend.device
    )
    return copy.copy_(logits)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    logits=strided_logits(),
    trade_off=st.floats(-2, 2),
    eps=st.sampled_from([0.0, 1e-5]),
    scale=st.sampled_from([1.0, 0.01, 3.0]),
    given_weights=st.booleans(),
    upstream=st.floats(-8, 8),
)
def test_random_inputs(backend, logits, trade_off, eps, scale, given_weights, upstream):
    assume(spared_reason(backend, "", logits.dtype) is None)
    logits = on_device(logits, backend)
    options = {"trade_off": trade_off, "eps": eps}
    if given_weights:
        options["confidence"] = torch.rand(logits.shape[0], device=backend.device) + 0.05
    else:
        options["confidence_scale"] = scale
    leaf = logits.detach().requires_grad_()
    loss = ueo_loss(leaf, **options, backend=backend)
    (grad,) = torch.autograd.grad(loss * upstream, leaf)
    assert_exact(loss.detach(), grad, logits, upstream=upstream, **options)
