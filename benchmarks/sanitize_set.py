"""A few small calls of the CUDA kernels for compute-sanitizer (benchmarks/gpu.sh runs it).

    python -m benchmarks.sanitize_set [BACKEND] [--jobs N]

Whatever the kernels read is copied from the host, because initcheck, filtered by kernel name, does
not see what torch's own kernels write. Results are compared with the CPU's, which shows that the
kernels have run.
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

from benchmarks.gpu_timing import one_line
from ueo_fast import reference, ueo_loss, ueo_loss_and_grad
from ueo_fast.ops.channel_affine import ChannelAffineFunction
from ueo_fast.ops.layer_norm import LayerNormFunction


@dataclass(frozen=True)
class Sample:
    reason: str
    rows: int
    columns: int
    dtype: torch.dtype = torch.float32
    view: Callable[[Tensor], Tensor] = lambda buffer: buffer
    weights: bool = False
    options: dict[str, Any] = field(default_factory=dict)


# None that PyTorch copies first, such as a transposed one: initcheck does not see that write.
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
    compute = reference.compute_dtype(sample.dtype)
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


# ---- The affine layers --------------------------------------------------------------------------

EPS = 1e-3


@dataclass(frozen=True)
class AffineSample:
    reason: str
    shape: tuple[int, ...]
    dim: int = 1
    dtype: torch.dtype = torch.float32
    relu: bool = False
    residual: bool = False
    channels_last: bool = False


AFFINE = (
    AffineSample("planes of 7 x 7, ReLU", (3, 70, 7, 7), relu=True),
    AffineSample("planes, addition and ReLU", (2, 40, 14, 14), relu=True, residual=True),
    AffineSample("odd planes, bfloat16", (2, 5, 3, 3), dtype=torch.bfloat16, residual=True),
    AffineSample("channels_last, ReLU", (2, 66, 5, 5), relu=True, channels_last=True),
    AffineSample(
        "channels_last, float16", (2, 33, 5, 5), 1, torch.float16, True, True, channels_last=True
    ),
    AffineSample("channels in the last dimension", (5, 19, 70), dim=2),
    AffineSample("one channel, float64", (70, 1), dtype=torch.float64, relu=True),
    AffineSample("more rows than blocks", (3000, 3), relu=True),
)
NORMS = (
    AffineSample("layer norm", (37, 768)),
    AffineSample("layer norm, odd columns, bfloat16", (9, 345), dtype=torch.bfloat16),
    AffineSample("layer norm, one column, float64", (5, 1), dtype=torch.float64),
    AffineSample("layer norm, more rows than blocks", (3000, 33), dtype=torch.float16),
)


def _affine_results(sample: AffineSample, device: str, backend: str) -> list[Tensor]:
    """The result and every gradient; all inputs are made on the host and copied.

    The autograd functions are called directly: besides statistics, they take channels in any
    dimension.
    """
    generator = torch.Generator().manual_seed(0)
    channels = sample.shape[sample.dim]
    compute = reference.compute_dtype(sample.dtype)

    def values() -> Tensor:
        return torch.randn(channels, generator=generator).to(compute).to(device)

    def like_x() -> Tensor:
        values = torch.randn(sample.shape, generator=generator).to(sample.dtype)
        if sample.channels_last:
            values = values.contiguous(memory_format=torch.channels_last)
        return values.to(device)

    x, weight, bias, mean = like_x(), values(), values(), values()
    var = (torch.rand(channels, generator=generator) + 0.1).to(compute).to(device)
    residual = like_x() if sample.residual else None
    leaves = [t.requires_grad_() for t in (x, weight, bias, residual) if t is not None]
    if backend == "reference":
        scale = weight / (var + EPS).sqrt()
        y = reference.channel_affine(
            x, scale, bias - mean * scale, sample.dim,
            activation="relu" if sample.relu else "none", residual=residual,
        )  # fmt: skip
    else:
        y = ChannelAffineFunction.apply(
            backend, x, weight, bias, mean, var, EPS, residual, sample.dim, sample.relu
        )
    return [y, *torch.autograd.grad(y, leaves, like_x())]


def _norm_results(sample: AffineSample, device: str, backend: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    compute = reference.compute_dtype(sample.dtype)
    x, grad = (
        torch.randn(sample.shape, generator=generator).to(sample.dtype).to(device) for _ in range(2)
    )
    weight, bias = (
        torch.randn(sample.shape[1], generator=generator).to(compute).to(device) for _ in range(2)
    )
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    if backend in ("reference", "cpp"):  # on a CPU it is torch's own
        y = reference.layer_norm(x, weight, bias, 1e-5)
    else:
        y = LayerNormFunction.apply(backend, x, weight, bias, 1e-5)
    return [y, *torch.autograd.grad(y, leaves, grad)]


def _check_affine(sample: AffineSample, backend: str, device: str) -> None:
    """Compare a sample on the device with the reference on the CPU."""
    results = _norm_results if sample in NORMS else _affine_results
    found, expected = results(sample, device, backend), results(sample, "cpu", "reference")
    tolerance = 2e-2 if sample.dtype.itemsize == 2 else 1e-4
    for index, (ours, true) in enumerate(zip(found, expected, strict=True)):
        error = (ours.detach().cpu().double() - true.double()).norm()
        limit = tolerance * (true.double().norm() + 1)
        assert error <= limit, f"result {index}: off by {float(error):.3g}"


# ---- Running them -------------------------------------------------------------------------------


def run(backend: str, part: int = 0, parts: int = 1) -> int:
    """Run every ``parts``-th sample from ``part`` on, also after one that fails."""
    device = "cpu" if backend in ("cpp", "reference") else "cuda"
    checks = [(sample, _check) for sample in SAMPLES]
    checks += [(sample, _check_affine) for sample in (*AFFINE, *NORMS)]
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
    parser.add_argument("--jobs", type=int, default=1, help="processes, as compiling takes long")
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
