"""Every path of the CUDA kernels, on the host (tests/cpp/cuda_host) and for made-up GPUs."""

from __future__ import annotations

import cuda_host_build
import pytest
import torch
from loss_backends import SMALL_GPU, CudaHost
from truth import assert_exact

DTYPES = {torch.float32: 4, torch.float64: 8, torch.float16: 2, torch.bfloat16: 2}
KIB = 1 << 10


def logits_of(shape, dtype, row_stride=None):
    stride = row_stride or shape[1]
    memory = 3 * torch.randn(shape[0] * stride, generator=torch.Generator().manual_seed(1))
    return memory.to(dtype).as_strided(shape, (stride, 1))


def both_ways(gpu, logits, confidence=None, trade_off=1.0, eps=0.0):
    """(loss, gradient) in two reads, and as loss and gradient at once."""
    arguments = (logits, confidence, None, trade_off, 1.0, eps)
    loss, *saved = gpu.ueo_loss_forward(*arguments)
    grad = gpu.ueo_loss_backward(torch.ones_like(loss), logits, *saved, trade_off, eps)
    at_once = gpu.ueo_loss_and_grad(*arguments)
    return (loss, grad), (at_once[0], at_once[2])


# What each made-up GPU and shape is there for: rows, columns, shared memory per block, and what the
# plans must say for the case to be worth its name (of float32).
PATHS = {
    "a thread has a row": (300, 10, 227 * KIB, {"lanes": 1, "cached": 4}),
    "eight lanes share a row": (100, 100, 227 * KIB, {"lanes": 8}),
    "a warp has a row": (40, 345, 227 * KIB, {"lanes": 32, "block_team": False}),
    "more rows than one sum may have": (1200, 1030, 12 * KIB, {"block_team": True, "blocks": 8}),
    "a block has a row": (9, 1100, 227 * KIB, {"block_team": True, "cached": 276}),
    "half a row in shared memory": (9, 1100, 8 * KIB, {"cached": 108, "columns_shared": True}),
    "column sums in global memory": (9, 2300, 8 * KIB, {"columns_shared": False}),
    "nothing in shared memory": (9, 1100, 2 * KIB, {"cached": 0, "columns_shared": False}),
}


@pytest.mark.parametrize("eps", [0.0, 1e-5])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", PATHS.values(), ids=PATHS.keys())
def test_every_path_is_exact(case, dtype, eps):
    rows, columns, shared, _ = case
    gpu = CudaHost(shared_per_block=shared, shared_per_multiprocessor=shared + KIB)
    logits = logits_of((rows, columns), dtype, row_stride=columns + 1)
    for loss, grad in both_ways(gpu, logits, eps=eps, trade_off=0.7):
        assert_exact(loss, grad, logits, eps=eps, trade_off=0.7)


@pytest.mark.parametrize("case", PATHS.values(), ids=PATHS.keys())
def test_the_paths_are_what_they_are_called(case):
    rows, columns, shared, expected = case
    gpu = CudaHost(shared_per_block=shared, shared_per_multiprocessor=shared + KIB)
    plan = gpu.module.plan_statistics(gpu.device, rows, columns, 4)
    assert {name: getattr(plan, name) for name in expected} == expected
    if rows == 1200:
        assert plan.steps > 128  # kRowsPerSum


@pytest.mark.parametrize("eps", [0.0, 1e-5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("columns", [100, 345, 900])
def test_rows_that_wait_in_registers(columns, dtype, eps):
    size = DTYPES[dtype]
    module = cuda_host_build.cuda_on_host()
    plenty = CudaHost().device
    teams = module.plan_one_pass(plenty, 1, columns, size).teams
    rows = 8 * teams + 30  # on 8 multiprocessors: four rows of a block beyond one per team
    for room in range(module.plan_one_pass(plenty, rows, columns, size).shared_bytes, 0, -256):
        gpu = CudaHost(shared_per_block=room, shared_per_multiprocessor=room + KIB)
        plan = module.plan_one_pass(gpu.device, rows, columns, size)
        if plan.held_rows > 0:
            break
    assert plan.fits
    assert plan.held_rows > 0
    assert plan.shared_rows < plan.rows_per_block
    assert plan.shared_bytes <= room
    logits = logits_of((rows, columns), dtype)
    confidence = torch.rand(rows) + 0.1
    _, (loss, grad) = both_ways(gpu, logits, confidence, eps=eps)
    assert_exact(loss, grad, logits, confidence=confidence, eps=eps)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_range_of_weights_that_has_a_launch_of_its_own(dtype):
    rows = 5000  # above kScanRows
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    logits = logits_of((rows, 5), dtype)
    confidence = (torch.rand(rows) + 0.1).to(compute)
    for loss, grad in both_ways(CudaHost(), logits, 1e30 * confidence):
        assert_exact(loss, grad, logits, confidence=confidence)


@pytest.mark.parametrize("cooperative", [True, False])
def test_the_same_bits_whatever_the_order_of_blocks_and_threads(cooperative):
    gpu = CudaHost(cooperative=cooperative)
    logits = logits_of((130, 345), torch.float32)
    results = []
    for seed in range(3):
        gpu.module.set_seed(seed)
        results.append([tensor for way in both_ways(gpu, logits) for tensor in way])
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


H100 = {
    "multiprocessors": 132,
    "shared_per_block": 227 * KIB,
    "shared_per_multiprocessor": 228 * KIB,
    "l2_bytes": 50 << 20,
}
SMALLEST = {  # compute capability 8.6, 8.9, 12.0
    "multiprocessors": 20,
    "threads_per_multiprocessor": 1536,
    "shared_per_block": 99 * KIB,
    "shared_per_multiprocessor": 100 * KIB,
}


@pytest.mark.parametrize("gpu", [H100, SMALLEST], ids=["H100", "99 KiB"])
@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize("rows", [1, 64, 4096, 65536, 10_000_000])
@pytest.mark.parametrize("columns", [1, 10, 345, 1000, 2048, 21841, 300_000])
def test_plans_stay_within_the_gpu(columns, rows, size, gpu):
    module = cuda_host_build.cuda_on_host()
    properties = SMALL_GPU | gpu
    device = module.Device(**properties)
    plan = module.plan_statistics(device, rows, columns, size)
    assert plan.shared_bytes <= properties["shared_per_block"]
    assert plan.blocks % (16 // size) == 0  # every row of a block at the same alignment
    assert plan.blocks * plan.teams * plan.steps >= rows
    assert 32 <= plan.threads <= (512 if size == 8 and plan.block_team else 1024)
    assert plan.threads == plan.lanes * plan.teams
    one_pass = module.plan_one_pass(device, rows, columns, size)
    if one_pass.fits:
        assert one_pass.shared_bytes <= properties["shared_per_block"]
        assert one_pass.blocks <= properties["multiprocessors"]  # all resident: the grid can wait
        assert one_pass.rows_per_block * one_pass.blocks >= rows
        places = one_pass.shared_rows + one_pass.held_rows * one_pass.teams
        assert one_pass.rows_per_block <= places


def test_what_an_h100_keeps_on_the_chip():
    # docs/kernels.md says so.
    module = cuda_host_build.cuda_on_host()
    device = module.Device(**(SMALL_GPU | H100))
    plan = module.plan_one_pass(device, 16384, 1000, 2)
    assert plan.fits
    assert plan.held_rows == 2
    assert not module.plan_one_pass(device, 16384, 1000, 4).fits
