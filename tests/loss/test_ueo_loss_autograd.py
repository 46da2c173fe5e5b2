"""The loss inside PyTorch: upstream gradients, graphs, contexts, compilation, memory."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest
import torch
from loss_backends import BACKENDS, COMPILED
from torch import nn
from truth import assert_exact

from ueo_fast import ueo_loss, ueo_loss_and_grad


def make_logits(backend=None, dtype=torch.float32, rows=60, columns=37):
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(rows, columns, generator=generator)
    return logits.to(dtype).to("cpu" if backend is None else backend.device).requires_grad_()


def true_grad(logits):
    return ueo_loss_and_grad(logits, backend="reference")[1]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("upstream", [0.0, -1.0, 1e-20, 3.7, 1e20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_any_upstream_gradient(dtype, upstream, backend):
    logits = make_logits(backend, dtype)
    (grad,) = torch.autograd.grad(upstream * ueo_loss(logits, backend=backend), logits)
    assert_exact(ueo_loss(logits.detach(), backend=backend), grad, logits, upstream=upstream)


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("options", [{}, {"eps": 1e-5, "trade_off": -0.3}], ids=str)
def test_gradcheck_of_the_kernel(options, backend):
    interpreted = backend == "triton" and backend.device == "cpu"  # 20 ms a call
    rows, columns = (3, 9) if interpreted else (6, 19)
    logits = make_logits(backend, torch.float64, rows, columns)
    # The confidence is a constant of the method: hold it, or finite differences would see it.
    confidence = torch.rand(rows, dtype=torch.float64, device=backend.device) + 0.1

    def loss(z):
        return ueo_loss(z, confidence, backend=backend, **options)

    assert torch.autograd.gradcheck(loss, (logits,))


@pytest.mark.parametrize("backend", BACKENDS)
def test_half_gradient_is_scaled_before_it_is_rounded(backend):
    logits = make_logits(backend, torch.float16, rows=4096)
    scale = 65536.0
    loss = ueo_loss(logits, backend=backend)
    (plain,) = torch.autograd.grad(loss, logits, retain_graph=True)
    (scaled,) = torch.autograd.grad(scale * loss, logits)
    assert_exact(loss.detach(), scaled, logits, upstream=scale)
    # Without the scale most of this gradient is below float16's range: the test has teeth.
    lost = (plain == 0) & (scaled != 0)
    assert lost.sum() > 0.05 * lost.numel()


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_backward_calls_with_retain_graph(backend):
    logits = make_logits(backend)
    loss = ueo_loss(logits, backend=backend)
    loss.backward(retain_graph=True)
    first = logits.grad
    snapshot = first.clone()
    first.mul_(7)  # somebody else holds and changes what the first call returned
    logits.grad = None
    loss.backward(torch.tensor(-2.0, device=backend.device))
    torch.testing.assert_close(logits.grad, -2 * snapshot)
    assert torch.equal(first, 7 * snapshot)


@pytest.mark.parametrize("backend", BACKENDS)
def test_sum_with_other_losses(backend):
    logits = make_logits(backend, torch.float64)
    target = torch.arange(60, device=backend.device) % 37
    loss = 0.3 * ueo_loss(logits, backend=backend) + nn.functional.cross_entropy(logits, target)
    (grad,) = torch.autograd.grad(loss + ueo_loss(logits * 2, backend=backend), logits)
    parts = [
        0.3 * true_grad(logits),
        2 * true_grad(logits * 2),
        torch.autograd.grad(nn.functional.cross_entropy(logits, target), logits)[0],
    ]
    torch.testing.assert_close(grad, sum(parts))


@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_stride_upstream_gradient(backend):
    logits = make_logits(backend)
    losses = ueo_loss(logits, backend=backend).expand(5)
    (grad,) = torch.autograd.grad(losses, logits, torch.ones(1, device=backend.device).expand(5))
    torch.testing.assert_close(grad, 5 * true_grad(logits))


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_is_tracked_without_grad(backend):
    logits = make_logits(backend)
    expected = ueo_loss(logits, backend=backend).detach()
    with torch.no_grad():
        assert torch.equal(ueo_loss(logits, backend=backend), expected)
        assert not ueo_loss(logits, backend=backend).requires_grad
    with torch.inference_mode():
        loss = ueo_loss(logits, backend=backend)
        assert loss.is_inference()
    assert loss == expected
    assert not ueo_loss(logits.detach(), backend=backend).requires_grad


@pytest.mark.parametrize("backend", COMPILED)
def test_only_forward_runs_when_no_gradient_is_wanted(backend):
    def ops_of(call):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            call()
        return {event.key for event in profile.key_averages() if "::ueo_loss" in event.key}

    logits = make_logits(backend)
    forward, backward = backend.ops.ueo_loss_forward, backend.ops.ueo_loss_backward
    forward, backward = str(forward).replace(".", "::"), str(backward).replace(".", "::")
    assert ops_of(lambda: ueo_loss(logits.detach(), backend=backend)) == {forward}
    # Forward of a graph: nothing of backward.
    assert ops_of(lambda: ueo_loss(logits, backend=backend)) == {forward}
    assert ops_of(lambda: ueo_loss(logits, backend=backend).backward()) == {forward, backward}


ALLOCATIONS_AND_VIEWS = {
    *("aten::empty", "aten::empty_like", "aten::empty_strided", "aten::as_strided"),
    *("aten::detach", "aten::ones_like", "aten::select", "aten::slice"),
}
"""What PyTorch runs without a kernel; ones_like is made of others."""


def test_pytorch_runs_no_kernel_of_its_own_beside_ours():
    """On a GPU each would be a launch: those are counted in test_gpu.py."""

    def kernels_of(call):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            call()
        found = {event.key: event.count for event in profile.key_averages()}
        assert any(name.startswith("ueo_fast::") for name in found)
        return {
            name: count
            for name, count in found.items()
            if name.startswith("aten::") and name not in ALLOCATIONS_AND_VIEWS
        }

    logits = make_logits()
    one = torch.ones(())
    assert kernels_of(lambda: torch.autograd.grad(ueo_loss(logits), logits, one)) == {}
    assert kernels_of(lambda: ueo_loss_and_grad(logits)) == {}
    # The upstream gradient of 1, before anything of ours is asked.
    assert kernels_of(lambda: ueo_loss(logits).backward()) == {"aten::fill_": 1}
    # One copy of all statistics.
    for function in (ueo_loss, ueo_loss_and_grad):
        copied = kernels_of(lambda function=function: function(logits, return_stats=True))
        assert copied == {"aten::narrow_copy": 1}


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("grad", [False, True], ids=["no grad", "grad"])
def test_kept_results_keep_nothing_of_the_rows(grad, backend):
    logits = make_logits(backend, rows=400).requires_grad_(grad)
    loss, stats = ueo_loss(logits, return_stats=True, backend=backend)
    assert loss.untyped_storage().nbytes() == loss.nbytes
    for statistic in stats:  # all of them share the memory of C + 5 numbers
        assert statistic.untyped_storage().nbytes() == (37 + 5) * loss.nbytes


@pytest.mark.parametrize("backend", BACKENDS)
def test_statistics_can_be_written_and_are_not_differentiated(backend):
    logits = make_logits(backend)
    loss, stats = ueo_loss(logits, return_stats=True, backend=backend)
    stats.marginal.zero_()
    stats.conditional_entropy.fill_(5)
    loss.backward()
    torch.testing.assert_close(logits.grad, true_grad(logits))


@pytest.mark.parametrize("backend", COMPILED)
def test_changing_the_logits_before_backward_is_an_error(backend):
    logits = make_logits(backend)
    product = logits * 1
    loss = ueo_loss(product, backend=backend)
    product.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("backend", COMPILED)
def test_double_backward_is_a_clear_error_and_the_reference_has_it(backend):
    logits = make_logits(backend, torch.float64)
    (grad,) = torch.autograd.grad(ueo_loss(logits, backend=backend), logits, create_graph=True)
    torch.testing.assert_close(grad, true_grad(logits))
    with pytest.raises(RuntimeError, match="differentiable once: use backend='reference'"):
        (grad**2).sum().backward()
    loss = ueo_loss(logits, backend="reference")
    (grad,) = torch.autograd.grad(loss, logits, create_graph=True)
    (second,) = torch.autograd.grad((grad**2).sum(), logits)
    assert second.abs().max() > 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_reaches_a_model_and_hooks(backend):
    model = nn.Linear(8, 37).to(backend.device)
    seen = []
    output = model(torch.randn(60, 8, device=backend.device))
    output.register_hook(seen.append)
    ueo_loss(output, backend=backend).backward()
    torch.testing.assert_close(seen[0], true_grad(output))
    assert model.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype, backend):
    model = nn.Linear(8, 37).to(backend.device)
    images = torch.randn(60, 8, device=backend.device)
    with torch.autocast(backend.device, dtype=dtype):
        logits = model(images)
        loss = ueo_loss(logits, backend=backend)
    assert logits.dtype == dtype
    assert loss.dtype == torch.float32
    logits.retain_grad()
    loss.backward()
    assert_exact(loss.detach(), logits.grad, logits.detach())


@pytest.mark.parametrize("backend", BACKENDS)
def test_grad_scaler(backend):
    model = nn.Linear(8, 37).to(backend.device)
    images = torch.randn(60, 8, device=backend.device)
    ueo_loss(model(images), backend=backend).backward()
    expected = model.weight.grad.clone()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    optimizer.zero_grad()
    scaler = torch.amp.GradScaler(backend.device, init_scale=2.0**16)
    scaler.scale(ueo_loss(model(images), backend=backend)).backward()
    scaler.unscale_(optimizer)
    torch.testing.assert_close(model.weight.grad, expected)


def test_func_transforms_and_forward_mode_take_the_reference():
    logits = make_logits(dtype=torch.float64).detach()
    true = ueo_loss_and_grad(logits, torch.ones(60))[1]

    def loss(z):
        return ueo_loss(z, torch.ones(60))

    torch.testing.assert_close(torch.func.grad(loss)(logits), true)
    torch.testing.assert_close(torch.func.jacfwd(loss)(logits), true)
    tangent = torch.randn_like(logits)
    _, derivative = torch.func.jvp(loss, (logits,), (tangent,))
    torch.testing.assert_close(derivative, (true * tangent).sum())
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(logits, tangent)
        derivative = torch.autograd.forward_ad.unpack_dual(loss(dual)).tangent
    torch.testing.assert_close(derivative, (true * tangent).sum())


@pytest.mark.parametrize("backend", COMPILED)
def test_func_transforms_and_forward_mode_are_refused_by_name(backend):
    logits = make_logits(backend, torch.float64).detach()
    refused = pytest.raises(RuntimeError, match=r"no rules for torch\.func transforms")
    with refused:
        torch.func.grad(lambda z: ueo_loss(z, backend=backend))(logits)
    with torch.autograd.forward_ad.dual_level(), refused:
        dual = torch.autograd.forward_ad.make_dual(logits, torch.ones_like(logits))
        ueo_loss(dual, backend=backend)


def test_vmap():
    batches = torch.stack([scale * make_logits().detach() for scale in (1, 2, -1)])
    confidence = torch.rand(3, 60) + 0.1
    expected = torch.stack([ueo_loss(z, w) for z, w in zip(batches, confidence, strict=True)])
    torch.testing.assert_close(torch.vmap(ueo_loss)(batches, confidence), expected)
    pairs = [ueo_loss_and_grad(batch, row) for batch, row in zip(batches, confidence, strict=True)]
    losses, grads = torch.vmap(ueo_loss_and_grad)(batches, confidence)
    torch.testing.assert_close(losses, expected)
    torch.testing.assert_close(grads, torch.stack([grad for _, grad in pairs]))


def test_peak_memory_of_forward_and_backward():
    if not sys.platform.startswith("linux"):
        pytest.skip("reads /proc/self/status")
    script = textwrap.dedent("""
        import torch
        from ueo_fast import ueo_loss

        def status(name):
            with open("/proc/self/status") as lines:
                return next(int(x.split()[1]) for x in lines if x.startswith(name)) * 1024

        logits = torch.randn(32768, 345, requires_grad=True)
        ueo_loss(torch.randn(512, 345, requires_grad=True)).backward()
        before = status("VmRSS")
        with open("/proc/self/clear_refs", "w") as peak:
            peak.write("5")
        ueo_loss(logits).backward()
        print((status("VmHWM") - before) / (logits.numel() * 4))
    """)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 0.9 < float(done.stdout) <= 1.05
