"""Use ueo_loss with Hugging Face Accelerate, which chooses the device and the precision.

    python examples/accelerate_loop.py photos names.txt RN50-quickgelu openai

One process only: ueo_loss compares all images of a batch, so averaging the gradients of several
processes minimises another loss. For a batch that does not fit into memory, use GradCache.
"""

import sys
from pathlib import Path

import open_clip
import torch
from accelerate import Accelerator
from torch.nn.functional import normalize
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

from ueo_fast import GradCache, freeze_all_but_affine, ueo_loss

folder, names_file, *model_and_weights = sys.argv[1:]
names = Path(names_file).read_text().splitlines()

accelerator = Accelerator()  # mixed_precision="bf16" on a GPU
assert accelerator.num_processes == 1, "start this script in one process"

model, _, preprocess = open_clip.create_model_and_transforms(*model_and_weights)
model.eval()  # batch norms keep their running statistics
with torch.no_grad():
    prompts = open_clip.get_tokenizer(model_and_weights[0])([f"a photo of a {n}." for n in names])
    text = normalize(model.encode_text(prompts), dim=-1).to(accelerator.device)  # (C, E)

trained = freeze_all_but_affine(model)  # the scale and shift of the image tower's norms
optimizer = torch.optim.SGD(trained.values(), lr=1e-2)
loader = DataLoader(ImageFolder(folder, preprocess), batch_size=64, shuffle=True)
tower, optimizer, loader = accelerator.prepare(model.visual, optimizer, loader)
tower.eval()

for epoch in range(1, 6):
    for images, _ in loader:  # the labels are not used
        cache = GradCache(tower, images.split(16))  # the tower sees 16 images at a time
        logits = 100 * normalize(cache.features, dim=-1) @ text.T  # (B, C)
        # No confidence given: that of the logits, at the temperature of the paper's score.
        loss = ueo_loss(logits, confidence_scale=0.01)
        accelerator.backward(loss)
        cache.backward()
        optimizer.step()
        optimizer.zero_grad()
    accelerator.print(f"epoch {epoch}: loss {loss.item():.4f}")
