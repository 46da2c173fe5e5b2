"""The raw CPU kernels at every instruction set that this machine has."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from truth import assert_exact

from ueo_fast.backends import CAPABILITIES

LEVELS = range(len(CAPABILITIES))


@pytest.fixture(params=LEVELS, ids=CAPABILITIES)
def level(request, loops):
    if request.param > loops.supported_capability():
        pytest.skip(f"this machine has no {CAPABILITIES[request.param]}")
    return request.param


def apply(loops, name, x, out_dtype, level):
    out = np.empty(x.shape, out_dtype)
    loops.apply(name, x, out, level)
    return out


def relative_error(got, truth):
    """Largest relative error, in machine epsilons."""
    error = np.abs(got.astype(np.longdouble) / truth - 1).max()
    return float(error / np.finfo(got.dtype).eps)


@pytest.mark.parametrize(("dtype", "lowest"), [(np.float32, -126), (np.float64, -1022)])
def test_exp2_is_within_two_epsilons(loops, level, dtype, lowest):
    rng = np.random.default_rng(0)
    t = np.concatenate([rng.uniform(lowest, 0, 40_000), rng.uniform(-1, 0, 40_000)]).astype(dtype)
    got = apply(loops, f"exp2_{'float' if dtype == np.float32 else 'double'}", t, dtype, level)
    assert relative_error(got, np.exp2(t.astype(np.longdouble))) < 2


@pytest.mark.parametrize(
    ("name", "dtype", "zero"), [("float", "f4", -127), ("double", "f8", -1023)]
)
def test_exp2_is_exact_at_its_ends_and_keeps_nan(loops, level, name, dtype, zero):
    one, nothing = apply(loops, f"exp2_{name}", np.array([0, zero], dtype), dtype, level)
    assert one == 1
    assert nothing == 0
    integer = np.int32 if dtype == "f4" else np.int64
    payloads = np.array([-1, np.array(np.nan, dtype).view(integer) + 1], integer).view(dtype)
    nan = np.concatenate([payloads, np.array([np.nan], dtype)])
    assert np.isnan(apply(loops, f"exp2_{name}", nan, dtype, level)).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_log_is_within_two_epsilons(loops, level, dtype):
    rng = np.random.default_rng(0)
    lowest = np.log10(np.finfo(dtype).tiny)
    x = np.concatenate([10 ** rng.uniform(lowest + 1, 2, 200_000), rng.uniform(0.5, 2, 200_000)])
    x = x.astype(dtype)
    x = x[x != 1]
    got = apply(loops, f"log_{'float' if dtype == np.float32 else 'double'}", x, dtype, level)
    assert relative_error(got, np.log(x.astype(np.longdouble))) < 2


@pytest.mark.parametrize(("name", "dtype"), [("float", "f4"), ("double", "f8")])
def test_log_of_zero_is_finite_and_nan_and_infinity_are_not_lost(loops, level, name, dtype):
    zero, nan, infinity = apply(
        loops, f"log_{name}", np.array([0, np.nan, np.inf], dtype), dtype, level
    )
    assert zero == pytest.approx(np.log(np.finfo(dtype).tiny))
    assert np.isnan(nan)
    assert not np.isfinite(infinity)


def all_bits():
    return np.arange(2**16, dtype=np.uint16)


def test_every_half_converts_exactly(loops, level):
    got = apply(loops, "half_to_float", all_bits(), np.float32, level)
    np.testing.assert_array_equal(got, all_bits().view(np.float16).astype(np.float32))


def test_every_bfloat16_converts_exactly(loops, level):
    got = apply(loops, "bfloat16_to_float", all_bits(), np.float32, level)
    truth = torch.from_numpy(all_bits().view(np.int16)).view(torch.bfloat16).float().numpy()
    np.testing.assert_array_equal(got, truth)


def floats_near_every_half():
    """Every finite half, its midpoints to the next, and their neighbours in float32."""
    halves = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    middle = (halves[1:] + halves[:-1]) / 2
    edges = np.array([65519.996, 65520, 65536, 1e30, np.inf, np.nan, 2.0**-25, 2.0**-26])
    x = np.concatenate([halves, middle, edges]).astype(np.float32)
    x = np.concatenate([x, np.nextafter(x, np.float32(0)), np.nextafter(x, np.float32(np.inf))])
    return np.concatenate([x, -x])


def test_rounding_to_half_is_to_nearest_even(loops, level):
    x = floats_near_every_half()
    got = apply(loops, "float_to_half", x, np.uint16, level).view(np.float16)
    with np.errstate(over="ignore"):
        truth = x.astype(np.float16)
    np.testing.assert_array_equal(got, truth)


def test_rounding_to_bfloat16_is_to_nearest_even(loops, level):
    rng = np.random.default_rng(0)
    bits = np.concatenate(
        [rng.integers(0, 2**32, 200_000), np.arange(0, 2**32, 0x8000, dtype=np.uint64)]
    ).astype(np.uint32)
    x = bits.view(np.float32)
    got = apply(loops, "float_to_bfloat16", x, np.uint16, level)
    truth = torch.from_numpy(x).bfloat16()
    got = torch.from_numpy(got.view(np.int16)).view(torch.bfloat16)
    torch.testing.assert_close(got, truth, rtol=0, atol=0, equal_nan=True)


DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


def as_numpy(tensor):
    bits = {torch.float16: torch.int16, torch.bfloat16: torch.int16}.get(tensor.dtype)
    return tensor.numpy() if bits is None else tensor.view(bits).numpy().view(np.uint16)


def run(loops, level, logits, name, **options):
    """Loss and gradient of a torch tensor through the raw kernels."""
    result = loops.ueo_loss(as_numpy(logits), name, level, **options)
    grad = torch.from_numpy(result["grad"])
    if grad.dtype == torch.uint16:
        grad = grad.view(torch.int16).view(logits.dtype)
    compute = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return torch.tensor(result["loss"], dtype=compute), grad


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (33, 16), (70, 345), (3, 2100), (300, 31)])
def test_kernels_at_every_instruction_set(loops, level, name, shape, stream):
    torch.manual_seed(0)
    logits = (3 * torch.randn(shape)).to(DTYPES[name])
    loss, grad = run(loops, level, logits, name, stream=stream, grad_loss=-2.5)
    assert_exact(loss, grad, logits, upstream=-2.5)


@pytest.mark.parametrize("name", DTYPES)
def test_options_at_every_instruction_set(loops, level, name):
    torch.manual_seed(0)
    logits = (3 * torch.randn(40, 77)).to(DTYPES[name])
    compute = torch.float64 if name == "float64" else torch.float32
    weights = torch.rand(40, dtype=compute) + 0.1
    loss, grad = run(
        loops, level, logits, name, confidence=weights.numpy(), eps=1e-5, trade_off=0.3
    )
    assert_exact(loss, grad, logits, confidence=weights, eps=1e-5, trade_off=0.3)
    loss, grad = run(
        loops, level, logits, name, marginal_weights=weights.numpy(), confidence_scale=0.01
    )
    assert_exact(loss, grad, logits, marginal_weights=weights, confidence_scale=0.01)


def test_threads_do_not_change_a_bit(loops, level):
    logits = 3 * torch.randn(1000, 130)
    expected = run(loops, level, logits, "float32", threads=1)
    for threads in (2, 3, 8):
        again = run(loops, level, logits, "float32", threads=threads)
        for one, other in zip(expected, again, strict=True):
            assert torch.equal(one, other)
