"""layer_norm: PyTorch's own on the CPU, fused kernels on a GPU, the same promises on all."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from affine_backends import LAYER_NORM, REFERENCE
from affine_truth import assert_exact, differentiate

from ueo_fast import layer_norm, reference

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
BACKENDS = [*LAYER_NORM, REFERENCE]
EPS = 1e-5


def make(backend, shape=(3, 7, 40), dtype=torch.float32, parameters=None):
    generator = torch.Generator().manual_seed(0)

    def random(size, dtype):
        value = torch.randn(size, generator=generator, dtype=torch.float64)
        return value.to(dtype).to(backend.device)

    parameters = reference.compute_dtype(dtype) if parameters is None else parameters
    arguments = {
        "x": (2 * random(shape, dtype) + 1).requires_grad_(),
        "weight": random(shape[-1], parameters).requires_grad_(),
        "bias": random(shape[-1], parameters).requires_grad_(),
    }
    return arguments, random(shape, dtype)


def ours(backend):
    return functools.partial(layer_norm, eps=EPS, backend=str(backend))


def true(x, weight=None, bias=None):
    return F.layer_norm(x, x.shape[-1:], weight, bias, EPS)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(40,), (5, 6), (3, 7, 40), (2, 3, 4, 17), (0, 8)], ids=str)
def test_result_and_gradients(shape, dtype, backend):
    arguments, grad_out = make(backend, shape, dtype)
    assert_exact(differentiate(ours(backend), arguments, grad_out), true, arguments, grad_out)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_column_is_its_own_mean(backend):
    arguments, grad_out = make(backend, (5, 1))
    got = differentiate(ours(backend), arguments, grad_out)
    assert torch.equal(got["out"], arguments["bias"].detach().expand(5, 1))
    zeros = torch.zeros_like(grad_out)
    torch.testing.assert_close(got["x"], zeros, rtol=0, atol=1e-4)  # of terms up to 1 / sqrt(eps)
    torch.testing.assert_close(got["bias"], grad_out.sum(0))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("missing", [("weight",), ("bias",), ("weight", "bias")])
def test_without_weight_or_bias(missing, backend):
    arguments, grad_out = make(backend)
    arguments |= dict.fromkeys(missing)
    assert_exact(differentiate(ours(backend), arguments, grad_out), true, arguments, grad_out)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("needed", ["x", "weight", "bias"])
def test_one_gradient_alone(needed, backend):
    arguments, grad_out = make(backend)
    arguments = {k: v.detach().requires_grad_(k == needed) for k, v in arguments.items()}
    assert_exact(differentiate(ours(backend), arguments, grad_out), true, arguments, grad_out)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("dtype", "parameters"),
    [
        (torch.float16, torch.float16),
        (torch.float32, torch.float16),
        (torch.float64, torch.float32),
    ],
)
def test_parameters_of_any_dtype(dtype, parameters, backend):
    arguments, grad_out = make(backend, dtype=dtype, parameters=parameters)
    assert_exact(differentiate(ours(backend), arguments, grad_out), true, arguments, grad_out)


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_strides(backend):
    arguments, grad_out = make(backend, (6, 5, 20))
    for change in (lambda t: t.transpose(0, 1), lambda t: t[:, 1:], lambda t: t[..., ::2]):
        x = change(arguments["x"]).detach().requires_grad_()
        size = x.shape[-1]
        given = {"x": x} | {
            name: arguments[name].detach()[:size].requires_grad_() for name in ("weight", "bias")
        }
        upstream = change(grad_out)
        assert_exact(differentiate(ours(backend), given, upstream), true, given, upstream)


@pytest.mark.parametrize("backend", ["auto", "cpp"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("missing", [(), ("bias",), ("weight", "bias")])
def test_the_cpu_runs_pytorchs_own(missing, dtype, backend):
    arguments, grad_out = make(REFERENCE.values[0], dtype=dtype)
    arguments |= dict.fromkeys(missing)
    expected = differentiate(true, arguments, grad_out)
    for name, value in differentiate(ours(backend), arguments, grad_out).items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("parameters", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_cpu_takes_parameters_of_any_dtype(dtype, parameters):
    arguments, grad_out = make(REFERENCE.values[0], dtype=dtype, parameters=parameters)
    got = differentiate(ours("auto"), arguments, grad_out)
    expected = differentiate(reference.layer_norm, arguments, grad_out)
    for name, value in expected.items():
        # PyTorch's gradient by weight rounds within its sums where x is bfloat16.
        torch.testing.assert_close(got[name], value, rtol=2e-2, atol=0.1)


def test_the_cpu_without_weight_beside_a_half_x():
    # PyTorch's own fails in backward: "expected scalar type Half but found Float".
    arguments, grad_out = make(REFERENCE.values[0], dtype=torch.float16)
    arguments["weight"] = None
    assert_exact(differentiate(ours("auto"), arguments, grad_out), true, arguments, grad_out)


def test_func_transforms():
    arguments, _ = make(REFERENCE.values[0], dtype=torch.float64)
    x, weight, bias = (value.detach() for value in arguments.values())
    grad = torch.func.grad(lambda w: layer_norm(x, w, bias).square().sum())(weight)
    expected = torch.func.grad(lambda w: reference.layer_norm(x, w, bias).square().sum())(weight)
    torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compile_fullgraph_equals_eager(compiler, backend):
    torch._dynamo.reset()
    compiled = torch.compile(ours(backend), fullgraph=True, backend=compiler)
    arguments, grad_out = make(backend)
    got = differentiate(compiled, arguments, grad_out)
    for name, value in differentiate(ours(backend), arguments, grad_out).items():
        torch.testing.assert_close(got[name], value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", LAYER_NORM)
def test_double_backward_is_a_clear_error(backend):
    arguments, _ = make(backend)
    out = ours(backend)(**arguments)
    (grad,) = torch.autograd.grad(out.square().sum(), arguments["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once: use backend='reference'"):
        grad.square().sum().backward()


@pytest.mark.parametrize("backend", LAYER_NORM)
def test_opcheck(backend):
    arguments, grad_out = make(backend, (7, 40))
    x, weight, bias = (value.detach() for value in arguments.values())
    torch.library.opcheck(backend.ops.layer_norm_forward.default, (x, weight, bias, EPS))
    _, mean, rstd = backend.ops.layer_norm_forward(x, weight, bias, EPS)
    for needs in ((True, True), (True, False), (False, True)):
        backward = (grad_out, x, mean, rstd, weight, *needs)
        torch.library.opcheck(backend.ops.layer_norm_backward.default, backward)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": torch.tensor(1.0)}, ValueError, r"x must have shape \(\.\.\., C\) with C > 0"),
        ({"x": torch.ones(3, 0)}, ValueError, r"x must have shape \(\.\.\., C\) with C > 0"),
        ({"weight": torch.ones(3)}, ValueError, r"weight must have shape \(4,\)"),
        ({"bias": torch.ones(4).int()}, TypeError, "bias must be float64, float32"),
        ({"eps": float("nan")}, ValueError, "eps must be 0 or from"),
    ],
)
def test_mistakes_are_named(changes, error, message):
    with pytest.raises(error, match=message):
        layer_norm(**{"x": torch.ones(2, 4)} | changes)
