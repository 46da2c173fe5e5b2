"""The affine ops on a GPU, with CUDA and with Triton: syncs, graphs, streams, determinism, eager.

Values at many shapes are those of the suites that run on the host; here is what only a GPU can get
wrong, and sizes that only a GPU can run in a test.
"""

from __future__ import annotations

import pytest
import torch
from cuda_affine_host import as_close_as_eager

from benchmarks import gpu_counters
from ueo_fast import normalization, reference

DEVICE = "cuda"
pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU: torch.cuda.is_available() is False"
)


class BatchNorm:
    """A frozen batch norm, its relu and a residual: (result, gradients of all inputs)."""

    def __init__(self, shape=(16, 256, 14, 14), dtype=torch.float32, channels_last=False, seed=0):
        generator = torch.Generator(DEVICE).manual_seed(seed)
        layout = torch.channels_last if channels_last else torch.contiguous_format
        self.x, self.residual, self.grad_out = (
            torch.randn(shape, generator=generator, device=DEVICE)
            .to(dtype)
            .contiguous(memory_format=layout)
            for _ in range(3)
        )
        self.numbers = [
            torch.rand(shape[1], generator=generator, device=DEVICE) + 0.5 for _ in range(4)
        ]

    @property
    def inputs(self):
        return self.x, self.residual, self.grad_out

    def __call__(self, backend, dtype=None):
        apply = reference.frozen_batch_norm
        options = {"activation": "relu"}
        if backend != "reference":
            apply, options["backend"] = normalization.frozen_batch_norm, backend
        leaves = [
            value.detach().to(dtype or value.dtype).requires_grad_()
            for value in (self.x, *self.numbers[:2], self.residual)
        ]
        x, weight, bias, residual = leaves
        statistics = (value.to(dtype or value.dtype) for value in self.numbers[2:])
        out = apply(x, weight, bias, *statistics, residual=residual, **options)
        return [out.detach(), *torch.autograd.grad(out, leaves, self.grad_out.to(out.dtype))]


class LayerNorm:
    """A layer norm: (result, gradients of all inputs)."""

    def __init__(self, shape=(64, 197, 768), dtype=torch.float32, seed=0):
        generator = torch.Generator(DEVICE).manual_seed(seed)
        self.x, self.grad_out = (
            torch.randn(shape, generator=generator, device=DEVICE).to(dtype) for _ in range(2)
        )
        self.numbers = [
            torch.rand(shape[-1], generator=generator, device=DEVICE) + 0.5 for _ in range(2)
        ]

    @property
    def inputs(self):
        return self.x, self.grad_out

    def __call__(self, backend, dtype=None):
        leaves = [
            value.detach().to(dtype or value.dtype).requires_grad_()
            for value in (self.x, *self.numbers)
        ]
        if backend == "reference":
            out = reference.layer_norm(*leaves, 1e-5)
        else:
            out = normalization.layer_norm(*leaves, 1e-5, backend=backend)
        return [out.detach(), *torch.autograd.grad(out, leaves, self.grad_out.to(out.dtype))]


OPS = {
    "batch norm": BatchNorm,
    "batch norm, channels last": lambda **options: BatchNorm(channels_last=True, **options),
    "layer norm": LayerNorm,
}
every_op = pytest.mark.parametrize("make", OPS.values(), ids=OPS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("residual", [False, True])
def test_launches_of_a_batch_norm(residual, trained, dtype, gpu_backend):
    op = BatchNorm(dtype=dtype)
    added = op.residual if residual else None
    weight, bias, mean, var = op.numbers
    leaves = [op.x.requires_grad_()]
    leaves += [values.requires_grad_() for values in (weight, bias)] if trained else []

    def forward():
        return normalization.frozen_batch_norm(
            op.x, weight, bias, mean, var, activation="relu", residual=added, backend=gpu_backend
        )

    def backward(out):
        return torch.autograd.grad(out, leaves, op.grad_out)

    backward(forward())  # Triton compiles
    found = gpu_counters.launches(forward)
    assert found.total() == 1, found
    out = forward()
    found = gpu_counters.launches(lambda: backward(out))
    assert found.total() == (2 if trained else 1), found


@every_op
def test_no_host_sync(make, gpu_backend):
    op = make()
    op(gpu_backend)  # compilation and first-call queries may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        op(gpu_backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@every_op
def test_the_host_does_not_wait_for_the_device(make, gpu_backend):
    # A sync inside our own library would go unseen by torch's debug mode.
    op = make()
    op(gpu_backend)
    torch.cuda.synchronize()
    torch.cuda._sleep(400_000_000)  # cycles: about 0.2 s
    op(gpu_backend)
    busy = torch.cuda.Event()
    busy.record()
    assert not busy.query()
    torch.cuda.synchronize()


@every_op
def test_graph_replays_follow_their_input(make, gpu_backend):
    op = make()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        op(gpu_backend)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = op(gpu_backend)
    for seed in (1, 2):
        fresh = make(seed=seed)
        fresh.numbers = op.numbers
        for mine, theirs in zip(op.inputs, fresh.inputs, strict=True):
            mine.copy_(theirs)
        graph.replay()
        assert all(map(torch.equal, results, fresh(gpu_backend)))


@every_op
def test_a_stream_of_its_own_is_followed(make, gpu_backend):
    values, op = make(seed=1), make(seed=2)
    op.numbers = values.numbers
    expected = values(gpu_backend)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # a kernel on another stream would read the old values
        for mine, theirs in zip(op.inputs, values.inputs, strict=True):
            mine.copy_(theirs)
        results = op(gpu_backend)
    stream.synchronize()
    assert all(map(torch.equal, results, expected))


@every_op
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_same_bits_every_time(dtype, make, gpu_backend):
    op = make(dtype=dtype)
    expected = op(gpu_backend)
    torch.use_deterministic_algorithms(True)  # also fills fresh memory with NaN
    try:
        for _ in range(5):
            assert all(map(torch.equal, op(gpu_backend), expected))
    finally:
        torch.use_deterministic_algorithms(False)


SITES = {  # of CLIP's RN50 at batch 64, and of its vision transformers
    "stem": lambda dtype: BatchNorm((64, 32, 112, 112), dtype),
    "stage 1": lambda dtype: BatchNorm((64, 256, 56, 56), dtype),
    "stage 4": lambda dtype: BatchNorm((64, 2048, 7, 7), dtype),
    "stage 4, channels last": lambda dtype: BatchNorm((64, 2048, 7, 7), dtype, channels_last=True),
    "odd": lambda dtype: BatchNorm((33, 77, 13, 13), dtype),
    "one image": lambda dtype: BatchNorm((1, 64, 112, 112), dtype),
    "ViT-B-16": lambda dtype: LayerNorm((64, 197, 768), dtype),
    "ViT-L-14": lambda dtype: LayerNorm((32, 257, 1024), dtype),
    "odd columns": lambda dtype: LayerNorm((100, 3, 1333), dtype),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("make", SITES.values(), ids=SITES)
def test_agreement_with_eager(make, dtype, gpu_backend):
    op = make(dtype)
    if isinstance(op, BatchNorm):  # rounding decides whether the gradient of what is near 0 passes
        op.grad_out[op("reference", torch.float64)[0] < 1e-4] = 0
    ours = op(gpu_backend)
    eager, truth = op("reference", torch.float32), op("reference", torch.float64)
    for mine, theirs, true in zip(ours, eager, truth, strict=True):
        as_close_as_eager(mine, theirs, true)


def test_more_than_two_to_the_31_elements(gpu_backend):
    free, _ = torch.cuda.mem_get_info()
    elements = 2**31 + 2**20
    if free < 5 * 2 * elements:
        pytest.skip(f"needs {5 * 2 * elements >> 30} GiB of GPU memory")
    channels = 1024
    x = torch.ones(elements // channels, channels, dtype=torch.bfloat16, device=DEVICE)
    scale = torch.arange(channels, dtype=torch.float32, device=DEVICE).requires_grad_()
    shift = torch.zeros(channels, device=DEVICE).requires_grad_()
    out = normalization.channel_affine(x, scale, shift, backend=gpu_backend)
    expected = scale.detach().to(torch.bfloat16)
    assert torch.equal(out[0], expected)
    assert torch.equal(out[-1], expected)
    grads = torch.autograd.grad(out, (scale, shift), x)
    assert all(bool((grad == elements // channels).all()) for grad in grads)
