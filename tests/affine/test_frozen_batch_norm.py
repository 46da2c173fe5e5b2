"""frozen_batch_norm against PyTorch's batch_norm in evaluation mode, and its own promises."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from affine_backends import BACKENDS, COMPILED
from affine_truth import assert_exact, differentiate
from torch.utils._python_dispatch import TorchDispatchMode

from ueo_fast import frozen_batch_norm

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
SHAPES = [(6, 5), (3, 5, 7), (2, 5, 9, 8), (2, 5, 3, 4, 5)]
EPS = 1e-3


def eager(activation="none"):
    """What the function replaces, in PyTorch's own terms."""

    def call(x, weight, bias, running_mean, running_var, residual=None):
        if weight is None and bias is not None:  # on a GPU, PyTorch's own backward fails then
            weight = torch.ones_like(bias)
        out = F.batch_norm(x, running_mean, running_var, weight, bias, training=False, eps=EPS)
        out = out if residual is None else out + residual
        return F.relu(out) if activation == "relu" else out

    return call


def ours(backend, activation="none"):
    def call(**arguments):
        return frozen_batch_norm(**arguments, eps=EPS, activation=activation, backend=backend)

    return call


def make(backend, shape=(2, 5, 9, 8), dtype=torch.float32, residual=True, mean=1.0):
    generator = torch.Generator().manual_seed(0)
    channels = torch.float64 if dtype == torch.float64 else torch.float32

    def random(size, dtype):
        value = torch.randn(size, generator=generator, dtype=torch.float64)
        return value.to(dtype).to(backend.device)

    arguments = {
        "x": (random(shape, dtype) + mean).requires_grad_(),
        "weight": random(shape[1], channels).requires_grad_(),
        "bias": random(shape[1], channels).requires_grad_(),
        "running_mean": random(shape[1], channels) + mean,
        "running_var": random(shape[1], channels).square() + 0.1,
    }
    if residual:
        arguments["residual"] = random(shape, dtype).requires_grad_()
    return arguments, random(shape, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("activation", ["none", "relu"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_batch_norm_in_evaluation_mode(shape, dtype, activation, residual, backend):
    arguments, grad_out = make(backend, shape, dtype, residual)
    got = differentiate(ours(backend, activation), arguments, grad_out)
    assert_exact(got, eager(activation), arguments, grad_out)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("missing", [("weight",), ("bias",), ("weight", "bias")])
def test_without_weight_or_bias(missing, backend):
    arguments, grad_out = make(backend)
    arguments |= dict.fromkeys(missing)
    got = differentiate(ours(backend, "relu"), arguments, grad_out)
    assert_exact(got, eager("relu"), arguments, grad_out)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_weight_of_zero_still_learns(backend):
    # Recovering x from the output would divide by it.
    arguments, grad_out = make(backend, residual=False)
    with torch.no_grad():
        arguments["weight"][:2] = 0
    got = differentiate(ours(backend), arguments, grad_out)
    assert got["weight"].abs().min() > 0
    assert_exact(got, eager(), arguments, grad_out)


@pytest.mark.parametrize("backend", COMPILED)
def test_the_gradient_by_weight_does_not_cancel(backend):
    # sum g x - mean sum g would leave two of seven digits.
    arguments, grad_out = make(backend, (64, 5, 9, 8), mean=1e5, residual=False)
    got = differentiate(ours(backend), arguments, grad_out)["weight"].double()
    x, mean, var = (
        arguments[name].detach().double() for name in ("x", "running_mean", "running_var")
    )
    centred = (x - mean[:, None, None]) / (var[:, None, None] + EPS).sqrt()
    true = (grad_out.double() * centred).sum((0, 2, 3))
    assert (got - true).norm() < 1e-5 * true.norm()


@pytest.mark.parametrize("backend", BACKENDS)
def test_half_statistics_and_parameters(backend):
    arguments, grad_out = make(backend, dtype=torch.float16)
    for name, value in arguments.items():
        arguments[name] = value.detach().half().requires_grad_(value.requires_grad)
    got = differentiate(ours(backend, "relu"), arguments, grad_out)
    assert_exact(got, eager("relu"), arguments, grad_out)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_first_layer_needs_no_gradient_by_x(backend):
    arguments, grad_out = make(backend, residual=False)
    arguments["x"].requires_grad_(False)
    got = differentiate(ours(backend, "relu"), arguments, grad_out)
    assert got.keys() == {"out", "weight", "bias"}
    assert_exact(got, eager("relu"), arguments, grad_out)


class SeenOps(TorchDispatchMode):
    """Operations that launch something on a GPU, or may: all but views and allocations."""

    QUIET = ("detach", "empty", "empty_like", "empty_strided", "new_empty", "view")

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.__name__.split(".")[0]
        if name not in self.QUIET:
            self.names.append(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("half_parameters", [False, True])
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("residual", [False, True])
def test_nothing_but_the_op_runs(residual, trained, half_parameters, backend):
    # How many kernels the op itself launches: test_launches, in the files of the kernels.
    arguments, grad_out = make(backend, dtype=torch.float16, residual=residual)
    for name in ("weight", "bias", "running_mean", "running_var"):
        value = arguments[name].detach()
        arguments[name] = value.half() if half_parameters else value
    for name in ("weight", "bias"):
        arguments[name].requires_grad_(trained)
    with SeenOps() as forward:
        out = ours(backend, "relu")(**arguments)
    with SeenOps() as backward:
        out.backward(grad_out)
    assert forward.names == ["channel_affine_forward"]
    assert backward.names == ["channel_affine_backward"]
    assert (arguments["weight"].grad is not None) == trained


def test_auto_takes_the_compiled_kernels():
    arguments, _ = make(BACKENDS[-1].values[0])
    assert type(ours("auto")(**arguments).grad_fn).__name__ == "ChannelAffineFunctionBackward"


X, FIVE = torch.zeros(2, 5, 3, 3), torch.ones(5)
MISTAKES = [
    # changed arguments, error, the beginning of its message
    ({"x": [1.0]}, TypeError, "x must be a torch.Tensor, got list"),
    ({"x": X.int()}, TypeError, "x must be float64, float32, float16 or bfloat16, got torch.int32"),
    ({"x": X.to_sparse()}, TypeError, "x must be a dense tensor, got torch.sparse_coo"),
    ({"x": FIVE}, ValueError, r"x must have shape (N, C) or (N, C, ...), got (5,): add the batch"),
    ({"weight": torch.ones(4)}, ValueError, "weight must have shape (5,), one value per channel"),
    ({"bias": FIVE.long()}, TypeError, "bias must be float64, float32, float16 or bfloat16"),
    ({"running_mean": FIVE.to("meta")}, ValueError, "running_mean is on meta but x is on cpu"),
    (
        {"running_var": FIVE.clone().requires_grad_()},
        ValueError,
        "running_var requires grad, but the statistics are frozen: pass running_var.detach()",
    ),
    ({"eps": -1.0}, ValueError, "eps must be 0 or from 1e-30 to 1e+30, got -1.0"),
    ({"activation": "gelu"}, ValueError, "activation='gelu' is unknown: choose one of none, relu"),
    ({"residual": X[:1]}, ValueError, "residual must have the shape of x, (2, 5, 3, 3), got (1,"),
    ({"residual": X.half()}, TypeError, "residual must have the dtype of x, torch.float32, got"),
    ({"residual": X.to("meta")}, ValueError, "residual is on meta but x is on cpu: move it"),
    ({"backend": "tpu"}, ValueError, "backend='tpu' is unknown: choose one of auto, cpp"),
    ({"x": X.to("meta")}, ValueError, "running_mean is on cpu but x is on meta: move it with"),
]


@pytest.mark.parametrize(
    ("changes", "error", "message"), MISTAKES, ids=[message[:40] for *_, message in MISTAKES]
)
def test_mistakes_are_named(changes, error, message):
    arguments = {"x": X, "weight": FIVE, "bias": FIVE, "running_mean": FIVE, "running_var": FIVE}
    with pytest.raises(error) as caught:
        frozen_batch_norm(**arguments | changes)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", ["none", "relu"])
def test_a_bias_that_backward_does_not_read_may_change_before_it(backend, activation):
    x, weight, bias = (torch.randn(5, device=backend.device) for _ in range(3))
    mean, var = torch.zeros_like(weight), torch.ones_like(weight)
    bias.requires_grad_()
    residual = x.expand(3, 5) if activation == "relu" else None  # the mask is in bits then
    out = frozen_batch_norm(
        x.expand(3, 5), weight, bias, mean, var, residual=residual, activation=activation,
        backend=backend,
    )  # fmt: skip
    out.sum().backward(retain_graph=True)
    expected, bias.grad = bias.grad, None
    with torch.no_grad():
        bias.add_(1)
    out.sum().backward()
    torch.testing.assert_close(bias.grad, expected)
