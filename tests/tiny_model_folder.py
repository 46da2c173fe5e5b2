"""The demonstration's tiny CLIP as a folder that open_clip loads: ``local-dir:FOLDER``."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import safetensors.torch
from open_clip.model import CLIP

from ueo_fast.finetune.demo.digits import DIGIT_NAMES, load_digits
from ueo_fast.finetune.demo.tiny_clip import (
    CONTEXT_LENGTH,
    EMBED_DIM,
    TOWERS,
    pretrain,
    tiny_clip,
    tiny_tokenizer,
)

# As the demonstration's images: 32 x 32 in [-1, 1].
PREPROCESS = {"size": 32, "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bilinear"}
WEIGHTS = "open_clip_model.safetensors"


def tiny_model_cfg(tower: str) -> dict[str, object]:
    """What open_clip calls a model config: enough to build ``tiny_clip(tower, seed)``."""
    vision = dataclasses.asdict(TOWERS[tower])
    defaults = dataclasses.asdict(type(TOWERS[tower])())
    return {
        "embed_dim": EMBED_DIM,
        "vision_cfg": {name: value for name, value in vision.items() if value != defaults[name]},
        "text_cfg": {"context_length": CONTEXT_LENGTH, "width": 64, "heads": 4, "layers": 2},
    }


def save_tiny_clip(folder: Path, tower: str = "bn", seed: int = 0, pretrain_steps: int = 0) -> Path:
    """Write ``open_clip_config.json`` and the weights (13 MB) into ``folder``; returns it.

    Args:
        folder: made where it does not exist.
        tower: ``"bn"`` or ``"vit"``.
        seed: of the initial weights.
        pretrain_steps: on scikit-learn's digits and their captions ("a photo of a three."); 60 take
            some seconds and tell most digits apart, 0 leaves the weights random.
    """
    model = tiny_clip(tower, seed)
    if pretrain_steps:
        digits = load_digits()
        pretrain(
            model,
            tiny_tokenizer(),
            digits.images,
            digits.labels,
            DIGIT_NAMES,
            steps=pretrain_steps,
            seed=seed,
        )
    return save_as_local_dir(folder, model, tiny_model_cfg(tower))


def save_as_local_dir(folder: Path, model: CLIP, model_cfg: dict[str, object]) -> Path:
    """Any model of open_clip, with the config that it was built from."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"model_cfg": model_cfg, "preprocess_cfg": PREPROCESS}
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2))
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    safetensors.torch.save_file(state, folder / WEIGHTS)
    return folder
