"""Use ueo_loss in a training loop of your own.

    python examples/plain_loop.py photos names.txt RN50-quickgelu openai

Trains the norms of the image tower on unlabelled photos; the text features stay as they are.
"""

import sys
from pathlib import Path

import open_clip
import torch
from PIL import Image
from torch.nn.functional import normalize
from torch.utils.data import DataLoader, StackDataset

from ueo_fast import freeze_all_but_affine, mcm_score, ueo_loss

folder, names_file, *model_and_weights = sys.argv[1:]
names = Path(names_file).read_text().splitlines()

model, _, preprocess = open_clip.create_model_and_transforms(*model_and_weights)
model.eval()  # batch norms keep their running statistics
trained = freeze_all_but_affine(model)  # the scale and shift of the image tower's norms
optimizer = torch.optim.SGD(trained.values(), lr=1e-2)

paths = sorted(Path(folder).rglob("*.png")) + sorted(Path(folder).rglob("*.jpg"))
photos = torch.stack([preprocess(Image.open(path).convert("RGB")) for path in paths])

# Once, with the zero-shot model: text features, and how sure the model is of each photo.
with torch.no_grad():
    prompts = open_clip.get_tokenizer(model_and_weights[0])([f"a photo of a {n}." for n in names])
    text = normalize(model.encode_text(prompts), dim=-1)  # (C, E)
    features = [normalize(model.encode_image(part), dim=-1) for part in photos.split(64)]
    confidence = mcm_score(torch.cat(features) @ text.T)  # (N,)

loader = DataLoader(StackDataset(photos, confidence), batch_size=64, shuffle=True)
for epoch in range(1, 6):
    for images, weights in loader:
        features = normalize(model.encode_image(images), dim=-1)  # (B, E)
        loss = ueo_loss(100 * features @ text.T, weights)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print(f"epoch {epoch}: loss {loss.item():.4f}")
