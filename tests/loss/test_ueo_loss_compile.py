"""The loss as PyTorch ops: fake tensors, torch.compile, opcheck, and calls past the checks."""

from __future__ import annotations

import pytest
import torch
from loss_backends import COMPILED, shrink
from torch.fx.experimental.proxy_tensor import make_fx

from ueo_fast import ueo_loss


def make_logits(backend=None, dtype=torch.float32, rows=60, columns=37):
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(rows, columns, generator=generator)
    return logits.to(dtype).to("cpu" if backend is None else backend.device).requires_grad_()


def test_fake_tensors_have_no_values_to_check():
    with torch._subclasses.fake_tensor.FakeTensorMode():
        logits = torch.empty(6, 4, requires_grad=True)
        loss = ueo_loss(logits, torch.ones(6))
        loss.backward()
    assert loss.shape == ()
    assert logits.grad.shape == (6, 4)


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compile_fullgraph_equals_eager(compiler, backend):
    torch._dynamo.reset()  # the number of recompilations of a function is limited
    options = {"eps": 1e-5, "return_stats": True, "backend": str(backend)}

    def step(logits, confidence, trade_off):
        loss, stats = ueo_loss(2 * logits, confidence, trade_off=trade_off, **options)
        return loss, stats.marginal_entropy

    compiled = torch.compile(step, fullgraph=True, backend=compiler)
    confidence = torch.rand(60, device=backend.device) + 0.1
    for rows, trade_off in ((60, 0.5), (33, 0.5), (33, 0.25)):  # a new shape, a new number
        logits = make_logits(backend)
        eager = make_logits(backend)
        loss, entropy = compiled(logits[:rows], confidence[:rows], trade_off)
        loss.backward()
        expected, expected_entropy = step(eager[:rows], confidence[:rows], trade_off)
        expected.backward()
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(entropy, expected_entropy)
        torch.testing.assert_close(logits.grad, eager.grad, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("name", ["confidence", "marginal_weights"])
@pytest.mark.parametrize("trace", ["aot_eager", "inductor", "make_fx"])
def test_a_graph_refuses_bad_weights_when_it_runs(trace, name):
    torch._dynamo.reset()

    def loss(logits, weights):
        return ueo_loss(logits, **{name: weights}, backend="cpp")

    logits, weights = make_logits().detach(), torch.rand(60) + 0.1
    if trace == "make_fx":
        graph = make_fx(loss)(logits, weights)
    else:
        graph = torch.compile(loss, fullgraph=True, backend=trace)
    torch.testing.assert_close(graph(logits, weights), loss(logits, weights))
    weights[40] = -2.5
    with pytest.raises(RuntimeError, match=f"{name} must be .*, got values from -2.5 to [01]"):
        graph(logits, weights)


@pytest.mark.parametrize("backend", COMPILED)
def test_compiled_call_without_gradient_and_with_internal_confidence(backend):
    torch._dynamo.reset()
    options = {"confidence_scale": 0.1, "backend": str(backend)}
    compiled = torch.compile(lambda z: ueo_loss(z, **options), fullgraph=True, backend="aot_eager")
    logits = make_logits(backend).detach()
    assert torch.equal(compiled(logits), ueo_loss(logits, **options))


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("weights", [False, True])
def test_opcheck(dtype, weights, backend):
    logits = make_logits(backend, dtype).detach()
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    confidence = torch.rand(60, dtype=compute, device=backend.device) + 0.1 if weights else None
    ops = backend.ops
    forward = (logits, confidence, confidence, 0.5, 1.0, 0.0)
    torch.library.opcheck(ops.ueo_loss_forward.default, forward)
    loss, *saved = ops.ueo_loss_forward(*forward)
    torch.library.opcheck(ops.ueo_loss_backward.default, (loss, logits, *saved, 0.5, 0.0))
    torch.library.opcheck(ops.max_softmax.default, (logits, 0.5))


@pytest.mark.parametrize("backend", COMPILED)
def test_ops_refuse_what_would_read_foreign_memory(backend):
    ops = backend.ops
    logits = make_logits(backend).detach()
    loss, saved = ops.ueo_loss_forward(logits, None, None, 1.0, 1.0, 0.0)
    with pytest.raises(RuntimeError, match=r"logits must have shape \(B, C\)"):
        ops.ueo_loss_forward(logits[0], None, None, 1.0, 1.0, 0.0)
    with pytest.raises(RuntimeError, match="logits must be float64, float32, float16 or bfloat16"):
        ops.ueo_loss_forward(logits.int(), None, None, 1.0, 1.0, 0.0)
    with pytest.raises(RuntimeError, match=r"confidence must have shape \(60,\)"):
        ops.ueo_loss_forward(logits, logits.new_ones(59), None, 1.0, 1.0, 0.0)
    with pytest.raises(RuntimeError, match="marginal_weights must have the compute dtype"):
        ops.ueo_loss_forward(logits, None, logits.new_ones(60).double(), 1.0, 1.0, 0.0)
    other_type, scattered = saved.double(), saved.repeat_interleave(2)[::2]
    for other in (saved[1:], saved[None], other_type, scattered):
        with pytest.raises(RuntimeError, match=f"must be that of ueo_loss_forward: {60 * 5 + 42}"):
            ops.ueo_loss_backward(loss, logits, other, 1.0, 0.0)
    with pytest.raises(RuntimeError, match="grad_loss must be 0-d"):
        ops.ueo_loss_backward(loss[None], logits, saved, 1.0, 0.0)


@pytest.mark.parametrize("backend", COMPILED)
def test_ops_refuse_tensors_without_their_memory(backend):
    ops = backend.ops
    logits = make_logits(backend).detach()
    weights = torch.rand(60, device=backend.device) + 0.1
    loss, saved = ops.ueo_loss_forward(logits, None, None, 1.0, 1.0, 0.0)
    calls = {
        ("logits", "confidence", "marginal_weights"): (
            ops.ueo_loss_forward,
            (logits, weights, weights),
            (1.0, 1.0, 0.0),
        ),
        ("grad_loss", "logits", "saved"): (
            ops.ueo_loss_backward,
            (loss, logits, saved),
            (1.0, 0.0),
        ),
        ("logits|cosines",): (ops.max_softmax, (logits,), (1.0,)),
    }
    for names, (call, tensors, options) in calls.items():
        for position, name in enumerate(names):
            for left in (0, tensors[position].nbytes - 1):
                given = list(tensors)
                given[position] = shrink(tensors[position], left)
                message = rf"({name}) needs \d+ bytes of memory, but its storage holds {left}"
                with pytest.raises(RuntimeError, match=message):
                    call(*given, *options)


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("position", [0, 1, 2])
def test_ops_refuse_meta_tensors_among_others(position, backend):
    tensors = [make_logits(backend).detach(), torch.ones(60), torch.ones(60)]
    tensors = [tensor.to(backend.device) for tensor in tensors]
    meta = [tensor.to("meta") for tensor in tensors]
    assert backend.ops.ueo_loss_forward(*meta, 1.0, 1.0, 0.0)[0].is_meta
    tensors[position] = meta[position]
    with pytest.raises(RuntimeError, match=r"needs all tensors on one device, got .*meta"):
        backend.ops.ueo_loss_forward(*tensors, 1.0, 1.0, 0.0)
