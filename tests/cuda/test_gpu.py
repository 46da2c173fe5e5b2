"""The loss on a GPU, with CUDA and with Triton: streams, graphs, syncs, devices, compilation.

Values at many shapes are in tests/loss/test_ueo_loss*.py; here is what only a GPU can get wrong.
Sizes and memory: tests/cuda/test_gpu_sizes.py.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from truth import assert_exact

from benchmarks import gpu_counters
from ueo_fast import _extension, backends, ueo_loss, ueo_loss_and_grad

DEVICE = "cuda"
pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU: torch.cuda.is_available() is False"
)


def make_logits(rows=64, columns=345, dtype=torch.float32, seed=0, device=DEVICE):
    generator = torch.Generator(DEVICE).manual_seed(seed)
    logits = 3 * torch.randn(rows, columns, generator=generator, device=DEVICE)
    return logits.to(dtype).to(device)


def forward_backward(logits, backend, *args, **options):
    leaf = logits.detach().requires_grad_()
    loss = ueo_loss(leaf, *args, backend=backend, **options)
    (grad,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), grad


WAYS = {
    "forward and backward": forward_backward,
    "at once": lambda logits, backend, *args: ueo_loss_and_grad(logits, *args, backend=backend),
}
SHAPES = [(64, 345), (4096, 1000)]  # fewer rows than the GPU has room for, and more
every_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


@every_way
@every_shape
@pytest.mark.parametrize("given", [False, True], ids=["internal", "given confidence"])
def test_no_host_sync(given, shape, way, gpu_backend):
    logits = make_logits(*shape)
    args = (torch.rand(shape[0], device=DEVICE) + 0.1,) if given else ()
    way(logits, gpu_backend, *args)  # compilation and first-call queries may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        way(logits, gpu_backend, *args)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@every_way
@every_shape
def test_the_host_does_not_wait_for_the_device(shape, way, gpu_backend):
    # A sync inside our own library would go unseen by torch's debug mode.
    logits = make_logits(*shape)
    way(logits, gpu_backend)
    torch.cuda.synchronize()
    torch.cuda._sleep(400_000_000)  # cycles: about 0.2 s
    way(logits, gpu_backend)
    busy = torch.cuda.Event()
    busy.record()
    assert not busy.query()
    torch.cuda.synchronize()


@every_shape
def test_at_most_three_launches(shape, gpu_backend):
    logits = make_logits(*shape).requires_grad_()
    one = torch.ones((), device=DEVICE)
    calls = {
        "forward and backward": lambda: torch.autograd.grad(
            ueo_loss(logits, backend=gpu_backend), logits, one
        ),
        "at once": lambda: ueo_loss_and_grad(logits, backend=gpu_backend),
    }
    for name, call in calls.items():
        call()  # compiles, asks the device
        found = gpu_counters.launches(call)
        assert 1 <= found.total() <= 3, (name, found)


@every_shape
def test_autograd_adds_the_launch_that_writes_a_one(shape, gpu_backend):
    logits = make_logits(*shape).requires_grad_()
    loss = ueo_loss(logits, backend=gpu_backend)
    one = torch.ones((), device=DEVICE)

    def launches(*upstream):
        logits.grad = None
        loss.backward(*upstream, retain_graph=True)

    launches(one)
    given = gpu_counters.launches(lambda: launches(one))
    filled = gpu_counters.launches(launches)
    assert given.total() == 1, given
    (fill,) = (filled - given).elements()
    assert "fill" in fill.lower(), fill


@every_way
@every_shape
def test_graph_replays_follow_their_input(shape, way, gpu_backend):
    logits = make_logits(*shape)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        way(logits, gpu_backend)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss, grad = way(logits, gpu_backend)
    for seed in (1, 2):
        fresh = make_logits(*shape, seed=seed)
        logits.copy_(fresh)
        graph.replay()
        expected = way(fresh, gpu_backend)
        assert torch.equal(loss, expected[0])
        assert torch.equal(grad, expected[1])


@every_way
@every_shape
def test_a_stream_of_its_own_is_followed(shape, way, gpu_backend):
    values = make_logits(*shape, seed=1)
    expected = way(values, gpu_backend)
    logits = make_logits(*shape, seed=2)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # a kernel on another stream would read the old values
        logits.copy_(values)
        loss, grad = way(logits, gpu_backend)
    stream.synchronize()
    assert torch.equal(loss, expected[0])
    assert torch.equal(grad, expected[1])


@every_way
def test_the_device_of_the_logits_decides(way, gpu_backend):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    expected = way(make_logits(), gpu_backend)
    with torch.cuda.device(0):
        loss, grad = way(make_logits(device="cuda:1"), gpu_backend)
        assert torch.cuda.current_device() == 0
    assert loss.device == grad.device == torch.device("cuda:1")
    torch.testing.assert_close(grad.cpu(), expected[1].cpu())


@every_way
@every_shape
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_same_bits_every_time(dtype, shape, way, gpu_backend):
    logits = make_logits(*shape, dtype)
    loss, grad = way(logits, gpu_backend)
    for _ in range(5):
        again = way(logits, gpu_backend)
        assert torch.equal(again[0], loss)
        assert torch.equal(again[1], grad)


def test_grad_scaler_in_float16(gpu_backend):
    model = nn.Linear(8, 37).to(DEVICE)
    images = torch.randn(4096, 8, device=DEVICE)
    ueo_loss(model(images), backend=gpu_backend).backward()
    expected = model.weight.grad.clone()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    optimizer.zero_grad()
    scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**16)
    with torch.autocast(DEVICE, dtype=torch.float16):
        logits = model(images)
        loss = ueo_loss(logits, backend=gpu_backend)
    assert logits.dtype == torch.float16
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    torch.testing.assert_close(model.weight.grad, expected, rtol=2e-2, atol=2e-4)


def test_half_gradient_is_scaled_before_it_is_rounded(gpu_backend):
    logits = make_logits(4096, 37, torch.float16).requires_grad_()
    loss = ueo_loss(logits, backend=gpu_backend)
    (scaled,) = torch.autograd.grad(65536.0 * loss, logits)
    assert_exact(loss.detach(), scaled, logits, upstream=65536.0)


def test_two_backward_calls_with_retain_graph(gpu_backend):
    logits = make_logits().requires_grad_()
    loss = ueo_loss(logits, backend=gpu_backend)
    (first,) = torch.autograd.grad(loss, logits, retain_graph=True)
    snapshot = first.clone()
    first.mul_(7)  # somebody else holds and changes what the first call returned
    (second,) = torch.autograd.grad(loss, logits, torch.tensor(-2.0, device=DEVICE))
    torch.testing.assert_close(second, -2 * snapshot)
    assert torch.equal(first, 7 * snapshot)


def test_compile_fullgraph_equals_eager(gpu_backend):
    def step(logits, confidence):
        return ueo_loss(2 * logits, confidence, trade_off=0.5, eps=1e-5, backend=gpu_backend)

    compiled = torch.compile(step, fullgraph=True)
    confidence = torch.rand(64, device=DEVICE) + 0.1
    for rows in (64, 33):
        logits, eager = (make_logits(rows).requires_grad_() for _ in range(2))
        loss = compiled(logits, confidence[:rows])
        loss.backward()
        expected = step(eager, confidence[:rows])
        expected.backward()
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(logits.grad, eager.grad, rtol=1e-5, atol=1e-8)


@every_way
@every_shape
def test_under_deterministic_algorithms(shape, way, gpu_backend):
    logits = make_logits(*shape)
    expected = way(logits, gpu_backend)
    torch.use_deterministic_algorithms(True)  # also fills fresh memory with NaN
    try:
        loss, grad = way(logits, gpu_backend)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(loss, expected[0])
    assert torch.equal(grad, expected[1])


def test_auto_takes_cuda_then_triton_then_the_reference(monkeypatch):
    logits = make_logits()
    for name in ("cuda", "triton"):
        if backends.unavailable_reason(name) is None:
            assert backends.choose("auto", logits) == name
        monkeypatch.setattr(
            backends,
            "_library_error",
            lambda other, gone=name, before=backends._library_error: (
                "taken away by the test" if other == gone else before(other)
            ),
        )
    assert backends.choose("auto", logits) == "reference"
    with pytest.raises(RuntimeError, match="taken away by the test"):
        ueo_loss(logits, backend="cuda")


def test_a_library_for_another_cuda_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(_extension, "cuda_error", "_cuda.so was built for CUDA 1.0")
    with pytest.raises(RuntimeError, match=r"cannot run: _cuda\.so was built for CUDA 1\.0"):
        ueo_loss(make_logits(), backend="cuda")
    assert ueo_loss(make_logits()).isfinite()


def test_a_confidence_on_the_cpu_is_a_named_error(gpu_backend):
    with pytest.raises(ValueError, match="confidence is on cpu but logits are on cuda:0"):
        ueo_loss(make_logits(), torch.ones(64), backend=gpu_backend)


def test_logits_on_the_cpu_are_a_named_error(gpu_backend):
    with pytest.raises(ValueError, match=f"backend='{gpu_backend}' runs on cuda tensors"):
        ueo_loss(make_logits().cpu(), backend=gpu_backend)


@every_way
def test_an_empty_batch(way, gpu_backend):
    loss, grad = way(torch.empty(0, 345, device=DEVICE), gpu_backend)
    assert loss == 0
    assert grad.shape == (0, 345)
