"""The gradient of a batch in parts is that of the batch; where it would not be, a warning."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from ueo_fast import GradCache, mcm_score, ueo_loss

GUIDE = Path(__file__).resolve().parents[2] / "docs" / "guide.md"


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


RANKS = '''
import json, os, sys, warnings
import torch
from torch import distributed
from torch.testing._internal.distributed.fake_pg import FakeStore
from ueo_fast import ueo_loss, ueo_loss_and_grad

CALLS = {
    "loss": ueo_loss,
    "loss and grad": ueo_loss_and_grad,
    "compiled": lambda z: torch.compile(ueo_loss, fullgraph=True, backend="aot_eager")(z),
}

def said(names, times):
    """The warnings about ranks of so many calls of each."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for name in names * times:
            CALLS[name](torch.randn(4, 3, requires_grad=True))
    return [str(warning.message) for warning in seen if "ueo_loss" in str(warning.message)]

# What warns once per process gets a process of its own, forked from one that has imported all.
for names, ranks in [(list(CALLS), 1)] + [([name], 2) for name in CALLS]:
    if (child := os.fork()) == 0:
        # Compiled before there is a group, it is traced again in one.
        alone = said([name for name in names if name != "compiled"], 1)
        distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
        print(json.dumps([names, ranks, alone, said(names, 3)]), flush=True)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
'''


def test_a_group_of_several_ranks_warns_once():
    pytest.importorskip("torch.testing._internal.distributed.fake_pg")
    done = subprocess.run([sys.executable, "-c", RANKS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(len(names), ranks) for names, ranks, *_ in found] == [(3, 1), (1, 2), (1, 2), (1, 2)]
    for names, ranks, alone, together in found:
        assert alone == []
        assert len(together) == ranks - 1, names
        for message in together:
            assert "one of 2" in message
            assert "DistributedDataParallel" in message
