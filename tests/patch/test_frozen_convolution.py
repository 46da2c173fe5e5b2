"""Convolutions with a frozen weight: eager's values, gradients and layouts, but no saved input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from loss_backends import shrink
from saved_activations import saved_bytes
from torch import Tensor, nn

from ueo_fast.ops.frozen_convolution import frozen_convolution

CONVOLUTIONS = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}

# name: (shape of x, shape of the weight, options)
CASES: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "1x1": ((2, 6, 7, 5), (4, 6, 1, 1), {}),
    "3x3": ((2, 6, 7, 5), (4, 6, 3, 3), {"padding": 1}),
    "strided": ((2, 6, 8, 9), (4, 6, 3, 3), {"stride": 2, "padding": 1}),
    "uneven": ((2, 6, 8, 9), (4, 6, 3, 2), {"stride": (2, 1), "padding": (0, 1)}),
    "rest": ((2, 3, 9, 9), (4, 3, 2, 2), {"stride": 2}),  # the last row and column are unread
    "dilated": ((2, 6, 9, 9), (4, 6, 3, 3), {"dilation": (2, 1), "padding": 2}),
    "grouped": ((2, 6, 7, 5), (4, 3, 3, 3), {"groups": 2}),
    "depthwise": ((2, 6, 7, 5), (6, 1, 3, 3), {"groups": 6, "padding": 1}),
    "same": ((2, 6, 7, 5), (4, 6, 3, 3), {"padding": "same"}),
    "same, uneven": ((2, 6, 7, 5), (4, 6, 4, 2), {"padding": "same", "dilation": (1, 3)}),
    "valid": ((2, 6, 7, 5), (4, 6, 3, 3), {"padding": "valid"}),
    "one image": ((6, 7, 5), (4, 6, 3, 3), {"padding": 1}),
    "empty": ((0, 6, 7, 5), (4, 6, 3, 3), {}),
    "1-d": ((2, 6, 9), (4, 6, 3), {"stride": 2, "padding": 1}),
    "1-d, same": ((2, 6, 9), (4, 6, 4), {"padding": "same"}),
    "3-d": ((2, 3, 5, 6, 4), (4, 3, 3, 3, 3), {"stride": (1, 2, 1), "padding": 1}),
}

Result = tuple[Tensor, Tensor, Tensor | None]


def run(convolve: Callable[..., Tensor], x: Tensor, *args: Any, **options: Any) -> Result:
    """Output, gradient of x, gradient of the bias."""
    x = x.detach().requires_grad_()
    bias = args[1]
    y = convolve(x, *args, **options)
    wanted = [x] if bias is None or not bias.requires_grad else [x, bias]
    generator = torch.Generator().manual_seed(5)
    upstream = torch.randn(y.shape, generator=generator).to(y.dtype)
    gradients = torch.autograd.grad(y, wanted, upstream)
    return y, gradients[0], gradients[1] if len(gradients) > 1 else None


def assert_same(ours: Result, theirs: Result) -> None:
    """Equal bits and layouts, because the same kernel runs."""
    for our, their in zip(ours, theirs, strict=True):
        if their is None or our is None:
            assert our is their
            continue
        assert our.dtype == their.dtype
        assert our.stride() == their.stride()
        assert torch.equal(our, their)


def tensors(name: str, dtype: torch.dtype, bias: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    shape, weight_shape, _ = CASES[name]
    torch.manual_seed(0)
    x, weight = torch.randn(shape, dtype=dtype), torch.randn(weight_shape, dtype=dtype)
    return x, weight, torch.randn(weight_shape[0], dtype=dtype) if bias else None


@pytest.mark.parametrize("bias", ["none", "frozen", "trained"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_values_gradients_and_layouts_are_eagers(name, dtype, bias):
    x, weight, b = tensors(name, dtype, bias != "none")
    if b is not None:
        b.requires_grad_(bias == "trained")
    options = CASES[name][2]
    theirs = run(CONVOLUTIONS[weight.dim()], x, weight, b, **options)
    assert_same(run(frozen_convolution, x, weight, b, **options), theirs)


@pytest.mark.parametrize("weight_last", [False, True])
@pytest.mark.parametrize("x_last", ["last", "contiguous", "sliced", "transposed", "expanded"])
@pytest.mark.parametrize("name", ["1x1", "3x3", "strided", "grouped", "depthwise", "same, uneven"])
def test_layouts(name, x_last, weight_last):
    x, weight, _ = tensors(name, torch.float32, False)
    if weight_last:
        weight = weight.to(memory_format=torch.channels_last)
    x = {
        "last": lambda: x.to(memory_format=torch.channels_last),
        "contiguous": lambda: x,
        "sliced": lambda: torch.cat([x, x], 1).to(memory_format=torch.channels_last)[:, ::2],
        "transposed": lambda: x.transpose(2, 3).contiguous().transpose(2, 3),
        "expanded": lambda: x[:1].expand(3, -1, -1, -1),
    }[x_last]()
    options = CASES[name][2]
    theirs = run(F.conv2d, x, weight, None, **options)
    ours = run(frozen_convolution, x, weight, None, **options)
    torch.testing.assert_close(ours[:2], theirs[:2], rtol=1e-5, atol=1e-5)
    if x_last in ("last", "contiguous"):
        assert_same(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bias", [False, True])
def test_autocast(dtype, bias):
    x, weight, b = tensors("3x3", dtype, bias)
    if b is not None:
        b.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        theirs = run(F.conv2d, x, weight, b, padding=1)
        ours = run(frozen_convolution, x, weight, b, padding=1)
    assert ours[0].dtype == (torch.bfloat16 if dtype == torch.float32 else torch.float64)
    assert_same(ours, theirs)


def holds(conv: nn.Module, convolve: Callable[[Tensor], Tensor], x: Tensor) -> int:
    return saved_bytes(conv, lambda: convolve(x))


@pytest.mark.parametrize("context", ["float32", "autocast"])
def test_only_the_weight_is_held(context):
    conv = nn.Conv2d(6, 4, 3, padding=1).requires_grad_(False)
    x = torch.randn(2, 6, 8, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=context == "autocast"):
        assert holds(conv, conv, x) > 0
        assert holds(conv, lambda x: frozen_convolution(x, conv.weight, conv.bias), x) == 0


def test_falls_back_where_the_weight_is_trained():
    x, weight, bias = tensors("3x3", torch.float32, True)
    weight.requires_grad_()
    y = frozen_convolution(x, weight, bias)
    assert y.grad_fn.name() == "ConvolutionBackward0"
    (gradient,) = torch.autograd.grad(y.sum(), weight)
    assert gradient.shape == weight.shape


def test_nothing_is_recorded_without_a_gradient():
    x, weight, _ = tensors("3x3", torch.float32, False)
    assert frozen_convolution(x, weight).grad_fn is None
    with torch.no_grad():
        assert frozen_convolution(x.requires_grad_(), weight).grad_fn is None
    with torch.inference_mode():
        frozen_convolution(x, weight)


@pytest.mark.parametrize("name", ["strided", "grouped", "1-d", "3-d"])
def test_second_derivatives(name):
    x, weight, bias = tensors(name, torch.float64, True)

    def second(convolve):
        leaf = x.clone().requires_grad_()
        y = convolve(leaf, weight, bias, **CASES[name][2])
        (first,) = torch.autograd.grad(y.pow(3).sum(), leaf, create_graph=True)
        return torch.autograd.grad(first.square().sum(), leaf)[0]

    torch.testing.assert_close(second(frozen_convolution), second(CONVOLUTIONS[weight.dim()]))


def test_functional_transforms_and_forward_mode():
    x, weight, _ = tensors("3x3", torch.float64, False)
    expected = torch.autograd.functional.jvp(lambda x: F.conv2d(x, weight), x, x)[1]
    primal, tangent = torch.func.jvp(lambda x: frozen_convolution(x, weight), (x,), (x,))
    torch.testing.assert_close(tangent, expected)
    assert primal.shape == tangent.shape
    gradient = torch.func.grad(lambda x: frozen_convolution(x, weight).sin().sum())(x)
    of_weight = torch.func.grad(lambda w: frozen_convolution(x, w).sin().sum())(weight)
    assert gradient.shape == x.shape
    assert of_weight.abs().sum() > 0
    rows = torch.func.vmap(lambda x: frozen_convolution(x, weight))(x)
    torch.testing.assert_close(rows, F.conv2d(x, weight))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_compiled_as_one_graph(memory_format):
    x, weight, bias = tensors("strided", torch.float32, True)
    x = x.to(memory_format=memory_format)
    options = CASES["strided"][2]
    torch.compiler.reset()
    compiled = torch.compile(frozen_convolution, fullgraph=True, backend="aot_eager")
    ours = run(compiled, x, weight, bias, **options)
    theirs = run(F.conv2d, x, weight, bias, **options)
    torch.testing.assert_close(ours[:2], theirs[:2])


def test_a_changed_weight_is_refused_in_backward():
    x, weight, _ = tensors("3x3", torch.float32, False)
    y = frozen_convolution(x.requires_grad_(), weight)
    weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"padding": "same", "stride": 2}, "padding='same' is not supported for strided"),
        ({"padding": "full"}, "Invalid padding string: 'full'"),
    ],
)
def test_unusable_padding_is_refused(options, message):
    x, weight, _ = tensors("3x3", torch.float32, False)
    with pytest.raises((RuntimeError, ValueError), match=message):
        frozen_convolution(x.requires_grad_(), weight, **options)


@pytest.mark.parametrize("name", ["input", "weight"])
@pytest.mark.parametrize("autocast", [False, True])
def test_memory_that_was_freed(autocast, name):
    given = {"input": torch.randn(1, 3, 8, 8), "weight": torch.randn(4, 3, 3, 3)}
    given[name] = shrink(given[name])
    x = given["input"].requires_grad_()
    message = rf"{name} needs \d+ bytes of memory, but its storage holds 0"
    autocasts = torch.autocast("cpu", torch.bfloat16, enabled=autocast)
    with autocasts, pytest.raises(RuntimeError, match=message):
        frozen_convolution(x, given["weight"])
