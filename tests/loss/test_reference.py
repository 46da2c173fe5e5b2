"""The reference: differentiable twice, in float64, with every option."""

from __future__ import annotations

import math

import pytest
import torch

from ueo_fast import reference

OPTIONS = [
    {},
    {"eps": 1e-5, "trade_off": 0.3},
    {"confidence": torch.tensor([0.2, 0.5, 0.9, 0.4]), "trade_off": -2.0},
    {"marginal_weights": torch.tensor([0.0, 0.5, 2.0, 0.1]), "confidence_scale": 0.1},
]


@pytest.mark.parametrize("options", OPTIONS, ids=range(len(OPTIONS)))
def test_gradcheck_and_gradgradcheck(options):
    torch.manual_seed(0)
    logits = torch.randn(4, 6, dtype=torch.float64)
    if options.get("confidence") is None:
        # The confidence is a constant of the method: hold it, or finite differences would see it.
        scale = options.get("confidence_scale", 1.0)
        options = dict(options, confidence=reference.max_softmax(logits, scale))
        options.pop("confidence_scale", None)
    logits.requires_grad_()

    def loss(z):
        return reference.ueo_loss(z, **options)

    assert torch.autograd.gradcheck(loss, (logits,))
    assert torch.autograd.gradgradcheck(loss, (logits,))


@pytest.mark.parametrize("eps", [0.0, 1e-5])
def test_masked_classes_have_finite_derivatives_of_both_orders(eps):
    logits = torch.randn(4, 6, dtype=torch.float64)
    logits[:, 2] = -math.inf
    logits[1, 4] = -math.inf
    logits.requires_grad_()
    loss = reference.ueo_loss(logits, eps=eps)
    (grad,) = torch.autograd.grad(loss, logits, create_graph=True)
    (second,) = torch.autograd.grad((grad**2).sum(), logits)
    for derivative in (grad, second):
        assert torch.isfinite(derivative).all()
        assert (derivative[logits == -math.inf] == 0).all()


def test_two_rows_by_hand():
    # p = (1/2, 1/2) and (1/4, 3/4); w = max p = (1/2, 3/4); v = 1/w = (2, 4/3).
    logits = torch.tensor([[0.0, 0.0], [0.0, math.log(3)]], dtype=torch.float64)
    entropies = [math.log(2), math.log(4) - 0.75 * math.log(3)]
    conditional = 0.4 * entropies[0] + 0.6 * entropies[1]
    q = 0.6 * 0.5 + 0.4 * 0.25
    marginal = -q * math.log(q) - (1 - q) * math.log(1 - q)
    assert reference.ueo_loss(logits).item() == pytest.approx(conditional - marginal, rel=1e-14)
    terms = reference.ueo_terms(logits)
    assert terms[2].item() == pytest.approx(0.625)
    assert terms[3].tolist() == pytest.approx([q, 1 - q])
