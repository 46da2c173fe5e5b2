"""The Triton backend where its own tiles, chunks and programs end (tests/truth.py has the rule).

On a machine without a GPU, Triton's interpreter runs the kernels on the CPU: TRITON_INTERPRET=1
must be set before they are imported. What every backend must do is in test_ueo_loss*.py.
"""

from __future__ import annotations

import math

import pytest
import torch
from truth import assert_exact

from ueo_fast import backends, ueo_loss
from ueo_fast.ops.ueo_loss import UEOLossFunction

triton = pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu" and not backends.is_triton_interpreted():
    pytest.skip("no GPU, and TRITON_INTERPRET is not 1", allow_module_level=True)

launchers = pytest.importorskip("ueo_fast.triton.ueo_loss")
autotune = pytest.importorskip("ueo_fast.triton.autotune")
tuning = pytest.importorskip("ueo_fast.triton.tuning")

pytestmark = pytest.mark.filterwarnings(
    "ignore::RuntimeWarning:triton"  # NumPy warns of what is meant: overflow to inf, inf - inf
)

DTYPES = [torch.float32, torch.float64, torch.float16]
if DEVICE == "cuda":
    DTYPES.append(torch.bfloat16)  # the interpreter has none
DTYPE_IDS = [str(dtype).removeprefix("torch.") for dtype in DTYPES]


def make_logits(shape, dtype=torch.float32, scale=3.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(shape, generator=generator)).to(dtype).to(DEVICE)


def loss_and_grad(logits, upstream=1.0, **options):
    leaf = logits.detach().requires_grad_()
    loss = ueo_loss(leaf, **options, backend="triton")
    (grad,) = torch.autograd.grad(loss * upstream, leaf)
    return loss.detach(), grad


@pytest.fixture
def processors(monkeypatch):
    """Makes the device one of `n` processors."""
    return lambda n: monkeypatch.setattr(launchers, "processors_of", lambda device: n)


# (B, C, processors): what it is there for. Limits of float32; a quarter of C in float64.
EDGES = {
    (1, 8, 1): "one program, one row of a tile of 64",
    (64, 8, 1): "exactly a tile of rows",
    (257, 9, 1): "one row of the fifth tile; one column more than the smallest tile",
    (8, 512, 1): "one tile per chunk, exactly full",
    (65, 512, 1): "the last chunk is one row",
    (63, 513, 132): "more programs than 16 chunks: the other tile of the last sum",
    (260, 250, 132): "chunks of one tile on many processors",
    (3, 2048, 1): "one row per tile; float64 ends to hold rows",
    (3, 2049, 1): "float64 goes in tiles",
    (2, 8192, 1): "the longest row that is held",
    (3, 8193, 1): "the first that is not; a tile of one column",
    (5, 10240, 1): "exactly five tiles; the last group of rows is half full",
    (7, 8200, 2): "two tiled chunks: column sums of several groups of rows",
}


# Half precision is float32 with other loads and stores, and float64 is the same code with its own
# limits. On the interpreter, which takes seconds per case, some of the edges are enough.
EDGES_OF = {
    torch.float16: ((257, 9, 1), (3, 8193, 1), (7, 8200, 2)),
    torch.float64: ((257, 9, 1), (3, 2048, 1), (3, 2049, 1), (7, 8200, 2)),
}
CASES = [
    (edge, dtype)
    for edge in EDGES
    for dtype in DTYPES
    if DEVICE == "cuda" or edge in EDGES_OF.get(dtype, EDGES)
]


@pytest.mark.parametrize(("edge", "dtype"), CASES, ids=str)
def test_where_tiles_and_chunks_end(edge, dtype, processors):
    rows, columns, count = edge
    processors(count)
    logits = make_logits((rows, columns), dtype)
    loss, grad = loss_and_grad(logits)
    assert_exact(loss, grad, logits)


OPTIONS = [
    {"eps": 1e-5, "confidence_scale": 0.01, "trade_off": 0.3},
    {"confidence_scale": 4.0},
    {"confidence": True, "eps": 1e-5},
    {"marginal_weights": True, "confidence_scale": 0.1},
    {"confidence": True, "marginal_weights": True, "trade_off": -2.0},
]


HELD, TILED = (37, 130), (5, 8195)
OPTION_CASES = [
    (options, dtype, shape)
    for options in OPTIONS
    for dtype in DTYPES
    for shape in (HELD, TILED)
    # Held rows of every dtype are in test_ueo_loss.py too, there as one chunk.
    if DEVICE == "cuda"
    or dtype == torch.float32
    or (dtype == torch.float64 and shape == TILED and options is OPTIONS[-1])
]


@pytest.mark.parametrize(("options", "dtype", "shape"), OPTION_CASES, ids=str)
def test_options(options, dtype, shape, processors):
    processors(2)
    logits = make_logits(shape, dtype)
    options = {
        name: (torch.rand(shape[0]) + 0.05).to(DEVICE) if value is True else value
        for name, value in options.items()
    }
    loss, grad = loss_and_grad(logits, 0.7, **options)
    assert_exact(loss, grad, logits, 0.7, **options)


@pytest.mark.parametrize("given", ["confidence", "marginal_weights"])
def test_chunks_whose_weights_are_many_orders_apart(given, processors):
    processors(2)
    logits = make_logits((600, 300))
    weights = torch.logspace(-20, 20, 600, dtype=torch.float64).to(DEVICE)
    if given == "marginal_weights":
        weights[:64] = 0  # a chunk without any weight
    loss, grad = loss_and_grad(logits, **{given: weights})
    assert_exact(loss, grad, logits, **{given: weights})


@pytest.mark.parametrize("columns", [260, 8195], ids=["held", "tiled"])
def test_a_long_chunk_adds_up_like_a_short_one(columns, monkeypatch, processors):
    processors(1)
    rows = 1500 if columns == 260 else 60
    logits = make_logits((rows, columns), scale=0.1)
    loss, grad = loss_and_grad(logits)
    assert_exact(loss, grad, logits)
    limited = tuning.make_plan(10**6, columns, False, 1)
    assert limited.chunk_rows == tuning.TUNING.max_tiles_per_chunk * limited.block_rows
    assert limited.chunks * limited.chunk_rows >= 10**6


VIEWS = {
    "row slice": lambda z: z[::3],
    "column slice": lambda z: z[:, 5:71],
    "column step": lambda z: z[:, ::2],
    "transposed": lambda z: z.t(),
    "expanded row": lambda z: z[:1].expand(40, -1),
    "expanded both": lambda z: z[:1, :1].expand(9, 33),
    "overlapping rows": lambda z: z.flatten().as_strided((30, 50), (3, 1)),
    "one column of many": lambda z: z[:, 3:4],
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS.keys())
def test_strides(view):
    logits = view(make_logits((90, 83), torch.float64))
    loss, grad = loss_and_grad(logits)
    assert_exact(loss, grad, logits)
    assert grad.is_contiguous()


@pytest.mark.parametrize("columns", [8230, 8240], ids=["single columns", "vectors"])
def test_tiled_rows_with_a_stride_and_masked_tiles(columns):
    whole = make_logits((10, 8304))  # rows begin at 16 bytes if the view does
    logits = whole[::2, 48 : 48 + columns]
    logits[0, :5000] = -math.inf  # the first tiles of a row have no class at all
    logits[1, 4000:] = -math.inf
    logits[2, :] = -math.inf
    logits[2, -1] = 3.0  # one class, in the last column
    logits[3] = torch.finfo(torch.float32).min  # how others write a mask: uniform here
    loss, grad = loss_and_grad(logits)
    assert (grad[logits == -math.inf] == 0).all()
    assert_exact(loss, grad, logits)


@pytest.mark.parametrize(
    ("value", "column"),  # in the first tile, one in the middle, and the last, which is masked
    [(math.nan, 0), (math.inf, 5000), (math.nan, 8194)],
)
def test_tiled_nan_and_infinity_are_never_a_silent_number(value, column):
    logits = make_logits((3, 8195))
    logits[1, column] = value
    loss, stats = ueo_loss(logits, return_stats=True, backend="triton")
    assert loss.isnan()
    assert stats.marginal_entropy.isnan()
    assert ueo_loss(logits, torch.ones(3).to(DEVICE), backend="triton").isnan()
    assert torch.ops.ueo_fast_triton.max_softmax(logits, 1.0).isnan().tolist() == [0, 1, 0]


@pytest.mark.parametrize("columns", [37, 8195], ids=["held", "tiled"])
def test_a_row_without_any_class_gives_nan(columns):
    logits = make_logits((5, columns))
    logits[4] = -math.inf
    for confidence in (None, torch.ones(5).to(DEVICE)):
        loss, stats = ueo_loss(logits, confidence, return_stats=True, backend="triton")
        assert loss.isnan()
        assert stats.marginal_entropy.isnan()


@pytest.mark.parametrize("columns", [37, 8195], ids=["held", "tiled"])
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
def test_a_one_hot_batch_has_no_gradient(dtype, columns):
    logits = torch.zeros(6, columns, dtype=dtype, device=DEVICE)
    logits[torch.arange(6), torch.arange(6) * 6] = 2000.0
    _, grad = loss_and_grad(logits, 1e4)
    assert (grad == 0).all()


def test_the_same_input_gives_the_same_bits(processors):
    processors(3)
    for shape in ((150, 345), (9, 8195)):
        logits = make_logits(shape)
        first, second = loss_and_grad(logits), loss_and_grad(logits.clone())
        assert torch.equal(first[0], second[0])
        assert torch.equal(first[1], second[1])


def test_options_keep_float64s_digits():
    # Triton takes floats as float32; none of these numbers is one.
    logits = make_logits((40, 23), torch.float64)
    options = {"trade_off": 0.1, "confidence_scale": 0.3, "eps": 1e-3}
    loss, grad = loss_and_grad(logits, **options)
    assert_exact(loss, grad, logits, **options)


@pytest.mark.parametrize("columns", [1, 37, 1000, 8195])
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
def test_max_softmax(dtype, columns):
    logits = make_logits((19, columns), dtype)
    found = torch.ops.ueo_fast_triton.max_softmax(logits, 0.3)
    true = (0.3 * logits.double()).softmax(1).amax(1)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    tolerance = 1e-14 if dtype == torch.float64 else 1e-6
    torch.testing.assert_close(found.double(), true, rtol=tolerance, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
def test_opcheck(dtype):
    ops = torch.ops.ueo_fast_triton
    logits = make_logits((60, 37), dtype)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    weights = (torch.rand(60, dtype=compute) + 0.1).to(DEVICE)
    for forward in ((logits, None, None, 0.5, 0.1, 0.0), (logits, weights, weights, 0.5, 1.0, 0.1)):
        torch.library.opcheck(ops.ueo_loss_forward.default, forward)
        torch.library.opcheck(ops.ueo_loss_and_grad.default, forward)
        loss, *saved = ops.ueo_loss_forward(*forward)
        torch.library.opcheck(ops.ueo_loss_backward.default, (loss, logits, *saved, 0.5, 0.0))
    torch.library.opcheck(ops.max_softmax.default, (logits, 0.5))


def test_an_empty_batch_runs_no_kernel(monkeypatch):
    ops = torch.ops.ueo_fast_triton
    logits = make_logits((0, 7))
    loss, saved, grad = ops.ueo_loss_and_grad(logits, None, None, 1.0, 1.0, 0.0)
    assert (loss == 0).all()
    assert saved.tolist() == [0] * (7 + 5)  # the marginal and the summary
    assert grad.shape == (0, 7)
    assert ops.max_softmax(logits, 1.0).shape == (0,)


def test_compile_fullgraph_equals_eager():
    def step(logits, confidence):
        options = (None, 0.5, 1.0, 1e-5, True)
        loss, statistics = UEOLossFunction.apply("triton", 2 * logits, confidence, *options)
        return loss, statistics[37 + 1]  # the marginal's entropy, after the marginal

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for rows in (20, 33):
        logits = make_logits((rows, 37)).requires_grad_()
        eager = logits.detach().clone().requires_grad_()
        confidence = (torch.rand(rows) + 0.1).to(DEVICE)
        loss, entropy = compiled(logits, confidence)
        loss.backward()
        expected, expected_entropy = step(eager, confidence)
        expected.backward()
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(entropy, expected_entropy)
        torch.testing.assert_close(logits.grad, eager.grad)


def test_ops_refuse_what_would_read_foreign_memory():
    ops = torch.ops.ueo_fast_triton
    logits = make_logits((60, 37))
    ones = torch.ones(60, device=DEVICE)
    loss, saved = ops.ueo_loss_forward(logits, None, None, 1.0, 1.0, 0.0)
    with pytest.raises(RuntimeError, match=r"logits must have shape \(B, C\)"):
        ops.ueo_loss_forward(logits[0], None, None, 1.0, 1.0, 0.0)
    with pytest.raises(RuntimeError, match="logits must be float64, float32, float16 or bfloat16"):
        ops.ueo_loss_forward(logits.int(), None, None, 1.0, 1.0, 0.0)
    with pytest.raises(RuntimeError, match=r"confidence must have shape \(60,\)"):
        ops.ueo_loss_forward(logits, ones[1:], None, 1.0, 1.0, 0.0)
    with pytest.raises(RuntimeError, match="marginal_weights must have the compute dtype"):
        ops.ueo_loss_forward(logits, None, ones.double(), 1.0, 1.0, 0.0)
    other_type, scattered = saved.double(), saved.repeat_interleave(2)[::2]
    for other in (saved[1:], saved[None], other_type, scattered):
        with pytest.raises(RuntimeError, match=f"must be that of ueo_loss_forward: {60 * 5 + 42}"):
            ops.ueo_loss_backward(loss, logits, other, 1.0, 0.0)
    with pytest.raises(RuntimeError, match="grad_loss must be 0-d"):
        ops.ueo_loss_backward(loss[None], logits, saved, 1.0, 0.0)


@pytest.mark.parametrize("tile_scale", autotune.TILE_SCALES[1:])  # the first: all tests above
@pytest.mark.parametrize("shape", [(130, 345), (3, 4096), (5, 8195)], ids=str)
def test_the_plans_of_the_search_compute_the_same(shape, tile_scale, monkeypatch):
    monkeypatch.setattr(autotune, "TILE_SCALES", (tile_scale,))
    logits = make_logits(shape)
    loss, grad = loss_and_grad(logits)
    assert_exact(loss, grad, logits)
