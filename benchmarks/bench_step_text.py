"""Time of a step's prompts: packed, cut at the longest prompt, and whole, as published.

Forward and backward of the text tower of RN50 and ViT-B-16 (12 layers, 512 wide); only the context
needs a gradient. Contenders take turns, as in bench_ueo_loss.py.
"""

from __future__ import annotations

import functools
import os

import pytest
import torch
from torch import Tensor

from benchmarks import step_cases, turns, visual_cases
from benchmarks.authors_step import Prompts, encode_prompts

CONTENDERS = ("packed", "cut", "whole")
CLASSES = (300, 65, 10)
WHOLE_UP_TO = 65
"""With more classes, only bench_step.py measures the whole tower, which takes many seconds."""
if os.environ.get("UEO_FAST_BENCH_CASES") == "tiny":
    CLASSES = (4,)


@functools.lru_cache(maxsize=1)
def model():
    import open_clip

    configuration = open_clip.get_model_config("RN50")
    configuration["vision_cfg"].update(layers=(1, 1, 1, 1), width=16, image_size=32)
    if max(CLASSES) < 10:
        configuration["text_cfg"].update(width=64, heads=4, layers=2)
    torch.manual_seed(0)
    return open_clip.CLIP(**configuration, quick_gelu=True).eval().requires_grad_(False)


class TextStep:
    """Features, then the context's gradient; ``rows`` is the number of positions computed."""

    def __init__(self, name: str, classes: int) -> None:
        from open_clip import SimpleTokenizer

        from ueo_fast.finetune.clip.prompt import PromptLearner

        names = step_cases.class_names(classes)
        self.whole = name == "whole"
        made = Prompts if self.whole else PromptLearner
        self.prompts = made(model(), SimpleTokenizer(), names)
        self.rows = self.prompts.tokens.numel()
        if name == "packed":
            own = len(self.prompts.packed_rows)
            self.rows = len(self.prompts.prefix) + len(self.prompts.context) + own
        elif name == "cut":
            self.prompts.packed_rows = None
        self.upstream = torch.randn(classes, 1024, generator=torch.Generator().manual_seed(1))

    def __call__(self) -> tuple[Tensor, Tensor]:
        features = encode_prompts(model(), self.prompts) if self.whole else self.prompts()
        (gradient,) = torch.autograd.grad(features, self.prompts.context, self.upstream)
        return features.detach(), gradient


def contender(name: str, classes: int) -> turns.Run | None:
    if name == "whole" and classes > WHOLE_UP_TO:
        return None
    step = TextStep(name, classes)
    if name != "packed":
        for ours, theirs in zip(TextStep("packed", classes)(), step(), strict=True):
            assert float((ours - theirs).norm() / theirs.norm()) < 1e-3
    return step


@pytest.fixture(scope="module")
def prepared():
    return turns.Prepared(contender, warm_up=0)


@pytest.mark.skipif(
    visual_cases.unavailable_reason() is not None, reason=str(visual_cases.unavailable_reason())
)
@pytest.mark.parametrize("name", CONTENDERS)
@pytest.mark.parametrize("repeat", range(turns.REPEATS))
@pytest.mark.parametrize("classes", CLASSES)
def test_text_forward_backward(benchmark, prepared, classes, repeat, name):
    ready = prepared.get(classes, name)
    if ready is None:
        pytest.skip(f"{name} takes too long with {classes} classes")
    run, seconds = ready
    benchmark.group = str(classes)
    benchmark.extra_info.update(classes=classes, rows=run.rows, contender=name, repeat=repeat)
    benchmark.pedantic(run, rounds=turns.calls(seconds, least=1))
