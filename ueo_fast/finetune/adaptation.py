"""The whole method in one call: a CLIP model and unlabelled images in, a classifier out."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils.data import Dataset

from ueo_fast import mcm_score
from ueo_fast.finetune.clip.base_model import BaseModel, describe_base
from ueo_fast.finetune.clip.delta import save_delta
from ueo_fast.finetune.clip.model import ClipClassifier
from ueo_fast.finetune.clip.prompt import PromptLearner
from ueo_fast.finetune.clip.template import split_template
from ueo_fast.finetune.data.dataset import ImageDataset
from ueo_fast.finetune.data.image_list import ImageList, match_labels, read_images
from ueo_fast.finetune.data.transforms import preprocessing, test_transform, training_transform
from ueo_fast.finetune.engine.hooks import Hooks
from ueo_fast.finetune.engine.trainer import History, TrainerConfig
from ueo_fast.finetune.evaluation.predict import (
    Predicted,
    collect,
    predict_batches,
    predict_cosines,
)
from ueo_fast.finetune.methods.base import Method
from ueo_fast.finetune.methods.registry import make_method
from ueo_fast.finetune.target import Target

Images = str | os.PathLike[str] | ImageList | Dataset[Any] | Tensor
"""A folder, list file or CSV, a list of images, or images that are tensors already."""


class Prediction(NamedTuple):
    """What an adapted classifier says about N images.

    Attributes:
        classes: N names, the most probable class of each.
        probabilities: (N,) float32, of that class.
        mcm: (N,) MCM score; low for images that belong to no class.
        cosines: (N, C) float32, of image and text features.
    """

    classes: tuple[str, ...]
    probabilities: Tensor
    mcm: Tensor
    cosines: Tensor


@dataclass(frozen=True)
class Adaptation:
    """What :func:`adapt` did.

    Attributes:
        classifier: the adapted classifier, in evaluation mode.
        target: the images that could be read, and what the zero-shot model said about them.
        history: one entry per gradient step.
        method: with its choices.
        unreadable: (name, reason) of each image that was left out.
    """

    classifier: ClipClassifier
    target: Target
    history: History
    method: Method
    unreadable: tuple[tuple[str, str], ...] = ()

    def predict(
        self, images: Images | None = None, *, mcm_scale: float = 1.0, **options: Any
    ) -> Prediction:
        """Classes and scores of images, all of which must be readable.

        Args:
            images: as for :func:`adapt`, un-augmented; ``None``: those that it adapted to.
            mcm_scale: multiplies the cosines in the MCM score; 1 is the authors'.
            options: ``batch_size``, ``num_workers``, ``precision``, ``channels_last`` of
                :func:`~ueo_fast.finetune.evaluation.predict.predict_cosines`.
        """
        views = self.target.images if images is None else _views(images, self.classifier).plain
        cosines = predict_cosines(self.classifier, views, **options)
        names = self.classifier.prompt.class_names
        scale = self.classifier.logit_scale.float().cpu()
        probabilities, best = (scale * cosines).softmax(dim=1).max(dim=1)
        classes = tuple(names[index] for index in best.tolist())
        return Prediction(classes, probabilities, mcm_score(cosines, mcm_scale), cosines)

    def save(self, path: str | os.PathLike[str], base: BaseModel | None = None) -> Path:
        """Write what was learnt as a delta (safetensors, some hundred kB).

        Args:
            path: of the file.
            base: name and weights of the model, from ``load_clip`` or ``describe_base(model,
                "RN50", "openai")``; ``None`` records its fingerprint only, which is enough to
                refuse another model.
        """
        base = base or describe_base(self.classifier.model)
        return save_delta(path, self.classifier, base, method=self.method.name)


def adapt(
    model: nn.Module,
    tokenizer: Callable[..., Tensor],
    images: Images,
    class_names: Sequence[str],
    *,
    method: str | Method = "ueo",
    config: TrainerConfig | None = None,
    hooks: Hooks | None = None,
    augmented: Dataset[Any] | None = None,
    labels: Tensor | None = None,
    template: str = "a photo of a {}.",
    scope: str = "all",
    patch: bool = True,
    strict: bool = False,
    eval_batch_size: int = 192,
) -> Adaptation:
    """Adapt a CLIP model to unlabelled images, some of which may belong to no class.

        model, _, _ = open_clip.create_model_and_transforms("RN50", pretrained="openai")
        tokenizer = open_clip.get_tokenizer("RN50")
        result = adapt(model, tokenizer, "photos", ["cat", "dog"])
        print(result.predict().classes)
        result.save("delta.safetensors")

    Args:
        model: any open_clip model with an image and a text tower, on the device where the work is
            to be done. Changed in place; pass a deep copy to keep the original.
        tokenizer: open_clip's tokenizer of that model.
        images: a folder, list file or CSV, or an ``ImageList``: preprocessed and augmented as the
            model and the authors want it; images that cannot be read are left out and listed. Or a
            dataset or tensor (N, 3, H, W) of un-augmented preprocessed images, all readable.
        class_names: the known classes, C of them.
        method: a name (``ueo``, ``infomax``, ``entmin``, ``adabn``, ``tent``, ``upl``, ``pouf``,
            ``dance``, ``oracle``, ``zeroshot``) or a method with choices, e.g. ``UEO(eps=1e-5)``.
        config: budget and optimiser; ``None`` takes the authors'.
        hooks: who is told of each step, and where checkpoints go.
        augmented: with a dataset: the same images, drawn anew each time they are asked for.
        labels: with a dataset: (N,) int64 position in ``class_names``, -1 for unknown. Only the
            oracle looks at them; labels of a folder or list are found by themselves.
        template: ``{}`` is the class name; the words before it are where the context starts.
        scope: which affine parameters are trained, see :func:`ueo_fast.affine_parameters`.
        patch: run the image tower with :func:`ueo_fast.patch_visual`.
        strict: fail at an image that cannot be read.
        eval_batch_size: images per step of the zero-shot pass.

    Returns:
        The adapted classifier, and what it was made from.

    Raises:
        TypeError, ValueError, OSError: an argument is unusable; the message says which, and the
            way out.
        NonFiniteLossError: the loss became NaN or infinite.

    Source: Liang et al., 2024, arXiv 2308.12919; authors' ``demo.py``.
    """
    config = config or TrainerConfig()
    chosen = make_method(method) if isinstance(method, str) else method
    classifier = make_classifier(
        model, tokenizer, class_names, template=template, scope=scope, patch=patch
    )
    views = _views(images, classifier, augmented, labels)
    start = zero_shot(classifier, views, config, strict=strict, batch_size=eval_batch_size)
    history = chosen.adapt(classifier, start.target, config=config, hooks=hooks)
    return Adaptation(classifier, start.target, history, chosen, start.unreadable)


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


class ZeroShotPass(NamedTuple):
    """What the zero-shot model says about images, and which of them it could see.

    Attributes:
        target: the images that could be read.
        positions: (M,) int64, their places among all images.
        unreadable: (name, reason) of each of the others.
    """

    target: Target
    positions: Tensor
    unreadable: tuple[tuple[str, str], ...]


class Views(NamedTuple):
    """The same N images, as evaluation and as training see them.

    Attributes:
        plain: un-augmented.
        augmented: drawn anew each time, or ``None`` where there is no augmentation.
        labels: (N,) int64, or ``None``.
        source: where they come from, if from files.
    """

    plain: Dataset[Any] | Tensor
    augmented: Dataset[Any] | None
    labels: Tensor | None
    source: ImageList | None


def views_of(images: ImageList, model: nn.Module, labels: Tensor | None) -> Views:
    """Image files with the model's own preprocessing and the authors' augmentation."""
    preprocess = preprocessing(model)
    return Views(
        ImageDataset(images, test_transform(preprocess)),
        ImageDataset(images, training_transform(preprocess)),
        labels,
        images,
    )


def zero_shot(
    classifier: ClipClassifier,
    views: Views,
    config: TrainerConfig,
    *,
    strict: bool = False,
    batch_size: int = 192,
    watch: Callable[[Iterator[Predicted]], Iterable[Predicted]] = iter,
) -> ZeroShotPass:
    """What the zero-shot model says about the images, and those that cannot be read.

    Args:
        classifier: before anything is trained.
        views: the images.
        config: its workers, precision and memory format are used.
        strict: fail at an image that cannot be read.
        batch_size: images per forward pass.
        watch: passes the batches on, and may show how far it got.

    Raises:
        ValueError: no image can be read, or with ``strict`` one cannot.
    """
    batches = predict_batches(
        classifier,
        views.plain,
        batch_size=batch_size,
        num_workers=config.num_workers,
        precision=config.precision,
        channels_last=config.channels_last,
    )
    found = collect(watch(batches))
    if not found.failures:
        target = Target(views.plain, views.augmented, found.cosines, views.labels)
        return ZeroShotPass(target, found.positions, ())
    assert views.source is not None, "only files can be unreadable"
    unreadable = tuple(
        (views.source.names[position], reason) for position, reason in found.failures
    )
    name, reason = unreadable[0]
    if strict:
        raise ValueError(
            f"{len(unreadable)} image(s) cannot be read, the first is {name}: {reason}; mend or "
            "remove them, or leave out strict to skip them"
        )
    if not len(found.positions):
        raise ValueError(
            f"none of the {len(unreadable)} images can be read, the first is {name}: {reason}"
        )
    labels = None if views.labels is None else views.labels[found.positions]
    kept = views_of(views.source.subset(found.positions), classifier.model, labels)
    target = Target(kept.plain, kept.augmented, found.cosines, labels)
    return ZeroShotPass(target, found.positions, unreadable)


def _views(
    images: Images,
    classifier: ClipClassifier,
    augmented: Dataset[Any] | None = None,
    labels: Tensor | None = None,
) -> Views:
    if isinstance(images, str | os.PathLike):
        images = read_images(images)
    if not isinstance(images, ImageList):
        _check_dataset(images)
        return Views(images, augmented, labels, None)
    for name, value in (("augmented", augmented), ("labels", labels)):
        if value is not None:
            raise ValueError(
                f"{name} goes with a dataset or tensor of images; those of a folder or list bring "
                "their own"
            )
    known = classifier.prompt.class_names
    return views_of(images, classifier.model, match_labels(images, known))


def _check_dataset(images: Any) -> None:
    if isinstance(images, Tensor) and (images.ndim != 4 or images.shape[1] != 3):
        raise ValueError(
            f"images has shape {tuple(images.shape)}, but a tensor of images is (N, 3, H, W), "
            "preprocessed for the model"
        )
    if not (hasattr(images, "__len__") and hasattr(images, "__getitem__")):
        raise TypeError(
            f"images is of type {type(images).__name__}, but must be a folder, list file or CSV, "
            "an ImageList, a tensor (N, 3, H, W), or a dataset with a length"
        )
