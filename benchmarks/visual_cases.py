"""The towers and the contenders of the visual step's benchmarks: time and memory, CPU and GPU."""

from __future__ import annotations

import copy
import functools
import importlib.metadata
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.cases import DTYPES

CONTENDERS = ("patched", "eager", "compile")
FEATURES_OFF = {"float32": 1e-3, "bfloat16": 0.05}
GRADIENTS_OFF = {"float32": 0.05, "bfloat16": 0.5}
"""Relative to eager's: only enough to tell a wrong tower from a right one. Where a sum is 0 up to
rounding, a ReLU passes a gradient in one and not in the other, fifty layers deep."""


@dataclass(frozen=True)
class VisualCase:
    """``dtype``: bfloat16 is autocast; parameters are float32."""

    model: str
    batch: int
    layout: str = "contiguous"
    dtype: str = "float32"
    pixels: int = 224

    @property
    def key(self) -> dict[str, object]:
        """Its columns in a CSV."""
        return {name: getattr(self, name) for name in ("model", "batch", "layout", "dtype")}

    def __str__(self) -> str:
        return "-".join(map(str, self.key.values()))


CASES = (
    VisualCase("RN50", 16),
    VisualCase("RN50", 16, "channels_last"),
    VisualCase("RN50", 16, "channels_last", "bfloat16"),
    VisualCase("RN50", 1),
    VisualCase("ViT-B-16", 4),
    VisualCase("ViT-B-16", 4, "contiguous", "bfloat16"),
)
COMPILED = (CASES[0], CASES[2])
"""torch.compile takes half a minute each, so the others go without it on a CPU."""
MEMORY_CASES = (CASES[0], CASES[2], VisualCase("ViT-B-16", 16), CASES[4], CASES[5])
GPU_CASES = (
    VisualCase("RN50", 64, "contiguous", "bfloat16"),
    VisualCase("RN50", 64, "channels_last", "bfloat16"),
    VisualCase("RN50", 64, "channels_last"),
    VisualCase("ViT-B-16", 64, "contiguous", "bfloat16"),
)
DRY_CASES = (VisualCase("tiny", 2, pixels=32), VisualCase("tiny", 2, "channels_last", pixels=32))


def unavailable_reason() -> str | None:
    """Why no tower is available; None if one is."""
    if importlib.util.find_spec("open_clip") is None:
        return "open_clip is not installed"
    return None


def version() -> str:
    return importlib.metadata.version("open_clip_torch")


def _new_model(name: str) -> nn.Module:
    import open_clip

    configuration = open_clip.get_model_config("RN50" if name == "tiny" else name)
    vision, text = configuration["vision_cfg"], configuration["text_cfg"]
    if name == "tiny":
        vision.update(layers=(1, 1, 1, 1), width=16, image_size=32)
    text.update(vocab_size=16, layers=1)  # unused here
    return open_clip.CLIP(**configuration)


@functools.lru_cache(maxsize=1)
def model(name: str) -> nn.Module:
    """Random weights, statistics of its own activations, and no branch multiplied by zero."""
    torch.manual_seed(0)
    made = _new_model(name)
    visual = made.visual
    for path, module in visual.named_modules():
        if isinstance(module, nn.BatchNorm2d | nn.LayerNorm):
            # A residual branch's last norm starts at zero, and is small in a trained tower too.
            low = 0.1 if path.endswith("bn3") else 0.5
            nn.init.uniform_(module.weight, low, 2 * low)
            nn.init.normal_(module.bias, std=0.1)
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    if any(isinstance(module, nn.BatchNorm2d) for module in visual.modules()):
        with torch.no_grad():
            visual.train()(torch.randn(4, 3, visual.image_size, visual.image_size))
    return made.eval()


def trained_parameters(of: nn.Module, everything: bool) -> list[nn.Parameter]:
    """The tower's affines, or all its parameters; the rest is frozen."""
    from ueo_fast import affine_parameters

    of.requires_grad_(False)
    chosen = of.visual.parameters() if everything else affine_parameters(of).values()
    return [parameter.requires_grad_() for parameter in chosen]


class Step:
    """Forward and backward of a tower: features, then the gradients of what is trained."""

    def __init__(self, name: str, case: VisualCase, device: torch.device) -> None:
        """``name``: patched, eager, compile, or everything (eager, the whole tower trained)."""
        made = copy.deepcopy(model(case.model)).to(device)
        channels_last = case.layout == "channels_last"
        format = torch.channels_last if channels_last else torch.contiguous_format
        made = made.to(memory_format=format)
        self.parameters = trained_parameters(made, everything=name == "everything")
        self.case = case
        self.visual: Callable[[Tensor], Tensor] = made.visual
        if name == "patched":
            from ueo_fast import patch_visual

            self.handle = patch_visual(made)
            self.visual = made.visual
        if name == "compile":
            torch.compiler.reset()
            self.visual = torch.compile(made.visual, dynamic=False)
        generator = torch.Generator().manual_seed(1)
        images = torch.randn(case.batch, 3, case.pixels, case.pixels, generator=generator)
        self.images = images.to(device, memory_format=format)
        with torch.no_grad():
            features = self.forward()
        self.upstream = torch.randn(features.shape, generator=generator).to(features)

    def forward(self) -> Tensor:
        half = self.case.dtype != "float32"
        with torch.autocast(self.images.device.type, DTYPES[self.case.dtype], enabled=half):
            return self.visual(self.images)

    def __call__(self) -> tuple[Tensor, ...]:
        features = self.forward()
        grads = torch.autograd.grad(features, self.parameters, self.upstream)
        return features.detach(), *grads


def disagreement(ours: tuple[Tensor, ...], true: tuple[Tensor, ...], case: VisualCase) -> str:
    """Say what is wrong with a contender's features or gradients; empty if nothing is."""
    flat = [torch.cat([grad.flatten().float() for grad in grads[1:]]) for grads in (ours, true)]
    for name, limits, found, expected in (
        ("features", FEATURES_OFF, ours[0].float(), true[0].float()),
        ("gradients", GRADIENTS_OFF, *flat),
    ):
        difference = float((found - expected).norm() / expected.norm())
        rounding = 5 if found.is_cuda else 1  # a GPU's convolutions round to TensorFloat-32
        if not difference <= rounding * limits[case.dtype]:
            return f"wrong: {name} off by {difference:.2g}"
    return ""
