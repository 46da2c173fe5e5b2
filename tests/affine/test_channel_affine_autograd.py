"""channel_affine inside PyTorch: graphs, contexts, compilation, and what the ops refuse."""

from __future__ import annotations

import pytest
import torch
from affine_backends import BACKENDS, COMPILED
from affine_truth import assert_exact, differentiate
from loss_backends import shrink

from ueo_fast import channel_affine, frozen_batch_norm, reference

NAMES = ("x", "scale", "shift", "residual")


def make(backend=None, dtype=torch.float32, shape=(2, 3, 8, 10)):
    generator = torch.Generator().manual_seed(0)
    device = "cpu" if backend is None else backend.device
    compute = reference.compute_dtype(dtype)

    def leaf(size, dtype):
        value = torch.randn(size, generator=generator, dtype=torch.float64)
        return value.to(dtype).to(device).requires_grad_()

    return {
        "x": leaf(shape, dtype),
        "scale": leaf(shape[1], compute),
        "shift": leaf(shape[1], compute),
        "residual": leaf(shape, dtype),
    }


def relu_of(backend):
    name = str(backend)  # the Dynamo of torch 2.11 knows no str() of a subclass of str

    def call(x, scale, shift, residual=None):
        return channel_affine(x, scale, shift, activation="relu", residual=residual, backend=name)

    return call


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("activation", ["none", "relu"])
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
def test_gradcheck(activation, residual, backend):
    interpreted = backend == "triton" and backend.device == "cpu"  # 20 ms a call
    leaves = make(backend, torch.float64, (2, 3, 2, 3) if interpreted else (2, 3, 4, 5))
    names = NAMES if residual else NAMES[:3]

    def call(*values):
        given = dict(zip(names, values, strict=True))
        return channel_affine(**given, activation=activation, backend=backend)

    assert torch.autograd.gradcheck(call, tuple(leaves[name] for name in names))


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_backward_calls_with_retain_graph(backend):
    leaves = make(backend)
    out = relu_of(backend)(**leaves)
    inputs = list(leaves.values())
    first = torch.autograd.grad(out.sum(), inputs, retain_graph=True)
    snapshot = [grad.clone() for grad in first]
    for grad in first:
        grad.mul_(7)  # somebody else holds and changes what the first call returned
    second = torch.autograd.grad(-2 * out.sum(), inputs)
    for grad, before in zip(second, snapshot, strict=True):
        torch.testing.assert_close(grad, -2 * before)


@pytest.mark.parametrize("backend", COMPILED)
def test_the_upstream_gradient_is_not_written(backend):
    leaves = make(backend)
    for activation in ("none", "relu"):
        out = channel_affine(**leaves, activation=activation, backend=backend)
        upstream = torch.ones_like(out)
        torch.autograd.grad(out, list(leaves.values()), upstream)
        assert torch.equal(upstream, torch.ones_like(out))


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_is_tracked_without_grad(backend):
    leaves = make(backend)
    call = relu_of(backend)
    expected = call(**leaves).detach()
    with torch.no_grad():
        out = call(**leaves)
        assert torch.equal(out, expected)
        assert not out.requires_grad
    with torch.inference_mode():
        out = call(**leaves)
        assert out.is_inference()
    assert torch.equal(out, expected)
    assert not call(**{name: value.detach() for name, value in leaves.items()}).requires_grad


@pytest.mark.parametrize("backend", COMPILED)
def test_changing_x_before_backward_is_an_error(backend):
    leaves = make(backend)
    x = leaves["x"] * 1
    out = relu_of(backend)(**leaves | {"x": x})
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("with_residual", [False, True])
def test_a_hook_that_keeps_x_in_another_layout(with_residual, backend):
    leaves = make(backend)
    if not with_residual:
        del leaves["residual"]
    x = leaves["x"].detach().to(memory_format=torch.channels_last)
    inputs = list((leaves | {"x": x.requires_grad_()}).values())
    expected = torch.autograd.grad(relu_of(backend)(*inputs).square().sum(), inputs)

    def keep(tensor):  # as torch.autograd.graph.save_on_cpu(pin_memory=True)
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device).copy_(tensor)

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda kept: kept):
        out = relu_of(backend)(*inputs)
    found = torch.autograd.grad(out.square().sum(), inputs)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("name", NAMES)
def test_double_backward_is_a_clear_error_and_the_reference_has_it(name, backend):
    leaves = make(backend, torch.float64)
    call = relu_of(backend)
    (grad,) = torch.autograd.grad((call(**leaves) ** 2).sum(), leaves[name], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once: use backend='reference'"):
        (grad**2).sum().backward()
    # The upstream gradient is a constant here; a gradient penalty must not be one in silence.
    (grad,) = torch.autograd.grad(call(**leaves).sum(), leaves["scale"], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once: use backend='reference'"):
        (grad**2).sum().backward()
    out = relu_of("reference")(**leaves)
    (grad,) = torch.autograd.grad((out**2).sum(), leaves[name], create_graph=True)
    (second,) = torch.autograd.grad((grad**2).sum(), leaves["scale"])
    assert second.abs().max() > 0


def test_func_transforms_and_forward_mode_take_the_reference():
    leaves = {name: value.detach() for name, value in make(dtype=torch.float64).items()}
    parameters = {name: leaves.pop(name) for name in ("scale", "shift")}

    def loss(parameters):  # x is an ordinary tensor: only the parameters are followed
        return channel_affine(**leaves, **parameters, activation="relu").square().sum()

    given = {name: value.clone().requires_grad_() for name, value in parameters.items()}
    true = torch.autograd.grad(loss(given), list(given.values()))
    grads = torch.func.grad(loss)(parameters)
    for grad, expected in zip(grads.values(), true, strict=True):
        torch.testing.assert_close(grad, expected)
    tangents = {name: torch.randn_like(value) for name, value in parameters.items()}
    _, derivative = torch.func.jvp(loss, (parameters,), (tangents,))
    expected = sum((grads[name] * tangents[name]).sum() for name in grads)
    torch.testing.assert_close(derivative, expected)


@pytest.mark.parametrize("backend", COMPILED)
def test_func_transforms_are_refused_by_name(backend):
    leaves = {name: value.detach() for name, value in make(backend).items()}
    scale = leaves.pop("scale")
    with pytest.raises(RuntimeError, match=r"no rules for torch\.func transforms"):
        torch.func.grad(lambda s: relu_of(backend)(scale=s, **leaves).sum())(scale)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_of_what_comes_before(dtype, backend):
    model = torch.nn.Conv2d(3, 4, 3).to(backend.device)
    scale, shift = (torch.randn(4, device=backend.device, requires_grad=True) for _ in "ab")
    with torch.autocast(backend.device, dtype=dtype):
        x = model(torch.randn(2, 3, 9, 9, device=backend.device))
        out = channel_affine(x, scale, shift, activation="relu", backend=backend)
    assert x.dtype == dtype
    assert out.dtype == dtype
    out.sum().backward()
    assert scale.grad.dtype == torch.float32
    assert model.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize(
    ("layout", "compiler"),
    [
        (torch.contiguous_format, "aot_eager"),
        (torch.channels_last, "aot_eager"),
        (torch.channels_last, "inductor"),
    ],
)
def test_compile_fullgraph_equals_eager(layout, compiler, backend):
    torch._dynamo.reset()  # the number of recompilations of a function is limited

    call = relu_of(backend)

    def step(leaves):
        x = (2 * leaves["x"]).contiguous(memory_format=layout)
        out = call(**leaves | {"x": x})
        return call(out, leaves["scale"], leaves["shift"])

    compiled = torch.compile(step, fullgraph=True, backend=compiler)
    for rows in (2, 3):  # a new shape
        leaves = make(backend, shape=(rows, 3, 8, 10))
        inputs = list(leaves.values())
        expected = step(leaves)
        out = compiled(leaves)
        torch.testing.assert_close(out, expected)
        upstream = torch.randn_like(out)
        grads = torch.autograd.grad(out, inputs, upstream)
        for grad, true in zip(grads, torch.autograd.grad(expected, inputs, upstream), strict=True):
            torch.testing.assert_close(grad, true, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize(
    ("layout", "dtype"),  # which strides a result has does not depend on its dtype
    [
        (torch.channels_last, torch.float32),
        (torch.contiguous_format, torch.float64),
        (torch.contiguous_format, torch.float16),  # its parameters are float32
    ],
)
def test_opcheck(layout, dtype, backend):
    ops = backend.ops
    x, scale, shift, residual = (value.detach() for value in make(backend, dtype).values())
    x, residual = (value.contiguous(memory_format=layout) for value in (x, residual))
    stored = tuple(value.to(dtype) for value in (scale, shift, shift, scale.square()))
    for parameters in ((scale, shift, None, None, 0.0), (*stored, 1e-5)):
        for relu, added in ((False, None), (True, None), (True, residual)):
            forward = (x, *parameters, added, 1, relu)
            torch.library.opcheck(ops.channel_affine_forward.default, forward)
            out, bits = ops.channel_affine_forward(*forward)
            needs = (True, True, True, added is not None)
            backward = (out, x, *parameters, bits, 1, relu, *needs)
            torch.library.opcheck(ops.channel_affine_backward.default, backward)
        without_x = (out, None, *parameters, bits, 1, True, True, False, False, True)
        torch.library.opcheck(ops.channel_affine_backward.default, without_x)


@pytest.mark.parametrize("backend", COMPILED)
def test_ops_refuse_what_would_read_foreign_memory(backend):
    if backend == "triton":
        pytest.skip("checked by ueo_fast/normalization.py alone")
    ops = backend.ops
    x, scale, shift, residual = (value.detach() for value in make(backend).values())
    rest = (None, None, 0.0, None)
    for arguments, message in (
        ((x, scale, shift, *rest, 4, True), "dim must be a dimension of x, from 0 to 3, got 4"),
        ((x[..., ::2], scale, shift, *rest, 1, True), "x must be dense"),
        (
            (x.int(), scale, shift, *rest, 1, True),
            "x must be float64, float32, float16 or bfloat16",
        ),
        ((x, scale[1:], shift, *rest, 1, True), r"weight must have shape \(3,\)"),
        ((x, scale, shift.double(), *rest, 1, True), "bias must have the compute dtype"),
        ((x, scale, shift, scale.half(), *rest[1:], 1, True), "mean must have the compute dtype"),
        ((x, scale, shift, None, scale[:2], 0.0, None, 1, True), r"var must have shape \(3,\)"),
        (
            (x, scale, shift, *rest[:3], residual[1:], 1, True),
            "residual must have the shape, dtype and strides",
        ),
    ):
        with pytest.raises(RuntimeError, match=message):
            ops.channel_affine_forward(*arguments)
    parameters = (scale, shift, shift, scale.square(), 1e-5)
    out, bits = ops.channel_affine_forward(x, *parameters, residual, 1, True)
    flags = (1, True, True, True, True, True)
    for arguments, message in (
        ((out.half(), x, *parameters, bits), "grad_out must have the shape, dtype"),
        ((out, x, scale, shift, shift[1:], None, 0.0, bits), r"mean must have shape \(3,\)"),
        ((out, x, *parameters, bits[1:]), "bits must be those of channel_affine_forward"),
        ((out, None, *parameters, bits), "x is needed for the sums"),
        ((out, x, *parameters, bits[:0]), "the gradient of a residual under relu needs"),
        ((out, x, None, *parameters[1:], bits), "weight is None, so it has no gradient"),
        ((out, x, scale, None, *parameters[2:], bits), "bias is None, so it has no gradient"),
    ):
        with pytest.raises(RuntimeError, match=message):
            ops.channel_affine_backward(*arguments, *flags)


@pytest.mark.parametrize("backend", BACKENDS)
def test_half_parameters_get_half_gradients(backend):
    leaves = make(backend, torch.float16)
    for name in ("scale", "shift"):
        leaves[name] = leaves[name].detach().half().requires_grad_()
    grad_out = torch.randn_like(leaves["x"])
    ours = differentiate(relu_of(backend), leaves, grad_out)
    assert_exact(ours, relu_of("reference"), leaves, grad_out)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("left", [0, 3])
@pytest.mark.parametrize("name", ["x", "scale", "shift", "residual"])
@pytest.mark.parametrize("function", [channel_affine, frozen_batch_norm])
def test_memory_that_was_freed(function, name, left, backend):
    given = {name: value.detach() for name, value in make(backend).items()}
    if function is frozen_batch_norm:
        given["weight"], given["bias"] = given.pop("scale"), given.pop("shift")
        given["running_mean"], given["running_var"] = given["bias"], given["weight"].square()
        name = {"scale": "running_var", "shift": "running_mean"}.get(name, name)
    given[name] = shrink(given[name], left)
    with pytest.raises(
        RuntimeError, match=rf"{name} needs \d+ .* its storage holds {left}: it was"
    ):
        function(**given, backend=backend)


@pytest.mark.parametrize("backend", COMPILED)
def test_x_that_was_freed_before_backward(backend):
    if backend == "cuda_host":
        pytest.skip("numpy holds the memory, and does not let it be resized")
    leaves = make(backend)
    out = channel_affine(leaves["x"], leaves["scale"], leaves["shift"], backend=backend)
    leaves["x"].untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=r"x needs .* its storage holds 0"):
        out.sum().backward()


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("transposed", [False, True])
def test_an_upstream_gradient_that_was_freed(transposed, backend):
    leaves = make(backend)
    out = channel_affine(leaves["x"], leaves["scale"], leaves["shift"], backend=backend)
    upstream = torch.ones_like(out)
    if transposed:
        upstream = upstream.transpose(2, 3).contiguous().transpose(2, 3)
    upstream = shrink(upstream)
    with pytest.raises(RuntimeError, match=r"grad_out needs .* its storage holds 0"):
        torch.autograd.grad(out, leaves["x"], upstream)


@pytest.mark.parametrize("backend", COMPILED)
def test_ops_refuse_meta_tensors_among_others(backend):
    x, scale, shift, residual = (value.detach() for value in make(backend).values())
    for given in ((x, scale.to("meta"), shift, residual), (x, scale, shift, residual.to("meta"))):
        with pytest.raises(RuntimeError, match=r"needs all tensors on one device, got .*meta"):
            backend.ops.channel_affine_forward(*given[:3], None, None, 0.0, given[3], 1, True)
