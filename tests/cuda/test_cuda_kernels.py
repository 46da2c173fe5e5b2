"""Every path of the CUDA kernels, on the host (tests/cpp/cuda_host) and for made-up GPUs."""

from __future__ import annotations

import cuda_host_build
import pytest
import torch
from loss_backends import SMALL_GPU, CudaHost
from truth import assert_exact

from ueo_fast import reference

DTYPES = {torch.float32: 4, torch.float64: 8, torch.float16: 2, torch.bfloat16: 2}
IN_REGISTERS = [dtype for dtype, size in DTYPES.items() if size < 8]
KIB = 1 << 10


def logits_of(shape, dtype, row_stride=None, offset=0):
    """In memory that is NaN wherever it is not part of a row."""
    rows, columns = shape
    stride = columns if row_stride is None else row_stride
    memory = torch.full((offset + (rows - 1) * stride + columns + 16,), torch.nan, dtype=dtype)
    logits = memory.as_strided(shape, (stride, 1), offset)
    values = 3 * torch.randn(shape, generator=torch.Generator().manual_seed(1))
    if stride > 0:
        logits.copy_(values)
    else:
        logits[0].copy_(values[0])
    return logits


def both_ways(gpu, logits, confidence=None, marginal_weights=None, trade_off=1.0, eps=0.0):
    """(loss, gradient) from two calls, and as loss and gradient at once."""
    arguments = (logits, confidence, marginal_weights, trade_off, 1.0, eps)
    loss, *saved = gpu.ueo_loss_forward(*arguments)
    grad = gpu.ueo_loss_backward(torch.ones_like(loss), logits, *saved, trade_off, eps)
    at_once = gpu.ueo_loss_and_grad(*arguments)
    return (loss, grad), (at_once[0], at_once[2])


def hold(gpu, logits, confidence_scale=1.0, **options):
    """The loss and its gradient from ``gpu``, held to the truth."""
    confidence, marginal_weights = options.get("confidence"), options.get("marginal_weights")
    trade_off, eps = options.get("trade_off", 1.0), options.get("eps", 0.0)
    arguments = (confidence, marginal_weights, trade_off, confidence_scale, eps)
    loss, saved = gpu.ueo_loss_forward(logits, *arguments)
    grad = gpu.ueo_loss_backward(torch.ones_like(loss), logits, saved, trade_off, eps)
    if confidence_scale != 1:
        options["confidence_scale"] = confidence_scale
    assert_exact(loss, grad, logits, **options)


# ---- Every way to hold rows ----------------------------------------------------------------------


@pytest.mark.parametrize("eps", [0.0, 1e-5])
@pytest.mark.parametrize("columns_are", ["fewest", "most"])
@pytest.mark.parametrize("dtype", IN_REGISTERS, ids=str)
def test_lanes_of_every_shape_are_exact(dtype, columns_are, eps):
    gpu, size = CudaHost(multiprocessors=1), DTYPES[dtype]
    most = 0
    for number, shape in enumerate(gpu.module.register_shapes(size)):
        fewest, most = most + 1, (shape[0] * shape[1] - 1) * (16 // size) + 1
        columns = fewest if columns_are == "fewest" else most
        one = gpu.module.plan_registers(gpu.device, 1, columns, size)
        rows = 2 * one.blocks * one.teams + 3  # a few teams have one row more
        plan = gpu.module.plan_registers(gpu.device, rows, columns, size, plain=eps == 0)
        assert plan.fits
        assert (plan.shape, (plan.lanes, plan.slots)) == (number, shape)
        assert plan.steps > 1
        hold(gpu, logits_of((rows, columns), dtype), eps=eps, trade_off=0.7)
    assert not gpu.module.plan_registers(gpu.device, 1, most + 1, size).fits


# What each made-up GPU and shape is there for: rows, columns, bytes per element, properties of the
# GPU, and the plans that make the case worth its name.
ONE = {"multiprocessors": 1}


def room(kib):
    return {"shared_per_block": kib * KIB, "shared_per_multiprocessor": (kib + 1) * KIB}


REGISTERS, BLOCK, ANY = "plan_registers", "plan_shared_rows", "plan_rows"
PATHS = {
    "lanes, more rows than one sum may have": (8300, 126, 4, ONE, REGISTERS, {"lanes": 16}),
    "lanes of pairs, the same": (16500, 122, 2, ONE, REGISTERS, {"lanes": 16}),
    "a block has a row": (19, 1100, 4, ONE, BLOCK, {"many": False}),
    "a block has a row of pairs": (19, 1100, 2, ONE, BLOCK, {"many": False}),
    "the most few slots": (5, 16378, 4, ONE, BLOCK, {"many": False, "threads": 1024}),
    "the fewest many slots": (5, 16382, 4, ONE, BLOCK, {"many": True, "threads": 704}),
    "the most many slots": (5, 24573, 4, ONE, BLOCK, {"many": True, "threads": 1024}),
    "many slots of pairs": (9, 16400, 2, ONE, BLOCK, {"many": True}),
    "the most many slots of pairs": (9, 24569, 2, ONE, BLOCK, {"many": True, "threads": 1024}),
    "blocks, more rows than one sum may have": (1100, 1030, 4, ONE, BLOCK, {"blocks": 8}),
    "any: a row longer than a block has": (5, 24574, 4, {}, ANY, {"block_team": True}),
    "any: half a row in shared memory": (9, 1100, 4, room(8), ANY, {"cached": 108}),
    "any: sums in global memory": (9, 2300, 4, room(8), ANY, {"columns_shared": False}),
    "any: nothing in shared memory": (9, 1100, 4, room(2), ANY, {"cached": 0}),
    "any: the same of pairs": (9, 2300, 2, room(2), ANY, {"cached": 0, "columns_shared": False}),
    "any: more rows than one sum may have": (1200, 1030, 4, room(8), ANY, {"blocks": 8}),
    "double: a thread has a row": (300, 5, 8, {}, ANY, {"lanes": 1}),
    "double: eight lanes share a row": (100, 50, 8, {}, ANY, {"lanes": 8}),
    "double: a warp has a row": (40, 345, 8, {}, ANY, {"lanes": 32, "block_team": False}),
    "double: a block has a row": (9, 1100, 8, {}, ANY, {"block_team": True, "cached": 551}),
    "double: half of it in shared memory": (9, 1100, 8, room(12), ANY, {"columns_shared": True}),
    "double: nothing in shared memory": (9, 1100, 8, room(2), ANY, {"cached": 0}),
}


@pytest.mark.parametrize("confidence_scale", [1.0, 0.5])
@pytest.mark.parametrize("case", PATHS.values(), ids=PATHS.keys())
def test_every_path_is_exact(case, confidence_scale):
    rows, columns, size, properties, *_ = case
    gpu = CudaHost(**properties)
    for dtype in (dtype for dtype in DTYPES if DTYPES[dtype] == size):
        hold(gpu, logits_of((rows, columns), dtype), confidence_scale, trade_off=0.7)


@pytest.mark.parametrize("name", PATHS)
def test_the_paths_are_what_they_are_called(name):
    rows, columns, size, properties, kind, expected = PATHS[name]
    gpu = CudaHost(**properties)
    plans = {
        what: getattr(gpu.module, what)(gpu.device, rows, columns, size)
        for what in (REGISTERS, BLOCK, ANY)
    }
    fits = [what for what in (REGISTERS, BLOCK) if plans[what].fits]
    assert (*fits, ANY)[0] == kind
    assert {key: getattr(plans[kind], key) for key in expected} == expected
    assert plans[kind].steps > (128 if "one sum" in name else 0)  # kRowsPerSum


# ---- Where rows lie ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "row_stride", "offset"),
    [
        pytest.param((70, 345), 345, 1, id="sticks out before"),
        pytest.param((70, 345), 345, 3, id="sticks out before and behind"),
        pytest.param((70, 345), 346, 0, id="lanes, the gradient elsewhere in its slots"),
        pytest.param((70, 345), 361, 0, id="lanes, apart but alike"),
        pytest.param((19, 1100), 1101, 1, id="a block, the gradient elsewhere in its slots"),
        pytest.param((19, 1101), 1117, 3, id="a block, apart"),
        pytest.param((17, 5), 9, 1, id="within a slot or two"),
        pytest.param((17, 1), 9, 1, id="within a slot"),
        *(
            pytest.param((rows, columns), columns, offset, id=f"{rows} x {columns} from {offset}")
            for rows, columns in ((1, 1), (1, 2), (2, 1), (3, 2), (5, 3))
            for offset in (0, 1, 3)
        ),
        *(
            pytest.param((6, columns), 0, offset, id=f"one row six times, {columns} from {offset}")
            for columns in (1, 2, 4, 5, 345, 1100)
            for offset in (0, 1)
        ),
    ],
)
def test_rows_anywhere_are_exact(shape, row_stride, offset, dtype):
    logits = logits_of(shape, dtype, row_stride, offset)
    assert logits.storage_offset() == offset
    for options in ({}, {"eps": 1e-5}):
        hold(CudaHost(multiprocessors=1), logits, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", [0, 1, 3])
@pytest.mark.parametrize("columns", [1, 3, 17, 345, 1030, 4500])
def test_max_softmax_reads_rows_anywhere(columns, offset, dtype):
    logits = logits_of((7, columns), dtype, columns + 1, offset)
    found = CudaHost(multiprocessors=1).max_softmax(logits, 0.5)
    truth = reference.max_softmax(logits.double(), 0.5)
    tolerance = 1e-13 if dtype == torch.float64 else 3e-6
    torch.testing.assert_close(found.double(), truth, rtol=tolerance, atol=0)


# ---- Given weights -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "columns"),
    [(70, 345), (9, 1100), (4096, 5), (5000, 5), (8200, 3)],  # kScanRows; parts of a scan: 2, 3
)
def test_given_weights_are_exact(rows, columns, dtype):
    compute = reference.compute_dtype(dtype)
    generator = torch.Generator().manual_seed(2)
    confidence, marginal_weights = torch.rand(2, rows, generator=generator).to(compute) + 0.1
    # The largest of all in the last part, and no sum that overflows.
    confidence[-1] = 1.5
    gpu, logits = CudaHost(multiprocessors=2), logits_of((rows, columns), dtype)
    both = {"confidence": confidence, "marginal_weights": marginal_weights}
    hold(gpu, logits, **both)
    loss, saved = gpu.ueo_loss_forward(logits, 1e30 * confidence, 1e37 * marginal_weights, 1, 1, 0)
    grad = gpu.ueo_loss_backward(torch.ones_like(loss), logits, saved, 1, 0)
    assert_exact(loss, grad, logits, **both)


# ---- The marginal --------------------------------------------------------------------------------

MARGINALS = {
    "one block alone": (70, 345, {}, {"blocks": 1, "threads": 1024, "tile_lanes": 128}),
    "one block alone, two tiles": (4, 8000, ONE, {"blocks": 1, "tile_lanes": 1024}),
    "tiles of a part of a warp": (
        700,
        1000,
        {"multiprocessors": 40},
        {"blocks": 32, "tile_lanes": 8},
    ),
    "tiles of warps": (48, 9000, {"multiprocessors": 40}, {"blocks": 36, "tile_lanes": 64}),
    "more tiles than multiprocessors": (9, 21841, {}, {"blocks": 22, "tile_lanes": 256}),
}


@pytest.mark.parametrize("case", MARGINALS.values(), ids=MARGINALS.keys())
def test_every_way_to_the_marginal_is_exact(case):
    rows, columns, properties, expected = case
    gpu = CudaHost(**properties)
    partials = gpu.module.partials(gpu.device, rows, columns, "float32", True)
    plan = gpu.module.plan_marginal(gpu.device, columns, partials)
    assert {name: getattr(plan, name) for name in expected} == expected
    hold(gpu, logits_of((rows, columns), torch.float32))


# ---- Launches ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "columns"), [(300, 10), (70, 345), (9, 1100), (3, 25000)])
@pytest.mark.parametrize("eps", [0.0, 1e-5])
def test_a_loss_and_its_gradient_are_three_launches(rows, columns, eps, dtype):
    """Statistics, marginal, gradient; PyTorch's autograd fills the upstream gradient itself."""
    gpu, logits = CudaHost(), logits_of((rows, columns), dtype)
    both_ways(gpu, logits, eps=eps)
    assert gpu.launches == 2 * 3


@pytest.mark.parametrize(("rows", "launches"), [(4096, 3), (4097, 4)])
@pytest.mark.parametrize("which", ["confidence", "marginal_weights"])
def test_a_fourth_launch_looks_through_more_than_4096_weights(which, rows, launches):
    gpu, logits = CudaHost(), logits_of((rows, 5), torch.float32)
    both_ways(gpu, logits, **{which: torch.rand(rows) + 0.1})
    assert gpu.launches == 2 * launches


@pytest.mark.parametrize("properties", [{}, room(8)], ids=["227 KiB", "8 KiB"])
@pytest.mark.parametrize(("rows", "columns"), [(700, 100), (130, 345), (40, 1100), (9, 21841)])
def test_the_same_bits_whatever_the_order_of_blocks_and_threads(rows, columns, properties):
    gpu = CudaHost(**properties)
    logits = logits_of((rows, columns), torch.float32)
    results = []
    for seed in range(3):
        gpu.module.set_seed(seed)
        results.append([tensor for way in both_ways(gpu, logits) for tensor in way])
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


# ---- Plans ---------------------------------------------------------------------------------------

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
@pytest.mark.parametrize("rows", [1, 64, 4096, 65536, 10_000_000, 1 << 31])
@pytest.mark.parametrize("columns", [1, 10, 345, 1000, 2048, 16382, 21841, 300_000])
def test_plans_stay_within_the_gpu(columns, rows, size, gpu):
    module = cuda_host_build.cuda_on_host()
    properties = SMALL_GPU | gpu
    device = module.Device(**properties)

    def fits_the_gpu(plan, most_threads):
        assert plan.shared_bytes <= properties["shared_per_block"]
        assert 32 <= plan.threads <= most_threads
        assert plan.threads % 32 == 0
        assert plan.blocks >= 1

    def shares_out_the_rows(plan, teams):
        assert plan.blocks % (16 // size) == 0  # every row of a block at the same alignment
        assert plan.blocks * teams * plan.steps >= rows

    for per_column in (
        module.PerColumn.none,
        module.PerColumn.per_block,
        module.PerColumn.per_team,
    ):
        plan = module.plan_rows(device, rows, columns, size, per_column)
        fits_the_gpu(plan, 512 if size == 8 and plan.block_team else 1024)
        shares_out_the_rows(plan, plan.teams)
        assert plan.threads == plan.lanes * plan.teams
    held = [module.plan_shared_rows(device, rows, columns, size)]
    for plain in (True, False):
        for per_team in (True, False):
            held += [
                module.plan_registers(
                    device, rows, columns, size, plain=plain, sums_per_team=per_team
                )
            ]
    for plan in held:
        if not plan.fits:
            continue
        teams = getattr(plan, "teams", 1)
        fits_the_gpu(plan, 1024)
        shares_out_the_rows(plan, teams)
        # A row's number has 32 bits, also that of the one that a team would have next.
        assert plan.blocks * teams * (plan.steps + 1) < 1 << 32
        assert size < 8
        assert rows < 1 << 31
    for plain in (True, False):
        dtype = {2: "float16", 4: "float32", 8: "float64"}[size]
        partials = module.partials(device, rows, columns, dtype, plain)
        plan = module.plan_marginal(device, columns, partials)
        fits_the_gpu(plan, 1024)
        assert plan.threads % plan.tile_lanes == 0
