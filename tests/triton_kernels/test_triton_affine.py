"""The affine Triton kernels where their tiles, chunks and programs end (tests/truth.py: the rule).

On a machine without a GPU they run on Triton's interpreter, see test_triton_interpreter.py. Layer
normalisation is in test_triton_affine_layer_norm.py, calls at the edge of the contract in
test_triton_affine_calls.py.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from truth import GRAD_TOLERANCE, HALF_ROUNDING, HALF_TINY

from ueo_fast import backends

triton = pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu" and not backends.is_triton_interpreted():
    pytest.skip("no GPU, and TRITON_INTERPRET is not 1", allow_module_level=True)

channel_affine = pytest.importorskip("ueo_fast.triton.channel_affine")
pytest.importorskip("ueo_fast.ops.channel_affine")  # registers the ops

OPS = torch.ops.ueo_fast_triton
DTYPES = [torch.float32, torch.float64, torch.float16]
if DEVICE == "cuda":
    DTYPES.append(torch.bfloat16)  # the interpreter has none
DTYPE_IDS = [str(dtype).removeprefix("torch.") for dtype in DTYPES]

pytestmark = pytest.mark.filterwarnings(
    "ignore::RuntimeWarning:triton"  # NumPy warns of what is meant: overflow to inf, inf - inf
)


def compute_dtype(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def make(shape, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)


def assert_no_worse(ours, eager, true, floor=0.0):
    """The rule of tests/truth.py: eager in the compute dtype, true in float64.

    ``floor``: the size of terms that may cancel.
    """
    tolerance = GRAD_TOLERANCE[eager.dtype]
    if ours.dtype == eager.dtype:
        error = (ours.double() - true).norm().item()
        allowed = (eager.double() - true).norm().item() + tolerance * (true.norm().item() + floor)
        assert error <= allowed, f"error {error:.3g} > allowed {allowed:.3g}"
        return
    error = (ours.double() - true).abs()
    allowed = HALF_ROUNDING[ours.dtype] * true.abs() * 1.001 + HALF_TINY[ours.dtype]
    allowed += (eager.double() - true).abs() + tolerance * (true.abs().amax() + floor)
    assert (error <= allowed).all(), f"off by {(error - allowed).amax().item():.3g} too much"


@pytest.fixture
def processors(monkeypatch):
    """Makes the device one of `n` processors."""
    return lambda n: monkeypatch.setattr(channel_affine, "processors_of", lambda device: n)


def by_channel(values, x, dim):
    shape = [1] * x.ndim
    shape[dim] = -1
    return values.reshape(shape)


def modulation_in(dtype, x, parameters):
    """scale, shift, mean, 1 / deviation."""
    *given, eps = parameters
    weight, bias, mean, var = (None if value is None else value.to(dtype) for value in given)
    size = next((value.shape for value in given if value is not None), (1,))
    zeros = torch.zeros(size, device=DEVICE, dtype=dtype)
    rstd = zeros + 1 if var is None else 1 / (var + eps).sqrt()
    scale = rstd if weight is None else weight * rstd
    mean = zeros if mean is None else mean
    return scale, (zeros if bias is None else bias) - mean * scale, mean, rstd


def forward_in(dtype, x, parameters, residual, dim, relu):
    """The equation in ``dtype``, not rounded further."""
    scale, shift, *_ = (by_channel(v, x, dim) for v in modulation_in(dtype, x, parameters))
    y = x.to(dtype) * scale + shift
    if residual is not None:
        y = y + residual.to(dtype)
    return torch.relu(y) if relu else y


def backward_in(dtype, g, x, parameters, dim):
    """The gradients by x, weight and bias before the activation, in ``dtype``."""
    scale, _, mean, rstd = modulation_in(dtype, x, parameters)
    g, x = g.to(dtype), x.to(dtype)
    others = [d for d in range(x.ndim) if d != dim % x.ndim]
    deviation = g * (x - by_channel(mean, x, dim))
    sum_g, sum_gx = (v.sum(others) if others else v for v in (g, deviation))
    return g * by_channel(scale, x, dim), sum_gx * rstd, sum_g


def problem(shape, dim, dtype, layout=torch.contiguous_format):
    """x, (weight, bias, mean, var, eps), residual, grad_out."""
    compute = compute_dtype(dtype)
    tensors = [make(shape, dtype, seed).contiguous(memory_format=layout) for seed in range(3)]
    weight, bias, mean, var = (make((shape[dim],), compute, seed) for seed in range(3, 7))
    return tensors[0], (weight, bias, mean, var.square() + 0.1, 1e-3), tensors[1], tensors[2]


ALL = True, True, True, True


def check(x, parameters, residual, grad_out, dim, relu):
    out, bits = OPS.channel_affine_forward(x, *parameters, residual, dim, relu)
    assert out.stride() == x.stride()
    assert out.dtype == x.dtype
    compute = compute_dtype(x.dtype)
    eager, truth = (
        forward_in(dtype, x, parameters, residual, dim, relu) for dtype in (compute, torch.double)
    )
    assert_no_worse(out, eager, truth)

    g = torch.where(out <= 0, 0, grad_out) if relu else grad_out
    weight, bias, *_ = parameters
    needs = True, weight is not None, bias is not None, True
    found = OPS.channel_affine_backward(grad_out, x, *parameters, bits, dim, relu, *needs)
    grad_x, *of_parameters, grad_residual = found
    eager, truth = (backward_in(dtype, g, x, parameters, dim) for dtype in (compute, torch.double))
    assert_no_worse(grad_x, eager[0], truth[0])
    for value, ours, theirs, true in zip(
        (weight, bias), of_parameters, eager[1:], truth[1:], strict=True
    ):
        if value is None:
            assert ours.shape == (0,)
        else:
            assert ours.dtype == value.dtype
            assert_no_worse(ours, theirs, true)
    assert torch.equal(grad_residual, g)
    assert grad_x.stride() == grad_residual.stride() == x.stride()


LAST = torch.channels_last
# (shape, dim, memory format, processors): what it is there for. Limits of float32.
EDGES = {
    ((1, 1, 1), 1, None, 1): "one element, one bit",
    ((2, 5, 3, 3), 1, None, 1): "a byte of bits spans channels; NARROW and SHORT",
    ((3, 5, 7, 7), 1, LAST, 1): "channels last, few of them",
    ((2, 70, 7, 7), 1, None, 3): "two tiles of channels, the second with six",
    ((2, 21, 130), -1, None, 2): "tokens; two tiles of channels",
    ((3, 4, 250), 0, None, 1): "channels outermost",
    ((4, 2, 3, 5, 6), 2, None, 1): "five dimensions, channels in the middle",
    ((2, 3, 32, 32), 1, None, 1): "inner is a flat program's elements",
    ((2, 3, 31, 33), 1, None, 2): "one fewer: three channels meet",
    ((1, 3, 41, 25), 1, None, 1): "one more; inner tiles of 64",
    ((3, 2, 784), 1, None, 2): "13 inner tiles, chunks that end between rows",
    ((3, 1023), 1, None, 1): "one channel fewer than a flat program's elements",
    ((3, 1024), 1, None, 1): "as many",
    ((3, 1025), 1, None, 132): "one more, one tile per chunk",
    ((1300, 3), 1, None, 132): "many rows of few channels",
    ((700, 2, 2), 1, None, 5): "rows, channels and inner in one tile",
    ((2, 1, 555), 1, None, 4): "one channel",
    ((1001,), 0, None, 1): "only channels",
}


OPTIONS = {"linear": (False, False), "relu": (False, True), "residual relu": (True, True)}


# Other dtypes are float32 with other loads and stores: on the interpreter a few of them are enough.
FEW = (((2, 5, 3, 3), 1, None, 1), ((3, 5, 7, 7), 1, LAST, 1), ((3, 2, 784), 1, None, 2))
CASES = [
    (edge, dtype)
    for edge in EDGES
    for dtype in DTYPES
    if DEVICE == "cuda" or dtype == torch.float32 or edge in FEW
]


@pytest.mark.parametrize(("added", "relu"), OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize(("edge", "dtype"), CASES, ids=str)
def test_layouts_and_where_tiles_end(edge, dtype, added, relu, processors):
    shape, dim, layout, count = edge
    processors(count)
    layout = layout or torch.contiguous_format
    x, parameters, residual, grad_out = problem(shape, dim, dtype, layout)
    check(x, parameters, residual if added else None, grad_out, dim, relu)


@pytest.mark.parametrize("shape", [(2, 5, 3, 3), (2, 5, 4, 8)], ids=["bytes across", "aligned"])
@pytest.mark.parametrize("given", [*itertools.product([False, True], repeat=4)], ids=str)
@pytest.mark.parametrize("stored", [False, True], ids=["float32", "float16"])
def test_every_combination_of_parameters(stored, given, shape):
    x, (*values, eps), residual, grad_out = problem(shape, 1, torch.float16)
    if stored:
        values = [value.half() for value in values]
    parameters = [
        value if is_given else None for value, is_given in zip(values, given, strict=True)
    ]
    check(x, (*parameters, eps), residual, grad_out, 1, True)


def test_any_dense_order_of_dimensions():
    x, parameters, residual, grad_out = problem((4, 6, 5, 3), 1, torch.float64)
    for order in itertools.permutations(range(4)):
        dim = order.index(1)
        views = [tensor.permute(order) for tensor in (x, residual, grad_out)]
        check(views[0], parameters, views[1], views[2], dim, True)


def test_a_view_that_begins_between_16_bytes_and_a_stride_of_the_scale():
    x, _, _, grad_out = problem((4, 3, 7), 1, torch.float32)
    parameters = make((3, 4), torch.float32, 9).abs().unbind(1)
    check(x[1:], (*parameters, 0.1), None, grad_out[1:], 1, True)


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, LAST], ids=["contiguous", "last"])
def test_relu_stops_what_eager_stops(layout, dtype):
    # Zeros of both signs, NaN, infinities, and what is 0 only once it is rounded.
    tiny = 2.0**-20 if dtype == torch.float16 else 0.0
    values = [1.0, -1.0, 0.0, -0.0, math.nan, math.inf, -math.inf, tiny]
    every = torch.tensor(list(itertools.product(values, values)), dtype=torch.float64)
    x, residual = (v.reshape(1, 2, 4, 8).to(DEVICE, dtype) for v in every.unbind(1))
    x, residual = (v.contiguous(memory_format=layout) for v in (x, residual))
    scale = torch.tensor([1.0, 2.0**-8], device=DEVICE, dtype=compute_dtype(dtype))
    parameters = scale, None, None, None, 0.0
    grad_out = torch.ones_like(x)
    for added in (None, residual):
        leaf = forward_in(scale.dtype, x, parameters, added, 1, False).to(dtype).requires_grad_()
        expected = torch.relu(leaf)
        (g,) = torch.autograd.grad(expected, leaf, grad_out)
        out, bits = OPS.channel_affine_forward(x, *parameters, added, 1, True)
        torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)
        *_, found = OPS.channel_affine_backward(
            grad_out, x, *parameters, bits, 1, True, False, False, False, True
        )
        assert torch.equal(found, g)


@pytest.mark.parametrize("elements", [1, 8, 9, 1023, 1024, 1032, 2047])
def test_bits_are_in_the_order_of_memory(elements):
    x = make((elements, 1), torch.float32)
    one = torch.ones(1, device=DEVICE)
    out, bits = OPS.channel_affine_forward(x, one, 0 * one, None, None, 0.0, x, 1, True)
    assert bits.dtype == torch.uint8
    assert bits.numel() == (elements + 7) // 8
    found = (bits[:, None] >> torch.arange(8, device=DEVICE)) & 1
    padded = torch.zeros_like(found).flatten()
    padded[:elements] = (out > 0).flatten()
    assert torch.equal(found.flatten(), padded)


@pytest.mark.parametrize("mask", ["none", "from x", "bits"])
@pytest.mark.parametrize("needs", [*itertools.product([False, True], repeat=4)], ids=str)
def test_only_what_is_needed(needs, mask):
    x, parameters, residual, grad_out = problem((3, 5, 20), 1, torch.float32)
    relu = mask != "none"
    added = residual if mask == "bits" else None
    _, bits = OPS.channel_affine_forward(x, *parameters, added, 1, relu)
    rest = *parameters, bits, 1, relu
    everything = OPS.channel_affine_backward(grad_out, x, *rest, *ALL)
    given = x if needs[1] or needs[2] or mask == "from x" else None
    found = OPS.channel_affine_backward(grad_out, given, *rest, *needs)
    for needed, ours, all_ours in zip(needs, found, everything, strict=True):
        if needed:
            assert torch.equal(ours, all_ours)
        else:
            assert ours.shape == (0,)


def test_a_long_chunk_adds_up_and_the_same_input_gives_the_same_bits(processors):
    processors(1)
    x, parameters, _, grad_out = problem((150_000, 2), 1, torch.float32)
    x, grad_out = 0.01 * x + 10, grad_out.abs()
    rest = *parameters, x.new_empty(0, dtype=torch.uint8), 1, False, *ALL
    found = OPS.channel_affine_backward(grad_out, x, *rest)
    again = OPS.channel_affine_backward(grad_out.clone(), x.clone(), *rest)
    for first, second in zip(found, again, strict=True):
        assert torch.equal(first, second)
    truth = backward_in(torch.double, grad_out, x, parameters, 1)
    for ours, true in zip(found[1:3], truth[1:], strict=True):
        assert ((ours.double() - true).norm() / true.norm()).item() < 1e-6
