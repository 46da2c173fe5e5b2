"""The gradient of a whole batch's loss, with the activations of a part of it in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

import torch
from torch import Tensor

Part = TypeVar("Part")


class GradCache(Generic[Part]):
    """Accumulate the exact gradient of a loss that couples the samples of a batch.

    ``ueo_loss`` is not a mean over samples: it normalises the confidences over the batch and takes
    the entropy of the batch's mean prediction. Adding up the gradients of parts, as ordinary
    gradient accumulation does, therefore minimises another loss. Exact is, by the chain rule: the
    features of all parts without a graph, the loss of the whole batch with these features as its
    leaves, and then each part once more, which passes its share of the features' gradient on::

        cache = GradCache(encode_image, images.split(32))
        logits = scale * cache.features @ text_features.T
        ueo_loss(logits, confidence).backward()  # of the text, the scale, and cache.features
        cache.backward()                         # of what encode_image trains
        optimizer.step()

    The activations of one part are held at a time, and all inputs and features; the price is one
    more forward pass. The result is that of the whole batch up to rounding, provided that
    ``encode`` treats each sample by itself (no batch norm in training mode). Random numbers
    (dropout) are the same in both passes. Autocast belongs inside ``encode``, a ``GradScaler``
    around the loss.

    Args:
        encode: from a part to its features (b, ...), as a tensor.
        parts: the batch in parts: whatever ``encode`` takes.

    Attributes:
        features: (B, ...) of all parts, a leaf of the graph that requires a gradient.

    Raises:
        TypeError: ``parts`` is one tensor, whose parts would be its rows.
        ValueError: there are no parts.

    Source: Gao et al., *Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup*,
    2021, arXiv 2101.06983, section 3.2.
    """

    def __init__(self, encode: Callable[[Part], Tensor], parts: Iterable[Part]) -> None:
        if isinstance(parts, Tensor):
            raise TypeError("parts is one tensor: split it, e.g. images.split(32)")
        self._encode = encode
        self._parts = list(parts)
        if not self._parts:
            raise ValueError("parts must not be empty: pass e.g. images.split(32)")
        self._random: list[tuple[Tensor, Tensor | None]] = []
        features = []
        with torch.no_grad():
            for part in self._parts:
                on_cpu, on_gpu = torch.get_rng_state(), _gpu_rng_state()
                self._random.append((on_cpu, on_gpu))
                features.append(encode(part))
        self._sizes = [len(value) for value in features]
        self.features = torch.cat(features).detach().requires_grad_()

    def backward(self) -> None:
        """Add the gradients of ``encode``'s parameters to their ``.grad``, and clear ``features``'.

        Raises:
            RuntimeError: the loss was not differentiated by ``features``, or not again since the
                last call.
        """
        gradient = self.features.grad
        if gradient is None:
            raise RuntimeError(
                "features have no gradient yet: compute the loss from cache.features and call "
                "loss.backward() before cache.backward()"
            )
        shares = gradient.split(self._sizes)
        for part, share, (on_cpu, on_gpu) in zip(self._parts, shares, self._random, strict=True):
            gpus = [] if on_gpu is None else [torch.cuda.current_device()]
            with torch.random.fork_rng(devices=gpus):
                torch.set_rng_state(on_cpu)
                if on_gpu is not None:
                    torch.cuda.set_rng_state(on_gpu)
                features = self._encode(part)
            # Where encode has nothing to train (a frozen tower) nothing is added.
            if features.requires_grad or not torch.is_grad_enabled():
                features.backward(share)
        self.features.grad = None  # a second call would add the same once more


def _gpu_rng_state() -> Tensor | None:
    """Of the current GPU; None where none is in use."""
    return torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
