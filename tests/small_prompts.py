"""Small CLIPs, class names and prompts for the tests of the prompt learner."""

from __future__ import annotations

from typing import Any

import open_clip
import torch
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from torch import nn

CONTEXT, WIDTH, EMBED = 20, 32, 24
VISION = CLIPVisionCfg(image_size=16, patch_size=8, width=16, layers=1, head_width=16)
SIZES = {"context_length": CONTEXT, "width": WIDTH, "heads": 2, "layers": 2}
NAMES = ["dog", "The_Great_Wall_of_China", "t-shirt", "cruise_ship"]
PROMPTS = [
    "a photo of a dog.",
    "a photo of a The Great Wall of China.",
    "a photo of a t-shirt.",
    "a photo of a cruise ship.",
]

tokenizer = open_clip.SimpleTokenizer()


def small_clip(cls: type[nn.Module] = CLIP, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return cls(EMBED, VISION, CLIPTextCfg(**SIZES, **options)).eval().requires_grad_(False)
