"""The Triton kernels of layer normalisation where their tiles and chunks end."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from test_triton_affine import (
    DEVICE,
    DTYPES,
    OPS,
    assert_no_worse,
    compute_dtype,
    make,
)

launchers = pytest.importorskip("ueo_fast.triton.layer_norm")
autotune = pytest.importorskip("ueo_fast.triton.autotune")
op = pytest.importorskip("ueo_fast.ops.layer_norm")

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")

ROUNDING = {torch.float32: 2.0**-23, torch.float64: 2.0**-52}
EPS = 0.1  # no float32 number, and no silent 0


@pytest.fixture
def processors(monkeypatch):
    """Makes the device one of `n` processors."""
    return lambda n: monkeypatch.setattr(launchers, "processors_of", lambda device: n)


def differentiate(dtype, x, weight, bias, grad_out, eps):
    """PyTorch's result and gradients by x, weight and bias, computed in ``dtype``."""
    ones = torch.ones(x.shape[1], device=x.device)
    weight = ones if weight is None else weight
    bias = 0 * ones if bias is None else bias
    leaves = [leaf.detach().to(dtype).clone().requires_grad_() for leaf in (x, weight, bias)]
    out = F.layer_norm(leaves[0], x.shape[1:], *leaves[1:], eps)
    return out.detach(), *torch.autograd.grad(out, leaves, grad_out.to(dtype))


def check(x, weight, bias, grad_out, eps=EPS):
    out, mean, rstd = OPS.layer_norm_forward(x, weight, bias, eps)
    grad_x, sums = OPS.layer_norm_backward(grad_out, x, mean, rstd, weight, True, True)
    assert out.dtype == grad_x.dtype == x.dtype
    assert out.is_contiguous()
    assert grad_x.is_contiguous()
    compute = compute_dtype(x.dtype)
    assert mean.dtype == rstd.dtype == sums.dtype == compute
    eager = differentiate(compute, x, weight, bias, grad_out, eps)
    truth = differentiate(torch.double, x, weight, bias, grad_out, eps)
    for ours, *others in zip((out, grad_x, *sums), eager, truth, strict=True):
        assert_no_worse(ours, *others, floor=0.1)  # gradients of one column cancel
    exact = x.double()
    deviation = (exact.var(1, correction=0) + eps).sqrt()
    assert (
        (mean - exact.mean(1)).abs() <= ROUNDING[compute] * (exact.mean(1).abs() + deviation)
    ).all()
    true = 1 / deviation
    assert_no_worse(rstd, true.to(compute), true)


def problem(shape, dtype):
    compute = compute_dtype(dtype)
    vectors = [make(shape[1:], compute, seed) for seed in (2, 3)]
    return make(shape, dtype, 0), *vectors, make(shape, dtype, 1)


# (rows, columns, processors): what it is there for. Limits of float32; a quarter in float64.
EDGES = {
    (1, 1, 1): "one element",
    (64, 8, 1): "exactly a tile of rows",
    (257, 9, 1): "one row of the fifth tile; one column more than the smallest tile",
    (33, 512, 1): "the last chunk is one row",
    (70, 345, 132): "more chunks than 16",
    (3, 2048, 1): "float64 ends to hold rows",
    (3, 2049, 1): "float64 goes in tiles",
    (2, 8192, 1): "the longest row that is held",
    (3, 8193, 1): "the first that is not; a tile of one column",
    (3, 10240, 1): "exactly five tiles; the last group of rows is half full",
    (7, 8200, 1): "two tiled chunks: column sums of several groups of rows",
}


# Half precision changes the rounding, and float64 the limits: a few of them are enough.
FEW = {
    torch.float64: ((257, 9, 1), (3, 2048, 1), (3, 2049, 1), (7, 8200, 1)),
    torch.float32: EDGES,
}
CASES = [
    (edge, dtype)
    for edge in EDGES
    for dtype in DTYPES
    if edge in FEW.get(dtype, ((257, 9, 1), (3, 2049, 1), (3, 8193, 1)))
]


@pytest.mark.parametrize(("edge", "dtype"), CASES, ids=str)
def test_where_tiles_and_chunks_end(edge, dtype, processors):
    *shape, count = edge
    processors(count)
    x, weight, bias, grad_out = problem(shape, dtype)
    check(x, weight, bias, grad_out)


@pytest.mark.parametrize("columns", [37, 8195], ids=["held", "tiled"])
@pytest.mark.parametrize("given", [*itertools.product([False, True], repeat=2)], ids=str)
def test_without_weight_or_bias(given, columns):
    x, weight, bias, grad_out = problem((3, columns), torch.float32)
    check(x, weight if given[0] else None, bias if given[1] else None, grad_out)


VIEWS = {
    "row slice": lambda x: x[::3],
    "column slice": lambda x: x[:, 5:71],
    "column step": lambda x: x[:, ::2],
    "transposed": lambda x: x.t(),
    "expanded row": lambda x: x[:1].expand(40, -1),
    "one column of many": lambda x: x[:, 3:4],
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS.keys())
def test_strides(view):
    x = view(make((90, 83), torch.float64))
    grad_out = view(make((90, 83), torch.float64, 1))
    _, weight, bias, _ = problem(x.shape, torch.float64)
    check(x, weight, bias, grad_out)


@pytest.mark.parametrize("columns", [96, 8195], ids=["held", "tiled"])
def test_an_offset_costs_no_digits(columns):
    x, weight, bias, grad_out = problem((6, columns), torch.float32)
    x = (x * 2.0**7).round() / 2.0**7 + 2.0**15  # without a rounding error
    check(x, weight, bias, grad_out, 1e-5)
    _, mean, rstd = OPS.layer_norm_forward(x, weight, bias, 0.0)
    assert ((mean.double() - x.double().mean(1)).abs() <= 2.0**-9).all()  # one rounding
    true = x.double().var(1, correction=0).rsqrt()
    torch.testing.assert_close(rstd.double(), true, rtol=1e-5, atol=0)
    constant = torch.full_like(x, 1e4 / 3)
    out, _, rstd = OPS.layer_norm_forward(constant, weight, bias, 0.25)
    assert torch.equal(out, bias.expand_as(out))
    assert (rstd == 2).all()


@pytest.mark.parametrize("columns", [37, 8195], ids=["held", "tiled"])
def test_nan_and_infinity_stay_in_their_row(columns):
    x, weight, bias, grad_out = problem((5, columns), torch.float32)
    x[1, 0] = torch.nan
    x[2, -1] = torch.inf
    x[4, 0] = -torch.inf  # the last row: rows beyond it read as it
    bad = torch.tensor([0, 1, 1, 0, 1], dtype=torch.bool, device=DEVICE)
    out, mean, rstd = OPS.layer_norm_forward(x, weight, bias, EPS)
    assert out[bad].isnan().all()
    assert out[~bad].isfinite().all()
    grad_x, sums = OPS.layer_norm_backward(grad_out, x, mean, rstd, weight, True, True)
    assert grad_x[bad].isnan().all()
    assert grad_x[~bad].isfinite().all()
    assert sums[0].isnan().all()
    assert torch.equal(sums[1].isnan(), torch.zeros_like(sums[1], dtype=torch.bool))


@pytest.mark.parametrize("columns", [37, 8195], ids=["held", "tiled"])
@pytest.mark.parametrize("needs", [*itertools.product([False, True], repeat=2)], ids=str)
def test_only_what_is_needed_and_always_the_same_bits(needs, columns, processors):
    processors(2)
    x, weight, bias, grad_out = problem((70 if columns == 37 else 5, columns), torch.float32)
    _, mean, rstd = OPS.layer_norm_forward(x, weight, bias, EPS)
    rest = x, mean, rstd, weight
    everything = OPS.layer_norm_backward(grad_out, *rest, True, True)
    found = OPS.layer_norm_backward(grad_out.clone(), *rest, *needs)
    for needed, ours, all_ours in zip(needs, found, everything, strict=True):
        if needed:
            assert torch.equal(ours, all_ours)
        else:
            assert ours.shape == (0,)


@pytest.mark.parametrize("shape", [(0, 7), (5, 0)], ids=str)
def test_empty_matrices_launch_nothing(shape, monkeypatch):
    monkeypatch.setattr(launchers, "kernels", None)
    x, weight, bias, grad_out = problem(shape, torch.float16)
    out, mean, rstd = OPS.layer_norm_forward(x, weight, bias, EPS)
    assert out.shape == shape
    assert mean.shape == rstd.shape == (shape[0],)
    grad_x, sums = OPS.layer_norm_backward(grad_out, x, mean, rstd, weight, True, True)
    assert grad_x.shape == shape
    assert torch.equal(sums, torch.zeros(2, shape[1], device=DEVICE))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_opcheck(dtype):
    x, weight, bias, grad_out = problem((3, 7), dtype)
    for vectors in ((weight, bias), (None, None)):
        torch.library.opcheck(OPS.layer_norm_forward.default, (x, *vectors, EPS))
        _, mean, rstd = OPS.layer_norm_forward(x, *vectors, EPS)
        for needs in ((True, False), (False, True)):
            arguments = grad_out, x, mean, rstd, vectors[0], *needs
            torch.library.opcheck(OPS.layer_norm_backward.default, arguments)


def test_ops_refuse_what_would_read_foreign_memory():
    x, weight, bias, grad_out = problem((20, 37), torch.float16)
    with pytest.raises(RuntimeError, match=r"x must have shape \(rows, columns\)"):
        OPS.layer_norm_forward(x[0], weight, bias, EPS)
    with pytest.raises(RuntimeError, match="x must be float64, float32, float16 or bfloat16"):
        OPS.layer_norm_forward(x.int(), weight, bias, EPS)
    with pytest.raises(RuntimeError, match=r"weight must have shape \(37,\), the compute dtype"):
        OPS.layer_norm_forward(x, weight[1:], bias, EPS)
    with pytest.raises(RuntimeError, match="bias must have shape"):
        OPS.layer_norm_forward(x, weight, bias.half(), EPS)
    _, mean, rstd = OPS.layer_norm_forward(x, weight, bias, EPS)
    with pytest.raises(RuntimeError, match="grad_out must have the shape"):
        OPS.layer_norm_backward(grad_out[1:], x, mean, rstd, weight, True, True)
    with pytest.raises(RuntimeError, match=r"mean must have shape \(20,\)"):
        OPS.layer_norm_backward(grad_out, x, mean[1:], rstd, weight, True, True)
    with pytest.raises(RuntimeError, match=r"rstd must have shape \(20,\)"):
        OPS.layer_norm_backward(grad_out, x, mean, rstd.double(), weight, True, True)


@pytest.mark.parametrize("tile_scale", autotune.TILE_SCALES[1:])
@pytest.mark.parametrize("shape", [(40, 345), (3, 8195)], ids=str)
def test_the_plans_of_the_search_compute_the_same(shape, tile_scale, monkeypatch):
    monkeypatch.setattr(autotune, "TILE_SCALES", (tile_scale,))
    check(*problem(shape, torch.float32))


def test_the_op_is_registered_with_the_kernels():
    assert set(op.OPS.fakes) == set(launchers.KERNELS)
