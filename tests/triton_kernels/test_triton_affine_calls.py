"""The affine Triton ops at the edge of their contract: nothing to do, too much, or wrong."""

from __future__ import annotations

import itertools

import pytest
import torch
from test_triton_affine import ALL, DEVICE, OPS, channel_affine, problem

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
affine_tuning = pytest.importorskip("ueo_fast.triton.affine_tuning")
tuning = pytest.importorskip("ueo_fast.triton.tuning")
kernels = pytest.importorskip("ueo_fast.triton.channel_affine_kernels")
op = pytest.importorskip("ueo_fast.ops.channel_affine")


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0)], ids=str)
def test_empty_tensors_launch_nothing(shape, monkeypatch):
    monkeypatch.setattr(channel_affine, "kernels", None)
    x, parameters, residual, grad_out = problem(shape, 1, torch.float16)
    out, bits = OPS.channel_affine_forward(x, *parameters, residual, 1, True)
    assert out.shape == x.shape
    assert bits.shape == (0,)
    grad_x, grad_weight, grad_bias, grad_residual = OPS.channel_affine_backward(
        grad_out, x, *parameters, bits, 1, True, *ALL
    )
    assert grad_x.shape == grad_residual.shape == x.shape
    assert torch.equal(grad_weight, torch.zeros(shape[1], device=DEVICE))
    assert torch.equal(grad_bias, torch.zeros(shape[1], device=DEVICE))


class Counted:
    """A kernel whose launches are noted."""

    def __init__(self, kernel, launches):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        self.launches.append(self.kernel)
        return self.kernel[grid]


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=4)), ids=str)
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("shape", [(2, 3, 4), (3000, 3)], ids=str)
def test_launches(shape, relu, needs, monkeypatch):
    x, parameters, residual, grad_out = problem(shape, 1, torch.float16)
    launches = []
    for name in ("forward_kernel", "backward_kernel", "finish_sums_kernel"):
        monkeypatch.setattr(kernels, name, Counted(getattr(kernels, name), launches))
    _, bits = OPS.channel_affine_forward(x, *parameters, residual, 1, relu)
    assert len(launches) == 1
    launches.clear()
    OPS.channel_affine_backward(grad_out, x, *parameters, bits, 1, relu, *needs)
    assert len(launches) == (2 if needs[1] or needs[2] else any(needs))


CHECKED = [(torch.contiguous_format, torch.float16), (torch.channels_last, torch.float64)]


@pytest.mark.parametrize(("layout", "dtype"), CHECKED, ids=["contiguous", "last"])
def test_opcheck(layout, dtype):
    x, parameters, residual, grad_out = problem((2, 3, 5, 5), 1, dtype, layout)
    for added, relu in itertools.product((None, residual), (False, True)):
        forward = x, *parameters, added, 1, relu
        torch.library.opcheck(OPS.channel_affine_forward.default, forward)
        _, bits = OPS.channel_affine_forward(*forward)
        rest = *parameters, bits, 1, relu
        for needs in (ALL, (False, True, False, False)):
            arguments = grad_out, x, *rest, *needs
            torch.library.opcheck(OPS.channel_affine_backward.default, arguments)


@triton.jit
def channels_from(base, out, channels, inner, BLOCK: tl.constexpr):  # noqa: N803
    """channel_of at an offset that no tensor here reaches."""
    offset = tl.arange(0, BLOCK)
    start = tl.load(base)
    # The launcher's options, had it such a tensor.
    channel = kernels.channel_of(
        start, offset, channels, inner, BLOCK, inner < BLOCK, channels < BLOCK
    )
    tl.store(out + offset, channel)


@pytest.mark.parametrize("channels", [3, 2048, 2**31 - 1])
@pytest.mark.parametrize("inner", [1, 49, 2**20, 2**31 - 5, 2**33 + 1])
def test_channels_of_elements_beyond_32_bits(inner, channels):
    for start in (0, 2**31 - 8, 2**33 - 56, min(inner * channels * 3, 2**62) - 8):
        base = torch.tensor([start], device=DEVICE)
        out = torch.empty(256, dtype=torch.int64, device=DEVICE)
        channels_from[(1,)](base, out, channels, inner, BLOCK=256)
        expected = [(start + i) // inner % channels for i in range(256)]
        assert out.tolist() == expected


def test_ops_refuse_what_would_read_foreign_memory():
    x, parameters, residual, grad_out = problem((2, 8, 5), 1, torch.float16)
    weight, bias, *rest = parameters
    with pytest.raises(RuntimeError, match="x must be float64, float32, float16 or bfloat16"):
        OPS.channel_affine_forward(x.int(), *parameters, None, 1, False)
    with pytest.raises(RuntimeError, match=r"weight must have shape \(8,\), x's device"):
        OPS.channel_affine_forward(x, weight[1:], bias, *rest, None, 1, False)
    with pytest.raises(RuntimeError, match="bias must have shape"):
        OPS.channel_affine_forward(x, weight, bias.double(), *rest, None, 1, False)
    with pytest.raises(RuntimeError, match="without gaps"):
        OPS.channel_affine_forward(x[:, :, ::2], *parameters, None, 1, False)
    with pytest.raises(RuntimeError, match="dim=3 is not a dimension"):
        OPS.channel_affine_forward(x, *parameters, None, 3, False)
    other = residual.transpose(1, 2).contiguous().transpose(1, 2)
    with pytest.raises(RuntimeError, match="residual must have the shape, strides and dtype of x"):
        OPS.channel_affine_forward(x, *parameters, other, 1, False)
    rest = parameters
    nothing = x.new_empty(0, dtype=torch.uint8)
    needs = ALL
    with pytest.raises(RuntimeError, match="x must have the shape, strides and dtype"):
        OPS.channel_affine_backward(grad_out, x[1:], *rest, nothing, 1, True, *needs)
    with pytest.raises(RuntimeError, match="x is needed for sums"):
        OPS.channel_affine_backward(grad_out, None, *rest, nothing, 1, False, *needs)
    with pytest.raises(RuntimeError, match="bits must be those of channel_affine_forward"):
        OPS.channel_affine_backward(grad_out, x, *rest, nothing.new_empty(3), 1, True, *needs)


@pytest.mark.parametrize("double", [False, True])
def test_every_plan_covers_the_tensor(double):
    sizes = (1, 2, 3, 49, 64, 100, 784, 2048, 50176, 10**6)
    for outer, channels, inner in itertools.product(sizes, repeat=3):
        plan = affine_tuning.make_affine_plan(outer, channels, inner, double, 132)
        tiles = -(-outer // plan.outer) * -(-inner // plan.inner)
        assert (plan.chunks - 1) * plan.chunk_tiles < tiles <= plan.chunks * plan.chunk_tiles
        assert (plan.channel_tiles - 1) * plan.channels < channels
        assert channels <= plan.channel_tiles * plan.channels
        assert plan.outer * plan.channels * plan.inner <= affine_tuning.AFFINE.tile_elements
        assert inner % plan.unit == 0


@pytest.mark.parametrize("columns", [64, 10**5])
def test_every_plan_of_layer_norms_backward_covers_the_rows(columns):
    for rows, processors in itertools.product((1, 2, 7, 4096, 10**6), (1, 132)):
        loss_plan = tuning.make_plan(rows, columns, False, processors)
        plan = affine_tuning.layer_norm_backward_plan(loss_plan, rows)
        assert plan.chunk_rows % plan.block_rows == 0
        assert (plan.chunks - 1) * plan.chunk_rows < rows <= plan.chunks * plan.chunk_rows


def test_the_op_is_registered_with_the_kernels():
    assert set(op.OPS.fakes) == set(channel_affine.KERNELS)
