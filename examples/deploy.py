"""Put an adapted model into one file that runs with PyTorch alone.

    python examples/deploy.py delta.safetensors classifier.pt2 RN50 openai

Prompt and text tower become one matrix of class embeddings; the image tower is exported with it.
What loads the file needs neither ueo_fast nor open_clip, only images preprocessed as at training.
"""

import json
import sys

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from ueo_fast.finetune.clip.delta import load_delta, read_delta
from ueo_fast.finetune.clip.load import load_clip

delta, out, *model_and_weights = sys.argv[1:]
clip = load_clip(*model_and_weights)
# Not patched: the patch serves training, and its operators would be needed to load the file.
adapted = load_delta(clip.model, delta, tokenizer=clip.tokenizer, patch=False).requires_grad_(False)


class Classifier(nn.Module):
    """Images (B, 3, H, W) to probabilities (B, C) and MCM scores (B,)."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = adapted.model.visual
        self.register_buffer("classes", adapted.text_features())  # (C, E)
        self.register_buffer("scale", adapted.logit_scale)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        cosines = normalize(self.tower(images), dim=-1) @ self.classes.T
        return (self.scale * cosines).softmax(dim=1), cosines.softmax(dim=1).amax(dim=1)


size = clip.preprocess_cfg["size"]
height, width = (size, size) if isinstance(size, int) else size
program = torch.export.export(
    Classifier().eval(),
    (torch.zeros(2, 3, height, width),),
    dynamic_shapes=({0: torch.export.Dim("batch", max=1024)},),
)
facts = {"classes": read_delta(delta).class_names, "preprocess": clip.preprocess_cfg}
torch.export.save(program, out, extra_files={"facts.json": json.dumps(facts)})

# What a server does:
#     files = {"facts.json": ""}
#     classify = torch.export.load("classifier.pt2", extra_files=files).module()
#     probabilities, mcm = classify(images)
print(f"saved: {out}, {len(facts['classes'])} classes, images of {height} x {width} pixels")
