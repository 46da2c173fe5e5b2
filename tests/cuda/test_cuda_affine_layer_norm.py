"""Every path of layer_norm's CUDA kernels, on the host and for made-up GPUs."""

from __future__ import annotations

import itertools

import cuda_host_build
import pytest
import torch
from cuda_affine_host import (
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

PATHS = {  # rows, columns, shared memory per block, and what the plan of backward must say
    "a thread has a row": (300, 10, 227 * KIB, {"lanes": 1, "cached": 4}),
    "eight lanes share a row": (100, 100, 227 * KIB, {"lanes": 8}),
    "a warp has a row": (40, 345, 227 * KIB, {"lanes": 32, "block_team": False}),
    "more rows than one sum may have": (1200, 1030, 20 * KIB, {"block_team": True, "blocks": 8}),
    "a block has a row": (9, 1100, 227 * KIB, {"block_team": True, "cached": 276}),
    "half a row in shared memory": (9, 1100, 20 * KIB, {"columns_shared": True, "cached": 162}),
    "column sums in global memory": (9, 2300, 8 * KIB, {"columns_shared": False}),
    "nothing in shared memory": (9, 1100, 2 * KIB, {"columns_shared": False, "cached": 0}),
}


def norm_gpu(shared):
    return CudaAffineHost(shared_per_block=shared, shared_per_multiprocessor=shared + KIB)


def norm_truth(x, weight, bias, grad_out, dtype, eps=1e-5):
    """out, grad_x, sums, computed in ``dtype``."""
    x, grad_out = x.to(dtype).requires_grad_(), grad_out.to(dtype)
    columns = x.shape[1]
    weight = (torch.ones(columns) if weight is None else weight).to(dtype).requires_grad_()
    bias = (torch.zeros(columns) if bias is None else bias).to(dtype).requires_grad_()
    out = torch.nn.functional.layer_norm(x, (columns,), weight, bias, eps)
    grads = torch.autograd.grad(out, (x, weight, bias), grad_out)
    return out.detach(), grads[0], torch.stack(grads[1:])


def check_norm(gpu, x, weight, bias, grad_out):
    out, mean, rstd = gpu.layer_norm_forward(x, weight, bias, 1e-5)
    ours = out, *gpu.layer_norm_backward(grad_out, x, mean, rstd, weight, True, True)
    inputs = (x.detach(), weight, bias, grad_out)
    eager = norm_truth(*inputs, compute_dtype(x.dtype))
    for mine, theirs, truth in zip(ours, eager, norm_truth(*inputs, torch.float64), strict=True):
        as_close_as_eager(mine, theirs, truth)


def norm_inputs(rows, columns, dtype, row_stride=None):
    randn = make_randn(1)
    stride = row_stride or columns
    x = (2 * randn(rows * stride) + 0.5).to(dtype).as_strided((rows, columns), (stride, 1))
    weight, bias = (randn(columns).to(compute_dtype(dtype)) for _ in range(2))
    return x, weight, bias, randn(rows, columns).to(dtype)


@every_dtype
@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("path", PATHS)
def test_every_path_of_layer_norm_is_exact(path, strided, dtype):
    rows, columns, shared, _ = PATHS[path]
    if "one sum" in path and dtype != torch.float32:
        pytest.skip("takes seconds, and rows are counted alike whatever their dtype")
    # With a stride of its own, x starts elsewhere in its slots than grad_out does.
    inputs = norm_inputs(rows, columns, dtype, columns + 1 if strided else None)
    check_norm(norm_gpu(shared), *inputs)


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_the_paths_of_layer_norm_are_what_they_are_called(path):
    rows, columns, shared, expected = path
    gpu = norm_gpu(shared)
    plan = gpu.module.plan_norm_backward(gpu.device, rows, columns, 4)
    assert {name: getattr(plan, name) for name in expected} == expected
    if rows == 1200:
        assert plan.steps > 128  # kRowsPerSum


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("columns", [2, 3, 4, 5, 7, 8, 9, 31, 33, 127, 128, 129, 513])
def test_layer_norm_at_the_edges_of_slots_and_warps(columns, dtype):
    for rows in (1, 33):
        check_norm(CudaAffineHost(), *norm_inputs(rows, columns, dtype))


def test_layer_norm_of_a_single_column_is_its_bias():
    x, weight, bias, grad_out = norm_inputs(9, 1, torch.float32)
    gpu = CudaAffineHost()
    out, mean, rstd = gpu.layer_norm_forward(x, weight, bias, 1e-5)
    grad_x, sums = gpu.layer_norm_backward(grad_out, x, mean, rstd, weight, True, True)
    assert torch.equal(out, bias.expand(9, 1))
    assert torch.equal(mean, x[:, 0])
    assert grad_x.abs().max() < 1e-3
    assert sums[0] == 0


@pytest.mark.parametrize("given", list(itertools.product([False, True], repeat=2)), ids=str)
def test_layer_norm_without_weight_or_bias(given):
    x, *parameters, grad_out = norm_inputs(50, 100, torch.float32)
    weight, bias = (p if is_given else None for p, is_given in zip(parameters, given, strict=True))
    check_norm(CudaAffineHost(), x, weight, bias, grad_out)


@pytest.mark.parametrize("needs", [(True, False), (False, True), (False, False)], ids=str)
@pytest.mark.parametrize("columns", [100, 1100])
def test_layer_norm_computes_only_what_is_needed(columns, needs):
    x, weight, bias, grad_out = norm_inputs(30, columns, torch.float32)
    gpu = CudaAffineHost(multiprocessors=8)
    _, mean, rstd = gpu.layer_norm_forward(x, weight, bias, 1e-5)
    saved = grad_out, x, mean, rstd, weight
    both = gpu.layer_norm_backward(*saved, True, True)
    for mine, whole, needed in zip(
        gpu.layer_norm_backward(*saved, *needs), both, needs, strict=True
    ):
        if needed:  # rows are grouped otherwise, where sums are not needed
            torch.testing.assert_close(mine, whole, rtol=1e-6, atol=1e-6)
        else:
            assert mine.shape == (0,)


def test_layer_norm_far_from_zero():
    x, weight, bias, grad_out = norm_inputs(40, 345, torch.float32)
    check_norm(CudaAffineHost(), x + 3000, weight, bias, grad_out)


def test_a_row_that_is_not_finite_spoils_only_itself():
    x, weight, bias, grad_out = norm_inputs(40, 100, torch.float32)
    gpu = CudaAffineHost()
    clean, _, _ = gpu.layer_norm_forward(x, weight, bias, 1e-5)
    x[3, 7], x[5, 8] = torch.nan, torch.inf
    out, mean, rstd = gpu.layer_norm_forward(x, weight, bias, 1e-5)
    grad_x, sums = gpu.layer_norm_backward(grad_out, x, mean, rstd, weight, True, True)
    _, expected, expected_sums = norm_truth(x, weight, bias, grad_out, torch.float32)
    spoilt = torch.zeros(40, 1, dtype=torch.bool)
    spoilt[[3, 5]] = True
    assert out.isnan().equal(spoilt.expand_as(out))
    assert torch.equal(out.where(~spoilt, 0), clean.where(~spoilt, 0))
    assert torch.equal(grad_x.isnan(), expected.isnan())
    assert torch.equal(sums.isnan(), expected_sums.isnan())


@pytest.mark.parametrize("gpu", [H100, SMALLEST], ids=["H100", "99 KiB"])
@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize("rows", [1, 64, 65536, 10_000_000])
@pytest.mark.parametrize("columns", [1, 10, 768, 1024, 4096, 300_000])
def test_plans_of_layer_norm_stay_within_the_gpu(columns, rows, size, gpu):
    module = cuda_host_build.cuda_affine_on_host()
    properties = SMALL_GPU | gpu
    device = module.Device(**properties)
    for plan_of in (module.plan_norm_forward, module.plan_norm_backward):
        plan = plan_of(device, rows, columns, size)
        assert plan.shared_bytes <= properties["shared_per_block"]
        assert plan.blocks % (16 // size) == 0  # every row of a block at the same alignment
        assert plan.blocks * plan.teams * plan.steps >= rows
        assert 32 <= plan.threads <= (512 if size == 8 and plan.block_team else 1024)
        assert plan.threads == plan.lanes * plan.teams


def test_the_same_bits_whatever_the_order_of_blocks_and_threads():
    gpu = CudaAffineHost()
    x, weight, bias, grad_out = norm_inputs(130, 345, torch.float32)
    results = []
    for seed in range(3):
        gpu.module.set_seed(seed)
        out, mean, rstd = gpu.layer_norm_forward(x, weight, bias, 1e-5)
        grads = gpu.layer_norm_backward(grad_out, x, mean, rstd, weight, True, True)
        results.append([out, mean, rstd, *grads])
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))
