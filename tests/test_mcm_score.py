"""The maximum concept matching score."""

from __future__ import annotations

import pytest
import torch

from ueo_fast import mcm_score

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (64, 345), (3, 5000), (3000, 3)])
@pytest.mark.parametrize("scale", [1.0, 0.01, 100.0])
def test_against_softmax_in_double(dtype, shape, scale):
    cosines = torch.rand(shape).to(dtype) * 2 - 1
    score = mcm_score(cosines, scale)
    truth = (scale * cosines.double()).softmax(1).amax(1)
    rtol = 1e-13 if dtype == torch.float64 else 1e-5 if scale == 100 else 1e-6
    torch.testing.assert_close(score.double(), truth, rtol=rtol, atol=0)
    assert score.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize(
    "view", [lambda x: x.t(), lambda x: x[::2, 1::3], lambda x: x[:1].expand(9, -1)]
)
def test_strides(view):
    cosines = view(torch.rand(20, 33))
    torch.testing.assert_close(mcm_score(cosines), cosines.softmax(1).amax(1))


def test_differentiable_where_the_cosines_are():
    cosines = torch.rand(6, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(mcm_score, (cosines,))
    assert not mcm_score(cosines.detach()).requires_grad
    with torch.no_grad():
        assert not mcm_score(cosines).requires_grad


def test_masked_classes_nan_and_empty_batch():
    cosines = torch.rand(4, 5)
    cosines[0, 2:] = -torch.inf
    cosines[1, 3] = torch.nan
    score = mcm_score(cosines)
    torch.testing.assert_close(score[0], cosines[0, :2].softmax(0).amax())
    assert score[1].isnan()
    assert mcm_score(torch.empty(0, 5)).shape == (0,)


def test_compile_fullgraph():
    cosines = torch.rand(6, 4)
    compiled = torch.compile(lambda x: mcm_score(x, 0.5) + 1, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(cosines), mcm_score(cosines, 0.5) + 1)
