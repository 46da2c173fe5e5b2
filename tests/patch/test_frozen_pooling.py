"""Average pools: eager's values, gradients and layouts, and no input held."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from saved_activations import saved_bytes
from torch import nn

from ueo_fast.ops.frozen_pooling import frozen_adaptive_avg_pool2d, frozen_avg_pool2d

OPTIONS = [
    {"kernel_size": 2},
    {"kernel_size": (3, 2), "stride": (2, 1), "padding": 1},
    {"kernel_size": 3, "stride": 2, "ceil_mode": True},
    {"kernel_size": 3, "stride": 2, "padding": 1, "ceil_mode": True, "count_include_pad": False},
    {"kernel_size": 2, "divisor_override": 3},
    {"kernel_size": [2], "stride": []},
]
SIZES = [3, (3, 2), (None, 2), (None, None), 1, (1, 1), (2, None)]


def run(pool, x):
    x = x.detach().requires_grad_()
    y = pool(x)
    (gradient,) = torch.autograd.grad(y, x, torch.linspace(-1, 1, y.numel()).to(y).view(y.shape))
    return y, gradient


def assert_same(ours, theirs):
    for our, their in zip(ours, theirs, strict=True):
        assert our.dtype == their.dtype
        assert our.stride() == their.stride()
        assert torch.equal(our, their)


def image(layout: str, dtype: torch.dtype) -> torch.Tensor:
    x = torch.randn(2, 3, 8, 7, generator=torch.Generator().manual_seed(0)).to(dtype)
    if layout == "one image":
        return x[0]
    return x.to(memory_format=torch.channels_last) if layout == "last" else x


LAYOUTS = ["contiguous", "last", "one image"]
DTYPES = [torch.float32, torch.float64, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_average_pools(options, layout, dtype):
    x = image(layout, dtype)
    assert_same(
        run(lambda x: frozen_avg_pool2d(x, **options), x),
        run(lambda x: F.avg_pool2d(x, **options), x),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_adaptive_pools(size, layout, dtype):
    x = image(layout, dtype)
    assert_same(
        run(lambda x: frozen_adaptive_avg_pool2d(x, size), x),
        run(lambda x: F.adaptive_avg_pool2d(x, size), x),
    )


@pytest.mark.parametrize(
    ("pool", "ordinary"),
    [
        (lambda x: frozen_avg_pool2d(x, 2), lambda x: F.avg_pool2d(x, 2)),
        (lambda x: frozen_adaptive_avg_pool2d(x, 3), lambda x: F.adaptive_avg_pool2d(x, 3)),
        (lambda x: frozen_adaptive_avg_pool2d(x, 1), None),
    ],
)
def test_nothing_is_held(pool, ordinary):
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    nothing = nn.Identity()
    assert saved_bytes(nothing, lambda: pool(x)) == 0
    if ordinary is not None:
        assert saved_bytes(nothing, lambda: ordinary(x)) == x.numel() * 4


POOLS = [lambda x: frozen_avg_pool2d(x, 2), lambda x: frozen_adaptive_avg_pool2d(x, (3, 2))]


@pytest.mark.parametrize("pool", POOLS)
def test_first_and_second_derivatives(pool):
    x = torch.randn(1, 1, 4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(pool, x)
    assert torch.autograd.gradgradcheck(lambda x: pool(x).square(), x)


@pytest.mark.parametrize("pool", POOLS)
def test_functional_transforms(pool):
    x = torch.randn(2, 3, 6, 4, dtype=torch.float64)
    torch.testing.assert_close(torch.func.jvp(pool, (x,), (x,))[1], pool(x))
    assert torch.func.grad(lambda x: pool(x).sin().sum())(x).abs().sum() > 0


@pytest.mark.parametrize("pool", POOLS)
def test_compiled_as_one_graph(pool):
    torch.compiler.reset()
    x = image("last", torch.float32)
    ours = run(torch.compile(pool, fullgraph=True, backend="aot_eager"), x)
    torch.testing.assert_close(ours, run(pool, x))
