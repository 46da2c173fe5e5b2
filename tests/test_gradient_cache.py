"""The gradient of a batch in parts is that of the batch; where it would not be, a warning."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from ueo_fast import GradCache, mcm_score, ueo_loss

GUIDE = Path(__file__).resolve().parent.parent / "docs" / "guide.md"


class Problem:
    """An encoder, a text, a scale, and a batch."""

    def __init__(self, dropout: float = 0.0) -> None:
        torch.manual_seed(0)
        self.tower = nn.Sequential(
            nn.Flatten(),
            nn.Linear(3 * 8 * 8, 32),
            nn.Dropout(dropout),
            nn.GELU(),
            nn.Linear(32, 16),
        ).double()
        self.text = nn.functional.normalize(torch.randn(7, 16).double(), dim=1).requires_grad_()
        self.logit_scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
        self.images = torch.randn(50, 3, 8, 8).double()
        self.confidence = mcm_score(self.encode(self.images).detach() @ self.text.detach().T)

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        return nn.functional.normalize(self.tower(images), dim=1)

    @property
    def trained(self) -> list[torch.Tensor]:
        return [*self.tower.parameters(), self.text, self.logit_scale]

    def loss(self, features: torch.Tensor, rows: slice = slice(None)) -> torch.Tensor:
        logits = self.logit_scale.exp() * features @ self.text.T
        return ueo_loss(logits, self.confidence[rows])

    def gradients(self) -> list[torch.Tensor]:
        found = [value.grad for value in self.trained]
        assert all(value is not None for value in found)
        for value in self.trained:
            value.grad = None
        return found


def off(found: list[torch.Tensor], true: list[torch.Tensor]) -> float:
    """The largest error of a gradient, relative to its norm."""
    return max(float((a - b).norm() / b.norm()) for a, b in zip(found, true, strict=True))


@pytest.mark.parametrize("size", [1, 7, 25, 50, 64])
def test_the_gradient_is_that_of_the_whole_batch(size):
    problem = Problem()
    problem.loss(problem.encode(problem.images)).backward()
    true = problem.gradients()
    cache = GradCache(problem.encode, problem.images.split(size))
    problem.loss(cache.features).backward()
    cache.backward()
    assert off(problem.gradients(), true) < 1e-12


def test_the_example_of_the_guide():
    blocks = re.findall(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)
    (example,) = [block for block in blocks if "GradCache" in block]
    steps = []
    for in_parts in (True, False):
        problem = Problem()
        optimizer = torch.optim.SGD(problem.trained, lr=0.5)
        if in_parts:
            names = {
                "encode_image": problem.encode,
                "images": problem.images,
                "text_features": problem.text,
                "logit_scale": problem.logit_scale,
                "confidence": problem.confidence,
                "optimizer": optimizer,
            }
            exec(example, names)
        else:
            problem.loss(problem.encode(problem.images)).backward()
            optimizer.step()
        steps.append([value.detach() for value in problem.trained])
    before = [value.detach() for value in Problem().trained]
    moved = [ours - start for ours, start in zip(steps[0], before, strict=True)]
    expected = [whole - start for whole, start in zip(steps[1], before, strict=True)]
    assert off(moved, expected) < 1e-12


@pytest.mark.parametrize("size", [25, 13])
def test_ordinary_accumulation_is_another_gradient(size):
    """Why GradCache is there."""
    problem = Problem()
    problem.loss(problem.encode(problem.images)).backward()
    true = problem.gradients()
    for start in range(0, 50, size):
        rows = slice(start, start + size)
        part = problem.images[rows]
        (problem.loss(problem.encode(part), rows) * len(part) / 50).backward()
    assert off(problem.gradients(), true) > 0.05


def test_parts_are_what_the_encoder_takes():
    problem = Problem()
    parts = [{"pixels": part} for part in problem.images.split([30, 20])]
    cache = GradCache(lambda part: problem.encode(part["pixels"]), iter(parts))
    problem.loss(cache.features).backward()
    cache.backward()
    found = problem.gradients()
    problem.loss(problem.encode(problem.images)).backward()
    assert off(found, problem.gradients()) < 1e-12


def test_dropout_is_the_same_in_both_passes():
    problem = Problem(dropout=0.5)
    torch.manual_seed(1)
    problem.loss(torch.cat([problem.encode(part) for part in problem.images.split(9)])).backward()
    true, after = problem.gradients(), torch.rand(3)
    torch.manual_seed(1)
    cache = GradCache(problem.encode, problem.images.split(9))
    problem.loss(cache.features).backward()
    cache.backward()
    assert off(problem.gradients(), true) < 1e-12
    assert torch.equal(torch.rand(3), after)  # the stream goes on after the first pass


def test_mistakes_are_named():
    problem = Problem()
    with pytest.raises(ValueError, match="parts must not be empty"):
        GradCache(problem.encode, [])
    cache = GradCache(problem.encode, problem.images.split(25))
    early = pytest.raises(RuntimeError, match=r"call loss\.backward\(\) before cache\.backward\(\)")
    with early:
        cache.backward()
    problem.loss(cache.features).backward()
    cache.backward()
    with early:  # it would add the same gradient once more
        cache.backward()
    with pytest.raises(TypeError, match=r"split it, e\.g\. images\.split\(32\)"):
        GradCache(problem.encode, problem.images)


def test_a_frozen_encoder_leaves_its_share_out():
    problem = Problem()
    problem.tower.requires_grad_(False)
    problem.loss(problem.encode(problem.images)).backward()
    wanted, problem.text.grad = problem.text.grad, None
    cache = GradCache(problem.encode, problem.images.split(25))
    problem.loss(cache.features).backward()
    cache.backward()
    torch.testing.assert_close(problem.text.grad, wanted)
    assert all(value.grad is None for value in problem.tower.parameters())


RANKS = """
import warnings
import torch
from torch import distributed
from torch.testing._internal.distributed.fake_pg import FakeStore
from ueo_fast import ueo_loss, ueo_loss_and_grad

logits = torch.randn(4, 3, requires_grad=True)
call = {call}
with warnings.catch_warnings(record=True) as alone:
    warnings.simplefilter("always")
    call(logits)
distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size={ranks})
with warnings.catch_warnings(record=True) as together:
    warnings.simplefilter("always")
    for _ in range(3):
        call(logits)
texts = [[str(warning.message) for warning in seen] for seen in (alone, together)]
said = [[text for text in seen if "ueo_loss" in text] for seen in texts]
print(len(said[0]), len(said[1]), *said[1])
"""


CALLS = {
    "loss": "ueo_loss",
    "loss and grad": "ueo_loss_and_grad",
    # Compiled before there is a group, it is traced again in one.
    "compiled": "lambda z: torch.compile(ueo_loss, fullgraph=True, backend='aot_eager')(z)",
}
# What says nothing leaves nothing behind: one process for all of them.
ALL = f"lambda z: [call(z) for call in ({', '.join(f'({call})' for call in CALLS.values())})]"


@pytest.mark.parametrize(
    ("call", "ranks"), [(ALL, 1), *((call, 2) for call in CALLS.values())], ids=["one rank", *CALLS]
)
def test_a_group_of_several_ranks_warns_once(call, ranks):
    pytest.importorskip("torch.testing._internal.distributed.fake_pg")
    script = RANKS.format(call=call, ranks=ranks)
    if "compile" in call:
        script = script.replace("    call(logits)\ndistributed", "    pass\ndistributed")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    alone, together, *message = done.stdout.split(maxsplit=2)
    assert (alone, together) == ("0", str(ranks - 1))
    if ranks == 2:
        assert "one of 2" in message[0]
        assert "DistributedDataParallel" in message[0]
