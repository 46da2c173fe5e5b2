"""The maximum concept matching score."""

from __future__ import annotations

import pytest
import torch
from loss_backends import BACKENDS

from ueo_fast import mcm_score, reference
from ueo_fast.ops import ueo_loss as op

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def score_on(backend, cosines, scale=1.0):
    """What mcm_score gives where it chooses this backend."""
    if backend == "reference":
        return reference.max_softmax(cosines, scale)
    return op.max_softmax(backend, cosines, scale)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (64, 345), (3, 5000), (3000, 3)])
@pytest.mark.parametrize("scale", [1.0, 0.01, 100.0])
def test_against_softmax_in_double(dtype, shape, scale, backend):
    cosines = (torch.rand(shape).to(dtype) * 2 - 1).to(backend.device)
    score = score_on(backend, cosines, scale)
    truth = (scale * cosines.double()).softmax(1).amax(1)
    rtol = 1e-13 if dtype == torch.float64 else 1e-5 if scale == 100 else 1e-6
    torch.testing.assert_close(score.double(), truth, rtol=rtol, atol=0)
    assert score.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "view", [lambda x: x.t(), lambda x: x[::2, 1::3], lambda x: x[:1].expand(9, -1)]
)
def test_strides(view, backend):
    cosines = view(torch.rand(20, 33, device=backend.device))
    torch.testing.assert_close(score_on(backend, cosines), cosines.softmax(1).amax(1))


def test_the_fastest_backend_is_chosen():
    cosines = torch.rand(20, 33)
    assert torch.equal(mcm_score(cosines, 0.5), op.max_softmax("cpp", cosines, 0.5))


def test_differentiable_where_the_cosines_are():
    cosines = torch.rand(6, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(mcm_score, (cosines,))
    assert not mcm_score(cosines.detach()).requires_grad
    with torch.no_grad():
        assert not mcm_score(cosines).requires_grad


@pytest.mark.parametrize("backend", BACKENDS)
def test_masked_classes_nan_and_empty_batch(backend):
    cosines = torch.rand(4, 5, device=backend.device)
    cosines[0, 2:] = -torch.inf
    cosines[1, 3] = torch.nan
    score = score_on(backend, cosines)
    torch.testing.assert_close(score[0], cosines[0, :2].softmax(0).amax())
    assert score[1].isnan()
    assert score_on(backend, cosines[:0]).shape == (0,)


def test_compile_fullgraph():
    cosines = torch.rand(6, 4)
    compiled = torch.compile(lambda x: mcm_score(x, 0.5) + 1, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(cosines), mcm_score(cosines, 0.5) + 1)
