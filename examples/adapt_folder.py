"""Adapt CLIP to a folder of unlabelled photos, look at the result, and save it.

    python examples/adapt_folder.py photos names.txt delta.safetensors RN50 openai

`ueo-fast finetune` does the same with a report, checkpoints and a hundred choices.
"""

import sys
from collections import Counter
from pathlib import Path

from ueo_fast.finetune import adapt
from ueo_fast.finetune.clip.load import load_clip
from ueo_fast.finetune.engine.training_config import TrainerConfig

folder, names_file, delta, *model_and_weights = sys.argv[1:]
names = Path(names_file).read_text().splitlines()

clip = load_clip(*model_and_weights)  # a name and a tag of open_clip, or a folder with a model
budget = TrainerConfig(epochs=10)  # the authors take 50
result = adapt(clip.model, clip.tokenizer, folder, names, config=budget)

prediction = result.predict()
print(prediction)
for name, reason in prediction.unreadable:
    print(f"left out: {name}: {reason}")

known = Counter(c for c, k in zip(prediction.classes, prediction.known, strict=True) if k)
for label, count in known.most_common():
    print(f"{count:6} {label}")

least = prediction.mcm.argsort()[:5].tolist()
print("most likely none of these:", ", ".join(prediction.names[position] for position in least))

print("saved:", result.save(delta, clip.base))  # a few hundred kB; the base model is not in it
