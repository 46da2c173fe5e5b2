"""Threads: the same bits on any number of them, from many callers at once, and after a fork."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from ueo_fast import ueo_loss_and_grad


def run_python(script, timeout=120, **environment):
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=dict(os.environ, **environment),
    )


@pytest.mark.parametrize("shape", [(64, 345), (1000, 130), (5000, 33), (9, 30000)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_number_of_threads_does_not_change_a_bit(shape, dtype):
    logits = (3 * torch.randn(shape)).to(dtype)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            results.append(ueo_loss_and_grad(logits, backend="cpp"))
    finally:
        torch.set_num_threads(before)
    for loss, grad in results[1:]:
        assert torch.equal(loss, results[0][0])
        assert torch.equal(grad, results[0][1])


def test_several_threads_are_used():
    script = """
        import os, threading, torch
        from ueo_fast import ueo_loss
        logits = torch.randn(4096, 1000)

        def threads_after(count):
            torch.set_num_threads(count)
            ueo_loss(logits, backend="cpp")
            return len(os.listdir("/proc/self/task"))

        one = threads_after(1)
        print(threads_after(4) - one)
    """
    if not os.path.isdir("/proc/self/task"):
        pytest.skip("reads /proc")
    done = run_python(script)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 1


def test_many_callers_at_once():
    inputs = [3 * torch.randn(300 + 7 * i, 150) for i in range(24)]
    expected = [ueo_loss_and_grad(logits, backend="cpp") for logits in inputs]
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda z: ueo_loss_and_grad(z, backend="cpp"), inputs * 4))
    for (loss, grad), (true_loss, true_grad) in zip(results, expected * 4, strict=True):
        assert torch.equal(loss, true_loss)
        assert torch.equal(grad, true_grad)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_child_computes_the_same():
    # OpenMP's threads do not survive a fork; waiting for them would hang until the timeout.
    script = """
        import os, torch
        from ueo_fast import ueo_loss_and_grad
        torch.set_num_threads(4)
        logits = torch.randn(2000, 300)
        loss, grad = ueo_loss_and_grad(logits, backend="cpp")
        child = os.fork()
        if child == 0:
            again, grad_again = ueo_loss_and_grad(logits, backend="cpp")
            same = torch.equal(loss, again) and bool((grad.numpy() == grad_again.numpy()).all())
            os._exit(0 if same else 3)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        assert torch.equal(ueo_loss_and_grad(logits, backend="cpp")[1], grad)
    """
    done = run_python(script)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "0"
