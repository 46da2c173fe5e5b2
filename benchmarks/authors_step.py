"""UEO's training step as its authors published it, in plain PyTorch: the baseline of ours.

Rewritten from their released code (tim-learn/UEO, demo.py, ``train_clip``) for an unpatched
open_clip model. It is independent: it imports nothing from ueo_fast. What they do:

- All C prompts go through the whole text tower in every step, at its full length (77 tokens).
- Trained are a context that all classes share, and every visual parameter with ``bn`` or ``ln`` in
  its name. SGD without momentum, cosine to 0 over all steps, the model in evaluation mode.
- Confidence: the maximum softmax of the zero-shot model's cosines (scale 1), once, un-augmented.
- Logits are 100 times the cosines; the logarithm is of p + 1e-5; the mean prediction is weighted by
  1 / confidence through a diagonal B x B matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

CONTEXT = "a photo of a"
SCALE = 100.0
EPS = 1e-5


class Prompts(nn.Module):
    """Token embeddings of all prompts, (C, L, D): start, context, then the rest as it is."""

    def __init__(self, model: Any, tokenizer: Callable[..., Tensor], names: Sequence[str]) -> None:
        super().__init__()
        words = len(CONTEXT.split())
        sentences = [f"{CONTEXT} {name.replace('_', ' ')}." for name in names]
        self.tokens = tokenizer(sentences, context_length=model.positional_embedding.shape[0])
        with torch.no_grad():
            embedded = model.token_embedding(self.tokens)
        self.context = nn.Parameter(embedded[0, 1 : 1 + words].clone())
        self.register_buffer("start", embedded[:, :1])
        self.register_buffer("rest", embedded[:, 1 + words :])

    def forward(self) -> Tensor:
        context = self.context.expand(len(self.tokens), -1, -1)
        return torch.cat([self.start, context, self.rest], dim=1)


def unit(features: Tensor) -> Tensor:
    return features / features.norm(dim=-1, keepdim=True)


def encode_prompts(model: Any, prompts: Prompts) -> Tensor:
    """(C, E) features of norm 1: every position of every prompt through the whole tower."""
    x = prompts() + model.positional_embedding
    x = model.ln_final(model.transformer(x, attn_mask=model.attn_mask))
    ends = prompts.tokens.argmax(dim=-1)
    return unit(x[torch.arange(len(x)), ends] @ model.text_projection)


def entropy(p: Tensor) -> Tensor:
    """Over the last dimension, with the authors' guard against log 0."""
    return -(p * torch.log(p + EPS)).sum(dim=-1)


def universal_entropy(logits: Tensor, weight: Tensor, trade_off: float = 1.0) -> Tensor:
    """The loss of a batch: logits (B, C), confidence (B,)."""
    p = logits.softmax(dim=1)
    inverse = 1 / weight
    mean = torch.mm(torch.diag(inverse), p).sum(dim=0) / inverse.sum()
    conditional = (entropy(p) * weight).sum() / weight.sum()
    return conditional - trade_off * entropy(mean)


def confidence(cosines: Tensor) -> Tensor:
    """(N, C) to (N,)."""
    return cosines.softmax(dim=1).amax(dim=1)


class AuthorsTraining:
    """The authors' model, loss and optimiser.

    Args:
        model: an open_clip CLIP, not patched; changed in place.
        tokenizer: its tokenizer.
        names: the known classes.
        steps: in all; the schedule's length.
        prompt_lr: learning rate of the context.
        affine_lr: learning rate of the visual tower's ``bn`` and ``ln`` parameters.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Callable[..., Tensor],
        names: Sequence[str],
        *,
        steps: int,
        prompt_lr: float = 1e-4,
        affine_lr: float = 1e-4,
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.prompts = Prompts(model, tokenizer, names).eval()
        self.affine = {
            name: parameter.requires_grad_()
            for name, parameter in model.visual.named_parameters()
            if "bn" in name or "ln" in name
        }
        groups = [{"params": [self.prompts.context], "lr": prompt_lr}]
        groups += [{"params": [parameter], "lr": affine_lr} for parameter in self.affine.values()]
        self.optimizer = torch.optim.SGD(groups)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, steps)

    def image_features(self, images: Tensor) -> Tensor:
        return unit(self.model.visual(images))

    def text_features(self) -> Tensor:
        return encode_prompts(self.model, self.prompts)

    def loss(self, image: Tensor, text: Tensor, weight: Tensor) -> Tensor:
        return universal_entropy(SCALE * image @ text.T, weight)

    def step(self, images: Tensor, weight: Tensor) -> float:
        """One step on a batch and its confidence; the loss before it."""
        value = self.loss(self.image_features(images), self.text_features(), weight)
        self.optimizer.zero_grad()
        value.backward()
        self.optimizer.step()
        self.schedule.step()
        return value.item()
