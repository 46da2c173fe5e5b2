"""A few small calls of the CUDA kernels for compute-sanitizer (benchmarks/gpu.sh runs it).

    python -m benchmarks.sanitize_set [BACKEND] [--jobs N]

Whatever the kernels read is copied from the host: with a filter by kernel name, initcheck does not
see what torch's own kernels write. Results are compared with the CPU's, so that the set is known
to have run.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks import sanitize_affine
from benchmarks.gpu_timing import one_line
from ueo_fast import ueo_loss, ueo_loss_and_grad
from ueo_fast.reference import compute_dtype


@dataclass(frozen=True)
class Sample:
    reason: str
    rows: int
    columns: int
    dtype: torch.dtype = torch.float32
    view: Callable[[Tensor], Tensor] = lambda buffer: buffer
    weights: bool = False
    options: dict[str, Any] = field(default_factory=dict)


# None that is copied by PyTorch first (transposed, say): initcheck does not see its kernels write.
SAMPLES = (
    Sample("the recipe's batch", 64, 345),
    Sample("16-byte rows, bfloat16", 96, 1000, torch.bfloat16),
    Sample("rows at every alignment, float16", 33, 345, torch.float16),
    Sample("float64", 17, 129, torch.float64),
    Sample("a column slice: rows start misaligned", 40, 203, view=lambda z: z[:, 3:200]),
    Sample("a column slice, bfloat16", 40, 203, torch.bfloat16, lambda z: z[:, 1:202]),
    Sample("one row, one class", 1, 1),
    Sample("fewer columns than a warp", 300, 7),
    Sample("a row beyond one tile", 5, 21841, torch.bfloat16),
    Sample("more rows than blocks", 3000, 65),
    Sample("given weights, eps", 64, 100, weights=True, options={"eps": 1e-5, "trade_off": 0.5}),
    Sample("scaled confidence", 64, 100, torch.bfloat16, options={"confidence_scale": 0.01}),
)


def _to(device: str, sample: Sample) -> tuple[Tensor, dict[str, Any], Tensor]:
    """Logits, given weights and upstream gradient, made on the host and copied as they are."""
    generator = torch.Generator().manual_seed(0)
    buffer = 3 * torch.randn(sample.rows, sample.columns, generator=generator)
    logits = sample.view(buffer.to(sample.dtype).to(device)).detach().requires_grad_()
    compute = compute_dtype(sample.dtype)
    weights: dict[str, Any] = {}
    if sample.weights:
        for name in ("confidence", "marginal_weights"):
            values = torch.rand(logits.shape[0], generator=generator) + 0.1
            weights[name] = values.to(compute).to(device)
    return logits, weights, torch.tensor(2.0, dtype=compute).to(device)


def _results(device: str, sample: Sample, backend: str) -> list[Tensor]:
    logits, weights, upstream = _to(device, sample)
    loss = ueo_loss(logits, **weights, **sample.options, backend=backend)
    (grad,) = torch.autograd.grad(loss, logits, upstream)
    at_once = ueo_loss_and_grad(logits.detach(), **weights, **sample.options, backend=backend)
    return [value.detach().cpu() for value in (loss, grad, *at_once)]


def _check(sample: Sample, backend: str, device: str) -> None:
    names = ("loss", "gradient", "loss of loss_and_grad", "gradient of loss_and_grad")
    found, expected = _results(device, sample, backend), _results("cpu", sample, "reference")
    for name, ours, true in zip(names, found, expected, strict=True):
        torch.testing.assert_close(
            ours, true, rtol=2e-2 if sample.dtype.itemsize == 2 else 1e-4, atol=1e-6,
            msg=lambda text, name=name: f"{name}: {text}",
        )  # fmt: skip


def run(backend: str, part: int = 0, parts: int = 1) -> int:
    """Every ``parts``-th sample, beginning with ``part``. One that fails does not end the run."""
    device = "cpu" if backend in ("cpp", "reference") else "cuda"
    checks = [(sample, _check) for sample in SAMPLES]
    checks += [(sample, sanitize_affine.check) for sample in sanitize_affine.SAMPLES]
    return sum(not _passes(sample, check, backend, device) for sample, check in checks[part::parts])


def _passes(sample: Any, check: Callable[..., None], backend: str, device: str) -> bool:
    try:
        check(sample, backend, device)
    except Exception as error:
        print(f"failed: {sample.reason}: {one_line(error, 300)}", flush=True)
        return False
    print(f"ok: {sample.reason}", flush=True)
    return True


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("backend", nargs="?", default="cuda")
    parser.add_argument("--jobs", type=int, default=1, help="processes, for what compiles long")
    args = parser.parse_args(argv)
    if args.jobs == 1:
        return int(run(args.backend) > 0)
    code = "import sys; from benchmarks import sanitize_set as s; sys.exit(s.run({!r}, {}, {}) > 0)"
    jobs = [
        subprocess.Popen([sys.executable, "-c", code.format(args.backend, part, args.jobs)])
        for part in range(args.jobs)
    ]
    return max(abs(job.wait()) for job in jobs)


if __name__ == "__main__":
    raise SystemExit(main())
