"""The classifier that is adapted, CLIP's visual tower against learned prompts; what may change."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ueo_fast.finetune.clip.prompt import PromptLearner
from ueo_fast.finetune.clip.template import split_template
from ueo_fast.finetune.data.transforms import normalize, pixel_statistics
from ueo_fast.patch import PatchHandle, affine_parameters, freeze_all_but_affine, patch_visual
from ueo_fast.patch.sites import is_norm
from ueo_fast.ranges import check_number

CONTEXT = "prompt.context"
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
_HALF = (torch.float16, torch.bfloat16)
_FIRST_STATE = "_ueo_fast_first_state"


class Similarities(NamedTuple):
    """What the classifier says about a batch of B images and C classes.

    Attributes:
        cosines: (B, C) cosine of image and text features, in [-1, 1].
        logits: (B, C) temperature times ``cosines``: 100 x cosine for OpenAI's CLIP.
    """

    cosines: Tensor
    logits: Tensor


class ClipClassifier(nn.Module):
    """CLIP's visual tower and a :class:`PromptLearner` as one classifier.

    Trainable are the prompt's context and the affine parameters of the visual tower's
    normalisation layers; every other weight is frozen, the temperature included. ``model`` is
    changed in place (``requires_grad`` flags, half-precision weights become float32, and the patch,
    which ``patch_handle.undo()`` reverts): pass a deep copy to keep the original.

    Weights are float32 because a learning rate of 1e-4 times a small gradient is lost when it is
    added to a float16 weight. For speed run the forward pass under ``torch.autocast``.

    Args:
        model: any open_clip model with an image and a text tower (``CLIP``, ``CustomTextCLIP``).
        prompt: the prompt learner built on the same ``model``.
        scope: which affine parameters are trained: ``"all"`` normalisation layers, or the
        ``"authors"``' rule (names containing ``bn`` or ``ln``).
        patch: run the visual tower with the fused layers of :func:`ueo_fast.patch_visual`, which
            need less time and memory and give the same result to rounding.
        logit_scale: temperature that multiplies the cosines; ``None``: the model's own.

    Raises:
        ValueError: ``logit_scale`` is not positive.

    Source: authors' ``demo.py``, ``train_clip`` and ``VisualEncoder``.
    """

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(
        self,
        model: nn.Module,
        prompt: PromptLearner,
        *,
        scope: str = "all",
        patch: bool = True,
        logit_scale: float | None = None,
    ) -> None:
        super().__init__()
        if logit_scale is not None:
            check_number("logit_scale", logit_scale, sign="positive")
        self.fixed_logit_scale = logit_scale
        self.model: Any = model
        self.prompt = prompt
        for tensor in itertools.chain(self.parameters(), self.buffers()):
            if tensor.dtype in _HALF:
                tensor.data = tensor.data.float()
        self.scope = scope
        freeze_all_but_affine(model, scope)
        prompt.context.requires_grad_(True)
        for name, value in zip(("mean", "std"), pixel_statistics(model), strict=True):
            self.register_buffer(f"pixel_{name}", value.to(prompt.context.device), persistent=False)
        self.eval()
        # On the model, so that a copy of it has it as well.
        if not hasattr(model, _FIRST_STATE):
            setattr(model, _FIRST_STATE, _norms_digest(model))
        self.patch_handle: PatchHandle | None = patch_visual(model) if patch else None

    @property
    def was_adapted(self) -> bool:
        """Whether the tower's norms have changed since ``model`` first became a classifier."""
        return bool(_norms_digest(self.model) != getattr(self.model, _FIRST_STATE))

    @property
    def logit_scale(self) -> Tensor:
        """Temperature that multiplies the cosines, 0-d. A bias on the logits (SigLIP) is the same
        for every class and changes no softmax, so it is left out."""
        if self.fixed_logit_scale is not None:
            return self.model.logit_scale.detach().new_full((), self.fixed_logit_scale)
        return self.model.logit_scale.detach().exp().reshape(())

    def prompt_parameters(self) -> list[nn.Parameter]:
        """The prompt's context, trained or not."""
        return list(self.prompt.parameters())

    def affine_parameters(self) -> list[nn.Parameter]:
        """Affine parameters of the visual tower in ``scope``, trained or not."""
        return list(affine_parameters(self.model, self.scope).values())

    def text_features(self) -> Tensor:
        """(C, E) float32, L2-normalised features of the class prompts."""
        return self.prompt()

    def image_features(self, images: Tensor) -> Tensor:
        """(B, E) L2-normalised features; float32 under autocast too.

        Args:
            images: (B, 3, H, W), preprocessed as the model expects; uint8 are pixels, which are
                normalised here. Features (B, E) of an earlier pass are returned as they are.
        """
        if images.ndim == 2:
            return images
        if images.dtype == torch.uint8:
            images = normalize(images, self.pixel_mean, self.pixel_std)
        features: Tensor = self.model.encode_image(images)
        if features.dtype in _HALF:
            features = features.float()
        return F.normalize(features, dim=-1)

    def forward(self, images: Tensor, text_features: Tensor | None = None) -> Similarities:
        """Compare every image with every class.

        Args:
            images: as for :meth:`image_features`.
            text_features: (C, E) from :meth:`text_features`, where they do not change between
                calls (evaluation, frozen prompt); ``None`` computes them.
        """
        text = self.text_features() if text_features is None else text_features
        return self.compare(self.image_features(images), text)

    def compare(self, image_features: Tensor, text_features: Tensor) -> Similarities:
        """Cosines and logits of features (B, E) and (C, E), both L2-normalised."""
        cosines = image_features @ text_features.to(image_features.dtype).T
        return Similarities(cosines, self.logit_scale.to(cosines.dtype) * cosines)


@torch.no_grad()
def _norms_digest(model: Any) -> str:
    """A hash of the parameters and statistics of the tower's norms."""
    digest = hashlib.blake2b(digest_size=16)
    for module in filter(is_norm, model.visual.modules()):
        own = (module.parameters(recurse=False), module.buffers(recurse=False))
        for tensor in itertools.chain(*own):
            flat = tensor.cpu().contiguous().reshape(-1)
            digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def tower_tensors(model: Any, scope: str) -> dict[str, Tensor]:
    """The visual tower's own tensors that a method may change, in a fixed order.

    The affine parameters in ``scope`` and the statistics of all BatchNorms (for AdaBN and Tent),
    under their names in ``model.state_dict()``.
    """
    tensors: dict[str, Tensor] = dict(affine_parameters(model, scope))
    for path, module in model.visual.named_modules(prefix="visual"):
        if isinstance(module, _BatchNorm):
            own = {f"{path}.{name}": getattr(module, name) for name in _STATISTICS}
            tensors |= {name: value for name, value in own.items() if value is not None}
    return tensors


def adapted_tensors(classifier: ClipClassifier) -> dict[str, Tensor]:
    """The classifier's own tensors that a method may change, in a fixed order.

    The prompt's context as ``prompt.context``, and :func:`tower_tensors`.
    """
    context: dict[str, Tensor] = {CONTEXT: classifier.prompt.context}
    return context | tower_tensors(classifier.model, classifier.scope)


def adapted_state(classifier: ClipClassifier) -> dict[str, Tensor]:
    """Copies of :func:`adapted_tensors` on the CPU."""
    return {
        name: tensor.detach().to("cpu", copy=True).contiguous()
        for name, tensor in adapted_tensors(classifier).items()
    }


def check_adapted_state(tensors: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Compare names and shapes of ``state`` with those of ``tensors``.

    Raises:
        ValueError: they differ; the message names the first tensor that is missing, too many, or of
            another shape.
    """
    missing, extra = tensors.keys() - state.keys(), state.keys() - tensors.keys()
    if missing or extra:
        what = "lacks" if missing else "has"
        raise ValueError(
            f"the adapted state {what} {min(missing or extra)!r} ({len(missing)} missing, "
            f"{len(extra)} too many): it is of another model, or of another scope of affine "
            "parameters"
        )
    for name, tensor in tensors.items():
        if state[name].shape != tensor.shape:
            raise ValueError(
                f"{name!r} has shape {tuple(state[name].shape)} in the adapted state, but "
                f"{tuple(tensor.shape)} in this model"
            )


@torch.no_grad()
def load_adapted_state(classifier: ClipClassifier, state: Mapping[str, Tensor]) -> None:
    """Put a state back, in place; it fits (:func:`check_adapted_state`), or nothing changes."""
    tensors = adapted_tensors(classifier)
    check_adapted_state(tensors, state)
    for name, tensor in tensors.items():
        tensor.copy_(state[name])


def make_classifier(
    model: nn.Module,
    tokenizer: Callable[..., Tensor],
    class_names: Sequence[str],
    *,
    template: str = "a photo of a {}.",
    scope: str = "all",
    patch: bool = True,
    logit_scale: float | None = None,
) -> ClipClassifier:
    """The zero-shot classifier that every method starts from. ``model`` is changed in place."""
    context, suffix = split_template(template)
    prompt = PromptLearner(model, tokenizer, class_names, context=context, suffix=suffix)
    return ClipClassifier(model, prompt, scope=scope, patch=patch, logit_scale=logit_scale)
