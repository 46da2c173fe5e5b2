"""channel_affine: values, gradients and layouts, on every backend."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from affine_backends import BACKENDS, COMPILED
from affine_truth import assert_exact, differentiate

from ueo_fast import backends, channel_affine, reference

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]

LAYOUTS = {
    # name: shape, dimension of the channels, what is done to the dense tensor; and the regime
    "nchw": ((3, 5, 9, 11), 1, lambda x: x),  # runs of 99, bytes of the mask across runs
    "nchw of 7 x 7": ((2, 6, 7, 7), 1, lambda x: x),  # runs too short for one channel each
    "channels_last": ((2, 24, 5, 7), 1, lambda x: x.contiguous(memory_format=torch.channels_last)),
    "channels_last, few": ((2, 3, 5, 7), 1, lambda x: x.to(memory_format=torch.channels_last)),
    "tokens": ((2, 9, 40), -1, lambda x: x),
    "matrix": ((70, 13), 1, lambda x: x),
    "wide matrix": ((3, 2100), 1, lambda x: x),  # more than one tile of columns
    "one channel": ((4, 1, 33), 1, lambda x: x),
    "sequence": ((2, 3, 130), 1, lambda x: x),
    "volume": ((2, 3, 4, 5, 6), 1, lambda x: x),
    "long run": ((1, 2, 150, 120), 1, lambda x: x),  # a channel in two units of work
    "first dimension": ((6, 50), 0, lambda x: x),
    "vector": ((37,), 0, lambda x: x),
    "sliced": ((2, 5, 8, 20), 1, lambda x: x[..., ::2]),
    "transposed": ((4, 6, 10), 1, lambda x: x.transpose(0, 2)),
    "expanded": ((1, 6, 10), 1, lambda x: x.expand(3, 6, 10)),
    "no batch": ((0, 3, 4), 1, lambda x: x),
    "no positions": ((2, 3, 0), 1, lambda x: x),
    "no channels": ((2, 0, 4), 1, lambda x: x),
}


def make(layout, backend, dtype=torch.float32, residual=True):
    """Leaves by name, and the upstream gradient."""
    shape, dim, change = LAYOUTS[layout]
    generator = torch.Generator().manual_seed(0)

    def random(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    def like_x():
        return change(random(*shape).to(dtype).to(backend.device)).detach().requires_grad_()

    x = like_x()
    compute = reference.compute_dtype(dtype)
    scale, shift = (
        random(x.shape[dim]).to(compute).to(backend.device).requires_grad_() for _ in "ab"
    )
    arguments = {"x": x, "scale": scale, "shift": shift}
    if residual:
        arguments["residual"] = like_x()
    grad_out = random(*x.shape).to(dtype).to(backend.device)
    return arguments, grad_out


def with_options(function, layout, **options):
    def call(**arguments):
        return function(**arguments, dim=LAYOUTS[layout][1], **options)

    return call


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("activation", ["none", "relu"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_result_and_gradients(layout, dtype, activation, residual, backend):
    arguments, grad_out = make(layout, backend, dtype, residual)
    ours = with_options(channel_affine, layout, activation=activation, backend=backend)
    true = with_options(reference.channel_affine, layout, activation=activation)
    assert_exact(differentiate(ours, arguments, grad_out), true, arguments, grad_out)


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("layout", ["nchw", "nchw of 7 x 7", "channels_last"])
@pytest.mark.parametrize("activation", ["none", "relu"])
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
def test_every_combination_of_needed_gradients(layout, activation, residual, backend):
    arguments, grad_out = make(layout, backend, residual=residual)
    true = with_options(reference.channel_affine, layout, activation=activation)
    ours = with_options(channel_affine, layout, activation=activation, backend=backend)
    for needed in itertools.product([False, True], repeat=len(arguments)):
        chosen = {
            name: value.detach().requires_grad_(needs)
            for (name, value), needs in zip(arguments.items(), needed, strict=True)
        }
        assert_exact(differentiate(ours, chosen, grad_out), true, chosen, grad_out)


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("layout", ["nchw", "channels_last", "tokens", "transposed"])
def test_the_layout_of_x_is_kept(layout, backend):
    arguments, grad_out = make(layout, backend)
    x = arguments["x"]
    out = with_options(channel_affine, layout, backend=backend)(**arguments)
    assert out.stride() == x.stride()
    (grad,) = torch.autograd.grad(out, x, grad_out)
    assert grad.stride() == x.stride()


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_and_residuals_of_any_strides(backend):
    arguments, grad_out = make("channels_last", backend)
    for upstream in (grad_out, grad_out.transpose(2, 3).contiguous().transpose(2, 3)):
        for residual in (arguments["residual"].detach().contiguous(), arguments["residual"]):
            given = arguments | {"residual": residual.detach().requires_grad_()}
            ours = with_options(channel_affine, "channels_last", activation="relu", backend=backend)
            true = with_options(reference.channel_affine, "channels_last", activation="relu")
            assert_exact(differentiate(ours, given, upstream), true, given, upstream)
    arguments, _ = make("nchw", backend)
    ours = with_options(channel_affine, "nchw", activation="relu", backend=backend)
    (grad,) = torch.autograd.grad(ours(**arguments).sum(), arguments["x"])  # of stride 0
    (true,) = torch.autograd.grad(
        with_options(reference.channel_affine, "nchw", activation="relu")(**arguments).sum(),
        arguments["x"],
    )
    torch.testing.assert_close(grad, true)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_nan_and_infinity_as_in_eager(layout, residual, backend):
    arguments, grad_out = make(layout, backend, residual=residual)
    with torch.no_grad():
        values = torch.tensor([float("nan"), float("inf"), -float("inf")])
        arguments["x"].permute(1, 0, 2, 3)[:3, 0, 0, 0] = values.to(backend.device)
        grad_out.permute(1, 0, 2, 3)[:3, 0, 0, 1] = values.to(backend.device)
    ours = with_options(channel_affine, layout, activation="relu", backend=backend)
    true = with_options(reference.channel_affine, layout, activation="relu")
    got = differentiate(ours, arguments, grad_out)
    expected = differentiate(true, arguments, grad_out)
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, equal_nan=True, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
def test_the_gradient_of_relu_at_zero_is_zero(residual, backend):
    x = torch.zeros(2, 3, 80, device=backend.device, requires_grad=True)
    ones, zeros = torch.ones(3, device=backend.device), torch.zeros(3, device=backend.device)
    added = torch.zeros_like(x) if residual else None
    out = channel_affine(x, ones, zeros, activation="relu", residual=added, backend=backend)
    (grad,) = torch.autograd.grad(out.sum(), x)
    assert torch.equal(grad, torch.zeros_like(x))


def saved_bytes(function):
    """Bytes of distinct storages that a graph keeps."""
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = function()
    return sum(storages.values()), out


@pytest.mark.parametrize("backend", COMPILED)
def test_what_is_kept_for_backward(backend):
    arguments, _ = make("nchw", backend)
    size = arguments["x"].nbytes
    bits = (arguments["x"].numel() + 7) // 8
    small = 4 * 5 * 4  # scale, shift, center and a margin
    frozen = {name: arguments[name].detach() for name in ("scale", "shift")}

    def kept(activation, **changes):
        call = with_options(channel_affine, "nchw", activation=activation, backend=backend)
        total, out = saved_bytes(lambda: call(**arguments | changes))
        assert out.requires_grad
        return total

    assert kept("relu", residual=None) <= size + small
    assert size + bits <= kept("relu") <= size + bits + small
    assert kept("none", **frozen) <= small
    assert bits <= kept("relu", **frozen) <= bits + small
    assert kept("relu", residual=None, **frozen) <= size + small


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(16, 20, 40, 40), (16, 300, 7, 7), (3000, 70), (1, 3, 300, 300)])
def test_the_number_of_threads_does_not_change_a_bit(shape, dtype):
    torch.manual_seed(0)
    x = torch.randn(shape).to(dtype).requires_grad_()
    residual = torch.randn(shape).to(dtype).requires_grad_()
    scale, shift = (torch.randn(shape[1], requires_grad=True) for _ in "ab")
    grad_out = torch.randn(shape).to(dtype)
    arguments = {"x": x, "scale": scale, "shift": shift, "residual": residual}

    def call(**arguments):
        return channel_affine(**arguments, activation="relu", backend="cpp")

    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            results.append(differentiate(call, arguments, grad_out))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        for name, value in result.items():
            assert torch.equal(value, results[0][name]), name


def test_sums_over_many_elements_keep_their_digits():
    # A float sum of 3 million positive numbers, added one by one, is off in the third digit.
    x = torch.rand(30, 2, 220, 220) + 0.5
    scale, shift = torch.ones(2, requires_grad=True), torch.zeros(2, requires_grad=True)
    for layout in (torch.contiguous_format, torch.channels_last):
        given = x.contiguous(memory_format=layout)
        out = channel_affine(given, scale, shift, backend="cpp")
        grads = torch.autograd.grad(out.sum(), (scale, shift))
        truth = x.double().sum((0, 2, 3)), torch.full((2,), x.numel() / 2, dtype=torch.float64)
        for grad, true in zip(grads, truth, strict=True):
            torch.testing.assert_close(grad.double(), true, rtol=2e-7, atol=0)


@pytest.mark.parametrize("level", backends.CAPABILITIES)
def test_every_instruction_set(level):
    if backends.CAPABILITIES.index(level) >= backends.CAPABILITIES.index(backends.cpu_capability()):
        pytest.skip("the tests of this process run it, or the machine cannot")
    # Chosen once per process.
    script = Path(__file__).with_name("test_channel_affine.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(script)]
    done = subprocess.run(
        [*command, "-k", "test_result_and_gradients and cpp"],
        capture_output=True,
        text=True,
        env=dict(os.environ, UEO_FAST_CPU_CAPABILITY=level),
    )
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.skipif(backends.unavailable_reason("cpp") is not None, reason="needs the CPU library")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_stored_past_the_cache(dtype):
    """From 32 MiB on, with a residual and channels_last: the bits of the parts, which are smaller.

    24 channels: rows of 528 elements, which in bfloat16 begin in the middle of cache lines.
    """
    size = 300 if dtype == torch.bfloat16 else 216
    generator = torch.Generator().manual_seed(0)
    x, residual, grad_out = (
        torch.randn(8, 24, size, size, generator=generator)
        .to(dtype)
        .contiguous(memory_format=torch.channels_last)
        for _ in range(3)
    )
    assert x.numel() * x.element_size() >= 32 << 20
    scale, shift = torch.randn(2, 24, generator=generator)

    def run(part: slice) -> list[torch.Tensor]:
        leaves = [t.detach().requires_grad_() for t in (x[part], scale, shift, residual[part])]
        y = channel_affine(*leaves[:3], 1, activation="relu", residual=leaves[3], backend="cpp")
        return [y.detach(), *torch.autograd.grad(y, leaves, grad_out[part])]

    whole = run(slice(None))
    parts = [run(slice(i, i + 1)) for i in range(8)]
    for i in (0, 1, 4):  # the result, the gradients of x and of the residual
        assert torch.equal(whole[i], torch.cat([part[i] for part in parts]))
    for i in (2, 3):
        together = torch.stack([part[i].double() for part in parts]).sum(0)
        torch.testing.assert_close(whole[i].double(), together, rtol=1e-4, atol=1e-1)
