"""The loss on a GPU by size: alignment of rows, both ways to the gradient, memory, 2^31."""

from __future__ import annotations

import pytest
import torch
from test_gpu import DEVICE, every_way, forward_backward, make_logits, pytestmark
from truth import assert_exact

from benchmarks import gpu_counters
from ueo_fast import ueo_loss, ueo_loss_and_grad

__all__ = ["pytestmark"]  # shared with test_gpu.py

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@every_way
@every_dtype
@pytest.mark.parametrize("columns", [345, 352, 1000])
def test_rows_at_every_alignment(columns, dtype, way, gpu_backend):
    buffer = make_logits(37, columns + 24, dtype)
    for offset in range(16):
        for end in (offset + columns, offset + columns - 7):
            logits = buffer[:, offset:end]
            before = logits.clone()
            assert_exact(*way(logits, gpu_backend), logits)
            assert torch.equal(logits, before)


@every_way
@every_dtype
def test_an_odd_row_stride_and_an_odd_start(dtype, way, gpu_backend):
    flat = make_logits(1, 40_003, dtype).flatten()
    for start, stride in ((0, 201), (1, 200), (3, 203), (5, 198)):
        logits = flat[start:].as_strided((190, 197), (stride, 1), start)
        assert_exact(*way(logits, gpu_backend), logits)


# What each is there for: kernels differ by size, results must not.
SHAPES = {
    (1, 1): "the smallest",
    (64, 345): "fewer rows than the GPU has room for; one block finishes the marginal",
    (512, 1000): "as above, and many blocks share the marginal",
    (16384, 1000): "many steps of every block",
    (65536, 345): "many short rows",
    (600, 21841): "long rows",
    (600, 16384): "long rows of whole vectors",
    (8, 50257): "rows longer than a block holds",
    (100_000, 3): "rows far shorter than a warp",
}


@every_way
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_both_ways_against_float64(shape, dtype, way, gpu_backend):
    logits = make_logits(*shape, dtype)
    assert_exact(*way(logits, gpu_backend), logits)


@pytest.mark.parametrize("shape", [(64, 345), (16384, 1000)], ids=str)
def test_both_ways_take_weights_and_options(shape, gpu_backend):
    logits = make_logits(*shape)
    given = {
        "confidence": torch.rand(shape[0], device=DEVICE) + 0.1,
        "marginal_weights": torch.rand(shape[0], device=DEVICE),
        "trade_off": -0.7,
        "eps": 1e-5,
    }
    assert_exact(*forward_backward(logits, gpu_backend, **given), logits, **given)
    assert_exact(*ueo_loss_and_grad(logits, **given, backend=gpu_backend), logits, **given)


@every_way
def test_launches_of_a_small_batch(way, gpu_backend):
    logits = make_logits()
    upstream = torch.ones((), device=DEVICE)  # autograd would launch a fill for it

    def forward_and_backward():
        leaf = logits.detach().requires_grad_()
        return torch.autograd.grad(ueo_loss(leaf, backend=gpu_backend), leaf, upstream)

    run = forward_and_backward if way is forward_backward else lambda: way(logits, gpu_backend)
    run()
    found = gpu_counters.launches(run)
    assert 1 <= found.total() <= 3, found


@every_way
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(16384, 1000), (4096, 21841)], ids=str)
def test_peak_memory(shape, dtype, way, gpu_backend):
    logits = make_logits(*shape, dtype)
    peak = gpu_counters.peak_bytes(lambda: way(logits, gpu_backend))
    assert 1 <= peak / (logits.numel() * logits.element_size()) <= 1.05


def chunked_truth(logits, rows_of_interest):
    """Loss and some rows' gradient in float64, a few thousand rows at a time."""
    chunks = logits.split(2048)
    sums = torch.zeros(logits.shape[1], dtype=torch.float64, device=DEVICE)
    w_sum = v_sum = entropy_sum = torch.zeros((), dtype=torch.float64, device=DEVICE)
    for chunk in chunks:
        log_p = chunk.double().log_softmax(1)
        p = log_p.exp()
        w = p.amax(1)
        sums += (1 / w) @ p
        w_sum, v_sum = w_sum + w.sum(), v_sum + (1 / w).sum()
        entropy_sum = entropy_sum - w @ (p * log_p).sum(1)
    q = sums / v_sum
    loss = entropy_sum / w_sum + (q * q.log()).sum()
    log_p = logits[rows_of_interest].double().log_softmax(1)
    p = log_p.exp()
    w = p.amax(1, keepdim=True)
    h = -(p * log_p).sum(1, keepdim=True)
    s = (p * q.log()).sum(1, keepdim=True)
    grad = -w / w_sum * p * (log_p + h) + p * (q.log() - s) / w / v_sum
    return loss, grad


def test_the_chunked_truth_is_the_truth():
    logits = make_logits(5000, 40)
    rows = torch.tensor([0, 2500, 4999], device=DEVICE)
    loss, grad = chunked_truth(logits, rows)
    leaf = logits.double().requires_grad_()
    expected = ueo_loss(leaf, backend="reference")
    (whole,) = torch.autograd.grad(expected, leaf)
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(grad, whole[rows])


@every_way
def test_more_than_two_to_the_31_elements(way, gpu_backend):
    rows, columns = 65536, 40000
    needed = 4 * rows * columns + (6 << 30)  # logits, gradient, the truth's chunks
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed >> 30} GiB of free GPU memory")
    logits = torch.empty(rows, columns, dtype=torch.bfloat16, device=DEVICE).normal_(std=3)
    loss, grad = way(logits, gpu_backend)
    chosen = torch.tensor([0, 1, 53687, 53688, rows - 1], device=DEVICE)  # either side of 2^31
    true_loss, true_grad = chunked_truth(logits, chosen)
    torch.testing.assert_close(loss.double(), true_loss, rtol=1e-5, atol=1e-6)
    error = (grad[chosen].double() - true_grad).norm(dim=1) / true_grad.norm(dim=1)
    assert error.max() < 2.0**-7  # bfloat16's rounding
    assert grad.isfinite().all()
