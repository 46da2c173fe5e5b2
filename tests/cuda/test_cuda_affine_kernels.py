"""Every path of channel_affine's CUDA kernels, on the host and for made-up GPUs."""

from __future__ import annotations

import itertools
import math

import cuda_host_build
import pytest
import torch
from cuda_affine_host import (
    DTYPES,
    H100,
    KIB,
    SMALLEST,
    CudaAffineHost,
    as_close_as_eager,
    every_dtype,
    make_randn,
)
from loss_backends import SMALL_GPU

from ueo_fast.reference import compute_dtype

ONE_BLOCK = {"multiprocessors": 1, "threads_per_multiprocessor": 256}  # four blocks in turn


PARAMETERS = "weight", "bias", "mean", "var"
EPS = 1e-3


def misaligned(tensor, elements=1):
    """The same values and strides, starting ``elements`` after a 16-byte boundary."""
    memory = torch.empty(tensor.numel() + elements, dtype=tensor.dtype)
    return memory[elements:].as_strided(tensor.shape, tensor.stride(), elements).copy_(tensor)


class Case:
    """Inputs of a shape, what the ops make of them, and what they should."""

    def __init__(self, shape, dim, dtype=torch.float32, channels_last=False, prepare=lambda x: x):
        randn, compute = make_randn(), compute_dtype(dtype)
        layout = torch.channels_last if channels_last else torch.contiguous_format
        self.x, self.residual, self.grad_out = (
            prepare(randn(*shape).to(dtype).contiguous(memory_format=layout)) for _ in range(3)
        )
        self.parameters = {name: randn(shape[dim]).to(compute) for name in PARAMETERS}
        self.parameters["var"] = self.parameters["var"].square() + 0.1
        self.dim, self.compute = dim, compute

    def by_channel(self, values):
        return values.reshape([-1 if d == self.dim else 1 for d in range(self.x.dim())])

    def numbers(self, dtype):
        """scale, shift, mean, 1 / deviation, of parameters that may be None."""
        given = (values if values is None else values.to(dtype) for values in self.values)
        weight, bias, mean, var = given
        none = torch.zeros(self.x.shape[self.dim], dtype=dtype)
        rstd = none + 1 if var is None else 1 / (var + EPS).sqrt()
        scale = rstd if weight is None else weight * rstd
        mean = none if mean is None else mean
        return scale, (none if bias is None else bias) - mean * scale, mean, rstd

    def expected(self, dtype, residual, relu):
        scale, shift, *_ = map(self.by_channel, self.numbers(dtype))
        y = self.x.to(dtype) * scale + shift
        y = y + self.residual.to(dtype) if residual else y
        return y.relu() if relu else y

    @property
    def values(self):
        return self.parameters.values()

    def forward(self, gpu, residual=False, relu=False):
        residual = self.residual if residual else None
        return gpu.channel_affine_forward(self.x, *self.values, EPS, residual, self.dim, relu)

    def backward(self, gpu, bits, relu, needs=(True, True, True, True), x=True):
        x = self.x if x else None
        return gpu.channel_affine_backward(
            self.grad_out, x, *self.values, EPS, bits, self.dim, relu, *needs
        )

    def gradients(self, dtype, passed):
        """grad_x, grad_weight, grad_bias, grad_residual."""
        scale, _, mean, rstd = self.numbers(dtype)
        g = self.grad_out.to(dtype).where(passed, 0.0)
        others = [d for d in range(self.x.dim()) if d != self.dim]
        grad_weight = (g * (self.x.to(dtype) - self.by_channel(mean))).sum(others) * rstd
        return g * self.by_channel(scale), grad_weight, g.sum(others), g

    def check(self, gpu, residual, relu):
        out, bits = self.forward(gpu, residual, relu)
        results = (self.expected(dtype, residual, relu) for dtype in (self.compute, torch.float64))
        as_close_as_eager(out, *results)
        assert out.stride() == self.x.stride()
        passed = ~(out <= 0) if relu else torch.ones_like(out, dtype=torch.bool)
        if residual and relu:
            in_memory = passed.as_strided((passed.numel(),), (1,)).to(torch.uint8)
            padded = torch.nn.functional.pad(in_memory, (0, -len(in_memory) % 8)).reshape(-1, 8)
            assert torch.equal(bits, (padded << torch.arange(8)).sum(1).to(torch.uint8))
        weight, bias = (self.parameters[name] is not None for name in ("weight", "bias"))
        needs = (True, weight, bias, residual)
        ours = self.backward(gpu, bits, relu, needs)
        eager = self.gradients(self.compute, passed)
        for mine, theirs, truth, needed in zip(
            ours, eager, self.gradients(torch.float64, passed), needs, strict=True
        ):
            if needed:
                as_close_as_eager(mine, theirs, truth)
            else:
                assert mine.shape == (0,)


# Shape, dimension of the channels, and what the plan must say (of float32) for the case to be worth
# its name, on a GPU that runs one block at a time.
PATHS = {
    "slots of one channel": ((3, 5, 4, 4), 1, {"one_channel": True, "tiles": 1}),
    "slots across two channels": ((3, 5, 7, 7), 1, {"one_channel": False}),
    "slots across many channels": ((9, 5, 3), 1, {"one_channel": False, "period": 30}),
    "channels last": ((70, 20), 1, {"period": 10, "lines": 25}),
    "odd channels last": ((70, 21), 1, {"period": 42, "lines": 6}),
    "fewer samples than a period": ((3, 7), 1, {"period": 6, "lines": 1}),
    "one channel": ((1, 1, 999), 1, {"tiles": 1, "segments": 2}),
    "one period of several tiles": ((3, 700, 3), 1, {"tiles": 5, "lines": 1, "chunks": 1}),
    "several tiles and periods": ((20, 600, 5), 1, {"tiles": 3, "width": 256, "chunks": 2}),
    "a channel across tiles": ((4, 3, 1500), 1, {"tiles": 9, "one_channel": True, "segments": 2}),
    "more periods than a sum may have": ((600, 1024), 1, {"steps": 128, "chunks": 5}),
    "a last dimension of channels": ((5, 11, 24), 2, {"period": 6, "lines": 42}),
}


@pytest.mark.parametrize("kind", ["none", "relu", "residual", "residual, relu"])
@every_dtype
@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_every_path_of_channel_affine_is_exact(path, dtype, kind):
    shape, dim, _ = path
    Case(shape, dim, dtype).check(CudaAffineHost(**ONE_BLOCK), "residual" in kind, "relu" in kind)


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_the_paths_of_channel_affine_are_what_they_are_called(path):
    shape, dim, expected = path
    gpu = CudaAffineHost(**ONE_BLOCK)
    strides = torch.empty(shape, device="meta").stride()
    layout = gpu.module.channel_layout(shape, strides, dim)
    plan = gpu.module.plan_affine(gpu.device, layout, 4, True)
    assert {name: getattr(plan, name) for name in expected} == expected


@pytest.mark.parametrize("outer", [1, 2, 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_channel_affine_at_every_edge_of_a_slot(dtype, outer):
    gpu = CudaAffineHost(**ONE_BLOCK)
    for channels, inner in itertools.product((1, 2, 3, 8, 33), (1, 2, 3, 4, 5, 8, 9, 31, 32)):
        Case((outer, channels, inner), 1, dtype).check(gpu, residual=True, relu=True)


@every_dtype
@pytest.mark.parametrize("size", [31, 32, 33, 255, 256, 257])
def test_channel_affine_at_the_edges_of_warps_and_blocks(size, dtype):
    gpu = CudaAffineHost(**ONE_BLOCK)
    per_slot = 16 // DTYPES[dtype]
    for extra in (-1, 0, 1):
        Case((2, size * per_slot + extra), 1, dtype).check(gpu, residual=True, relu=True)


@every_dtype
@pytest.mark.parametrize("relu", [False, True])
def test_channels_last_in_four_dimensions(dtype, relu):
    case = Case((3, 20, 5, 6), 1, dtype, channels_last=True)
    assert case.x.stride() == (600, 1, 120, 20)
    case.check(CudaAffineHost(**ONE_BLOCK), residual=True, relu=relu)


@every_dtype
@pytest.mark.parametrize("shape", [(3, 5, 4, 4), (9, 5, 3), (70, 21)], ids=str)
def test_inputs_that_start_anywhere(shape, dtype):
    case = Case(shape, 1, dtype, prepare=misaligned)
    assert case.x.data_ptr() % 16 != 0
    case.check(CudaAffineHost(**ONE_BLOCK), residual=True, relu=True)
    case.residual = case.residual.clone()  # only some of them
    case.check(CudaAffineHost(**ONE_BLOCK), residual=True, relu=True)


@pytest.mark.parametrize("given", list(itertools.product([False, True], repeat=4)), ids=str)
@pytest.mark.parametrize("stored", [False, True], ids=["float32", "float16"])
def test_every_combination_of_parameters(stored, given):
    case = Case((9, 5, 3), 1, torch.float16)
    for name, is_given in zip(PARAMETERS, given, strict=True):
        values = case.parameters[name]
        case.parameters[name] = values.to(torch.float16 if stored else torch.float32)
        if not is_given:
            case.parameters[name] = None
    case.check(CudaAffineHost(**ONE_BLOCK), residual=True, relu=True)


def test_parameters_of_two_dtypes():
    case = Case((9, 5, 3), 1, torch.float16)
    for name in ("weight", "mean"):
        case.parameters[name] = case.parameters[name].half()
    case.check(CudaAffineHost(**ONE_BLOCK), residual=False, relu=True)


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=4)), ids=str)
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("shape", [(3, 5, 4, 4), (600, 1024)], ids=str)
def test_launches(shape, residual, relu, needs):
    gpu, case = CudaAffineHost(**ONE_BLOCK), Case(shape, 1)
    _, bits = case.forward(gpu, residual, relu)
    assert gpu.launches == 1
    needs = (*needs[:3], needs[3] and residual)
    if any(needs):  # the glue of the op does not even ask otherwise
        case.backward(gpu, bits, relu, needs)
        assert gpu.launches == (2 if needs[1] or needs[2] else 1)


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=4)), ids=str)
@pytest.mark.parametrize("shape", [(3, 5, 4, 4), (9, 5, 3)], ids=str)
@pytest.mark.parametrize("masked", ["not", "by bits", "by x"])
def test_only_what_is_needed_and_the_same_bits_of_it(masked, shape, needs):
    gpu, case = CudaAffineHost(**ONE_BLOCK), Case(shape, 1)
    relu, residual = masked != "not", masked == "by bits"
    _, bits = case.forward(gpu, residual, relu)
    all_of_it = case.backward(gpu, bits, relu)
    needs_input = needs[1] or needs[2] or masked == "by x"
    part = case.backward(gpu, bits, relu, needs, x=needs_input)  # None would crash where it is read
    for mine, whole, needed in zip(part, all_of_it, needs, strict=True):
        assert torch.equal(mine, whole) if needed else mine.shape == (0,)


@every_dtype
@pytest.mark.parametrize("residual", [False, True])
def test_what_is_not_finite_is_as_in_eager(residual, dtype):
    gpu, case = CudaAffineHost(), Case((40, 8), 1, dtype)
    inf, nan = torch.inf, torch.nan
    odd = torch.tensor([nan, inf, -inf, 0.0, -0.0, 1.0, -1.0, 1e-30]).to(dtype)
    case.x[:8], case.x[8:16], case.grad_out[16:24] = odd, odd[:, None], odd
    case.parameters = {"weight": torch.ones(8, dtype=case.compute)}  # eager rounds as we do
    case.parameters |= dict.fromkeys(("bias", "mean", "var"))
    case.residual[:] = 0
    x = case.x.clone().requires_grad_()
    expected = torch.relu(x + case.residual if residual else x)
    (grad,) = torch.autograd.grad(expected, x, case.grad_out)
    out, bits = case.forward(gpu, residual, relu=True)
    torch.testing.assert_close(out, expected.detach(), rtol=0, atol=0, equal_nan=True)
    grad_x, sum_gx, _, _ = case.backward(gpu, bits, True, (True, True, False, residual))
    torch.testing.assert_close(grad_x, grad, rtol=0, atol=0, equal_nan=True)
    expected = case.gradients(torch.float64, ~(out <= 0))[1]
    assert torch.equal(sum_gx.isnan(), expected.isnan())


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_an_infinite_parameter_without_a_mean_makes_no_nan(name):
    case = Case((4, 3), 1)
    case.parameters |= {"mean": None, "var": None}
    case.parameters[name][1] = torch.inf
    out, _ = case.forward(CudaAffineHost())
    assert not out.isnan().any()


def test_the_mask_is_that_of_the_stored_result():
    # Half's smallest positive number is 6e-8: what is below half of it is stored as 0, and eager's
    # gradient does not pass.
    case = Case((64, 8), 1, torch.float16)
    case.x[:] = torch.rand(64, 8) * 1e-4
    case.parameters = {"weight": torch.full((8,), 1e-3)}
    case.parameters |= dict.fromkeys(("bias", "mean", "var"))
    gpu = CudaAffineHost()
    out, bits = case.forward(gpu, relu=True)
    assert 0 < (out > 0).sum() < out.numel()
    grad_x, *_ = case.backward(gpu, bits, True, (True, False, False, False))
    masked = Case.gradients(case, torch.float32, out > 0)[0].half()
    assert torch.equal(grad_x, masked)


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0)], ids=str)
def test_empty_tensors_have_sums_of_zero(shape):
    case = Case(shape, 1)
    out, bits = case.forward(CudaAffineHost(), residual=True, relu=True)
    assert out.shape == shape
    _, grad_weight, grad_bias, _ = case.backward(CudaAffineHost(), bits, True)
    assert torch.equal(grad_weight, torch.zeros(shape[1]))
    assert torch.equal(grad_bias, torch.zeros(shape[1]))


@pytest.mark.parametrize("gpu", [H100, SMALLEST], ids=["H100", "99 KiB"])
@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize("outer", [1, 3, 64, 100_000])
@pytest.mark.parametrize(
    ("channels", "inner"), [(1, 1), (3, 50_176), (64, 12_544), (2048, 49), (1024, 1), (77, 1)]
)
def test_plans_of_channel_affine_cover_the_tensor(channels, inner, outer, size, gpu):
    module = cuda_host_build.cuda_affine_on_host()
    layout = module.ChannelLayout(outer, channels, inner)  # up to 3.6e11 elements
    plan = module.plan_affine(module.Device(**(SMALL_GPU | gpu)), layout, size, True)
    per_slot = 16 // size
    assert plan.period * per_slot % 8 == 0  # whole bytes of the mask
    assert plan.width % (8 // per_slot) == 0
    assert 32 <= plan.threads <= 256
    assert plan.threads >= plan.width * plan.lines
    assert plan.tiles * plan.width >= plan.period
    assert plan.tiles == 1 or plan.lines == 1
    assert plan.steps <= 128  # kRowsPerSum
    assert plan.blocks == plan.tiles * plan.chunks < 2**31
    needed = math.ceil(outer * channels * inner / (plan.period * per_slot))
    assert plan.steps <= math.ceil(needed / plan.lines)  # no thread walks on behind the end
    periods = plan.chunks * plan.steps * plan.lines
    assert periods * plan.period * per_slot >= outer * channels * inner
    assert plan.shared_bytes <= 48 * KIB  # no opt-in
    # A thread meets the same channels in every period.
    whole_samples = plan.period * per_slot % (channels * inner) == 0
    assert whole_samples or plan.chunks * plan.steps * plan.lines == 1


def test_quotients_beyond_32_bits():
    quotient = cuda_host_build.cuda_affine_on_host().quotient
    divisors = (1, 2, 3, 49, 1000, 12_544, 2**31 - 1, 2**31 + 11, 2**40 - 1)
    for divisor, multiple in itertools.product(divisors, (1, 7, 2**10 + 1)):
        for offset in (-1, 0, 1):
            for base in (multiple * divisor, 2**44 // divisor * divisor):
                number = base + offset
                assert quotient(number, divisor) == number // divisor


def test_the_same_bits_whatever_the_order_of_blocks_and_threads():
    gpu, case = CudaAffineHost(), Case((30, 70, 9), 1)
    results = []
    for seed in range(3):
        gpu.module.set_seed(seed)
        out, bits = case.forward(gpu, residual=True, relu=True)
        results.append([out, bits, *case.backward(gpu, bits, True)])
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


def run_kernels(dtype, *arguments):
    program = cuda_host_build.build_sanitized("affine_races.cpp", dtype)
    done = cuda_host_build.run_sanitized(program, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "a block has a row" in done.stdout


def test_the_affine_kernels_have_no_race():
    run_kernels("float32", "quick")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
def test_the_affine_kernels_have_no_race_in_any_case(dtype):
    run_kernels(dtype)
