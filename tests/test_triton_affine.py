"""The affine Triton kernels where their tiles, chunks and programs end (tests/truth.py: the rule).

On a machine without a GPU they run on Triton's interpreter, see tests/test_triton_interpreter.py.
Layer normalisation is in tests/test_triton_affine_layer_norm.py, calls at
the edge of the contract in tests/test_triton_affine_calls.py.
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


def forward_in(dtype, x, scale, shift, residual, dim, relu):
    """The equation in ``dtype``, not rounded further."""
    y = x.to(dtype) * by_channel(scale.to(dtype), x, dim) + by_channel(shift.to(dtype), x, dim)
    if residual is not None:
        y = y + residual.to(dtype)
    return torch.relu(y) if relu else y


def backward_in(dtype, g, x, scale, center, dim):
    """grad_x and the sums of the gradient before the activation, in ``dtype``."""
    g, x = g.to(dtype), x.to(dtype)
    others = [d for d in range(x.ndim) if d != dim % x.ndim]
    deviation = g * (x - by_channel(center.to(dtype), x, dim))
    sums = [v.sum(others) if others else v for v in (g, deviation)]
    return g * by_channel(scale.to(dtype), x, dim), torch.stack(sums)


def problem(shape, dim, dtype, layout=torch.contiguous_format):
    """x, scale, shift, center, residual, grad_out."""
    compute = compute_dtype(dtype)
    tensors = [make(shape, dtype, seed).contiguous(memory_format=layout) for seed in range(3)]
    channels = [make((shape[dim],), compute, seed) for seed in range(3, 6)]
    return tensors[0], *channels, tensors[1], tensors[2]


def check(x, scale, shift, center, residual, grad_out, dim, relu):
    arguments = scale, shift, residual, dim, relu
    out, bits = OPS.channel_affine_forward(x, *arguments)
    assert out.stride() == x.stride()
    assert out.dtype == x.dtype
    compute = compute_dtype(x.dtype)
    assert_no_worse(
        out, forward_in(compute, x, *arguments), forward_in(torch.double, x, *arguments)
    )

    g = torch.where(out <= 0, 0, grad_out) if relu else grad_out
    found = OPS.channel_affine_backward(
        grad_out, x, scale, shift, center, bits, dim, relu, True, True, True
    )
    grad_x, sums, grad_residual = found
    eager = backward_in(compute, g, x, scale, center, dim)
    truth = backward_in(torch.double, g, x, scale, center, dim)
    assert_no_worse(grad_x, eager[0], truth[0])
    assert_no_worse(sums[0], eager[1][0], truth[1][0])
    assert_no_worse(sums[1], eager[1][1], truth[1][1])
    assert torch.equal(grad_residual, g)
    assert grad_x.stride() == grad_residual.stride() == x.stride()
    assert sums.dtype == compute


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


@pytest.mark.parametrize(("added", "relu"), OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("edge", EDGES, ids=str)
def test_layouts_and_where_tiles_end(edge, dtype, added, relu, processors):
    shape, dim, layout, count = edge
    processors(count)
    layout = layout or torch.contiguous_format
    x, scale, shift, center, residual, grad_out = problem(shape, dim, dtype, layout)
    check(x, scale, shift, center, residual if added else None, grad_out, dim, relu)


def test_any_dense_order_of_dimensions():
    x, scale, shift, center, residual, grad_out = problem((4, 6, 5, 3), 1, torch.float64)
    for order in itertools.permutations(range(4)):
        dim = order.index(1)
        views = [tensor.permute(order) for tensor in (x, residual, grad_out)]
        check(views[0], scale, shift, center, views[1], views[2], dim, True)


def test_a_view_that_begins_between_16_bytes_and_a_stride_of_the_scale():
    x, _, _, _, _, grad_out = problem((4, 3, 7), 1, torch.float32)
    scale, shift, center = make((3, 3), torch.float32, 9).unbind(1)
    check(x[1:], scale, shift, center, None, grad_out[1:], 1, True)


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
    shift, center = torch.zeros_like(scale), torch.zeros_like(scale)
    grad_out = torch.ones_like(x)
    for added in (None, residual):
        leaf = forward_in(scale.dtype, x, scale, shift, added, 1, False).to(dtype).requires_grad_()
        expected = torch.relu(leaf)
        (g,) = torch.autograd.grad(expected, leaf, grad_out)
        out, bits = OPS.channel_affine_forward(x, scale, shift, added, 1, True)
        torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)
        _, _, found = OPS.channel_affine_backward(
            grad_out, x, scale, shift, center, bits, 1, True, False, False, True
        )
        assert torch.equal(found, g)


@pytest.mark.parametrize("elements", [1, 8, 9, 1023, 1024, 1032, 2047])
def test_bits_are_in_the_order_of_memory(elements):
    x = make((elements, 1), torch.float32)
    one = torch.ones(1, device=DEVICE)
    out, bits = OPS.channel_affine_forward(x, one, 0 * one, x, 1, True)
    assert bits.dtype == torch.uint8
    assert bits.numel() == (elements + 7) // 8
    found = (bits[:, None] >> torch.arange(8, device=DEVICE)) & 1
    padded = torch.zeros_like(found).flatten()
    padded[:elements] = (out > 0).flatten()
    assert torch.equal(found.flatten(), padded)


@pytest.mark.parametrize("mask", ["none", "from x", "bits"])
@pytest.mark.parametrize("needs", [*itertools.product([False, True], repeat=3)], ids=str)
def test_only_what_is_needed(needs, mask):
    x, scale, shift, center, residual, grad_out = problem((3, 5, 20), 1, torch.float32)
    relu = mask != "none"
    added = residual if mask == "bits" else None
    _, bits = OPS.channel_affine_forward(x, scale, shift, added, 1, relu)
    rest = scale, shift, center, bits, 1, relu
    everything = OPS.channel_affine_backward(grad_out, x, *rest, True, True, True)
    given = x if needs[1] or mask == "from x" else None
    found = OPS.channel_affine_backward(grad_out, given, *rest, *needs)
    for needed, ours, all_ours in zip(needs, found, everything, strict=True):
        if needed:
            assert torch.equal(ours, all_ours)
        else:
            assert ours.shape == (0,)


def test_a_long_chunk_adds_up_and_the_same_input_gives_the_same_bits(processors):
    processors(1)
    x, scale, shift, center, _, grad_out = problem((150_000, 2), 1, torch.float32)
    x, grad_out = 0.01 * x + 10, grad_out.abs()
    rest = scale, shift, center, x.new_empty(0, dtype=torch.uint8), 1, False, True, True, True
    found = OPS.channel_affine_backward(grad_out, x, *rest)
    again = OPS.channel_affine_backward(grad_out.clone(), x.clone(), *rest)
    for first, second in zip(found, again, strict=True):
        assert torch.equal(first, second)
    _, truth = backward_in(torch.double, grad_out, x, scale, center, 1)
    assert ((found[1].double() - truth).norm() / truth.norm()).item() < 1e-6
