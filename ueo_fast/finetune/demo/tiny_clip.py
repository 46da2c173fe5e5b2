"""A CLIP small enough to pre-train on a laptop in seconds, made of open_clip's own classes."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from open_clip.tokenizer import SimpleTokenizer
from torch import Tensor

from ueo_fast.finetune.data.loader import seeded_torch

OnStep = Callable[[int, int, float], None]
"""Called after each step with (steps done, steps in all, loss)."""

CONTEXT_LENGTH = 16
EMBED_DIM = 64

TOWERS = {
    # A ModifiedResNet, as CLIP's RN50: 19 BatchNorms.
    "bn": CLIPVisionCfg(layers=(1, 1, 1, 1), width=16, image_size=32, head_width=64),
    # A ViT, as CLIP's ViT-B-16: LayerNorms only.
    "vit": CLIPVisionCfg(layers=3, width=64, head_width=16, patch_size=8, image_size=32),
}

# Several wordings, so that the text tower sees more than one context. The adaptation starts from
# the first one.
CAPTIONS = (
    "a photo of a {}.",
    "a picture of the digit {}.",
    "a handwritten {}.",
    "the number {}.",
)


@functools.cache  # reading the vocabulary takes longer than building the model
def tiny_tokenizer() -> SimpleTokenizer:
    """CLIP's own BPE tokenizer (it ships with open_clip), for captions of up to 16 tokens."""
    return SimpleTokenizer(context_length=CONTEXT_LENGTH)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one CPU thread, then restore the number of threads.

    Training amplifies rounding: another number of threads gives another model, whose zero-shot
    accuracy under a shift was up to 25 points away.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def tiny_clip(tower: str, seed: int) -> CLIP:
    """An untrained CLIP with a two-layer text tower and the image tower ``bn`` or ``vit``.

    Args:
        tower: ``"bn"`` (ModifiedResNet) or ``"vit"``.
        seed: seed of the initial weights; the global random state stays as it was.

    Raises:
        ValueError: unknown tower.
    """
    if tower not in TOWERS:
        raise ValueError(f"unknown tower {tower!r}: choose one of {', '.join(TOWERS)}")
    text = CLIPTextCfg(context_length=CONTEXT_LENGTH, width=64, heads=4, layers=2)
    with seeded_torch(seed):
        return CLIP(EMBED_DIM, TOWERS[tower], text)


def pretrain(
    model: CLIP,
    tokenizer: SimpleTokenizer,
    images: Tensor,
    labels: Tensor,
    class_names: Sequence[str],
    *,
    steps: int,
    batch_size: int = 64,
    learning_rate: float = 1e-3,
    seed: int = 0,
    on_step: OnStep | None = None,
) -> float:
    """Train ``model`` in place on images and their captions, with CLIP's image-to-text loss.

    A batch has far more images than there are classes, so most of its captions are the same
    sentence: each distinct caption is encoded once and is one candidate. Runs on one thread.

    Args:
        model: from :func:`tiny_clip`.
        tokenizer: from :func:`tiny_tokenizer`.
        images: (N, 3, 32, 32) in [-1, 1].
        labels: (N,) position in ``class_names``.
        class_names: the words that fill the captions.
        steps: optimiser steps.
        batch_size: images per step, drawn with replacement.
        learning_rate: peak of AdamW's one-cycle schedule.
        seed: seed of the batches and their augmentation.
        on_step: called after each step with (steps done, steps in all, loss).

    Returns:
        Mean loss of the last ten steps. The model is left in evaluation mode.
    """
    generator = torch.Generator().manual_seed(seed)
    captions = [tokenizer([caption.format(name) for name in class_names]) for caption in CAPTIONS]
    # Random token vectors do as well as trained ones here, and AdamW over 49,408 of them would cost
    # more than the rest of the step.
    model.token_embedding.requires_grad_(False)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps)
    losses: list[float] = []
    model.train()
    with one_thread():
        for step in range(steps):
            rows = torch.randint(len(images), (batch_size,), generator=generator)
            image = model.encode_image(_augment(images[rows], generator), normalize=True)
            text = model.encode_text(captions[step % len(captions)], normalize=True)
            logits = model.logit_scale.exp() * image @ text.T
            loss = F.cross_entropy(logits, labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(float(loss.detach()))
            if on_step is not None:
                on_step(step + 1, steps, losses[-1])
    model.eval()
    return sum(losses[-10:]) / len(losses[-10:])


def _augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Shift each batch by up to two pixels: digits are centred, photographs are not."""
    down, right = (torch.randint(-2, 3, (2,), generator=generator)).tolist()
    return torch.roll(images, (down, right), dims=(2, 3))
