"""The whole method in one call: a CLIP model and unlabelled images in, a classifier out."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ueo_fast.finetune.clip.base_model import BaseModel, describe_base
from ueo_fast.finetune.clip.delta import save_delta
from ueo_fast.finetune.clip.model import (
    CONTEXT,
    ClipClassifier,
    adapted_state,
    load_adapted_state,
    make_classifier,
)
from ueo_fast.finetune.data import Decoding, check_decode
from ueo_fast.finetune.data.copies import temporary_copies
from ueo_fast.finetune.data.names import plural
from ueo_fast.finetune.data.views import Images, Views, make_views
from ueo_fast.finetune.engine.hooks import Hooks, bar_hooks, combine, training_bar
from ueo_fast.finetune.engine.trainer import History, TrainerConfig
from ueo_fast.finetune.evaluation.predict import cosine_error, unreadable_images, watched
from ueo_fast.finetune.evaluation.results_table import doubts
from ueo_fast.finetune.methods import make_method
from ueo_fast.finetune.methods.base import Method, ZeroShot
from ueo_fast.finetune.methods.ueo import check_labels
from ueo_fast.finetune.scoring.score_images import score_batches
from ueo_fast.finetune.scoring.thresholds import (
    Threshold,
    check_threshold,
    choose_threshold,
    lowest_known,
    parse_threshold,
)
from ueo_fast.finetune.target import Target, zero_shot_target
from ueo_fast.ranges import check_number

_ADAPTED_BEFORE = (
    "the model was adapted before (by adapt(), load_delta() or other training): its norms are not "
    "those it had when it first became a classifier. So what counts as zero-shot from here on is "
    "the adapted model, and an earlier result that shares the model changes with it. To start from "
    "zero-shot CLIP, call restore() on the earlier result, load the model anew, or adapt a "
    "copy.deepcopy(model) each time"
)


@dataclass(frozen=True, eq=False)
class Prediction:
    """What an adapted classifier says about N images. One index means the same image everywhere.

    Attributes:
        names: N names: of the files, as in a table of ``ueo-fast score``, or the positions among
            the images that were given.
        classes: N names, the most probable class of each.
        probabilities: (N,) float32, of that class: softmax at the model's own temperature.
        mcm: (N,) float64 MCM score; low for images that belong to no class.
        known: (N,) bool, whether ``mcm`` reaches ``threshold``, to within rounding; ``None``
            without a threshold.
        threshold: the score from which an image counts as known.
        cosines: (N, C) float32, of image and text features.
        unreadable: (name, reason) of each image that was left out.
    """

    names: tuple[str, ...]
    classes: tuple[str, ...]
    probabilities: Tensor
    mcm: Tensor
    known: Tensor | None
    threshold: float | None
    cosines: Tensor
    unreadable: tuple[tuple[str, str], ...] = ()

    def __len__(self) -> int:
        return len(self.names)

    def __repr__(self) -> str:
        parts = [plural(len(self), "image")]
        if self.known is not None:
            known = int(self.known.sum())
            parts.append(f"{known} known (MCM of {self.threshold:.9g} or more)")
        if self.unreadable:
            parts.append(f"{len(self.unreadable)} unreadable")
        return f"Prediction({', '.join(parts)})"


@dataclass(frozen=True, eq=False)
class Adaptation:
    """What :func:`adapt` did.

    Attributes:
        classifier: the adapted classifier, in evaluation mode.
        target: the images that could be read, and what the zero-shot model said about them.
        history: one entry per gradient step.
        method: with its choices.
        names: of the images of ``target``.
        unreadable: (name, reason) of each image that was left out.
        start: what training may change, as it was before.
        decode: how image files are decoded.
        precision: of the image tower, during :func:`adapt`.
    """

    classifier: ClipClassifier
    target: Target
    history: History
    method: Method
    names: tuple[str, ...]
    unreadable: tuple[tuple[str, str], ...]
    start: Mapping[str, Tensor]
    decode: Decoding = "auto"
    precision: str = "fp32"

    def __repr__(self) -> str:
        left_out = f", {len(self.unreadable)} unreadable" if self.unreadable else ""
        return (
            f"Adaptation({self.method!r}, "
            f"{plural(len(self.classifier.prompt.class_names), 'class')}, "
            f"{plural(len(self.target), 'image')}{left_out}, {plural(len(self.history), 'step')})"
        )

    def predict(
        self,
        images: Images | None = None,
        *,
        threshold: str | float | Threshold | None = None,
        mcm_scale: float = 1.0,
        strict: bool = False,
        progress: bool | None = None,
        precision: str = "fp32",
        decode: Decoding | None = None,
        **options: Any,
    ) -> Prediction:
        """Classes and scores of images. Those that cannot be read are left out and listed.

        Args:
            images: as for :func:`adapt`, un-augmented; ``None``: those that it adapted to.
            threshold: the MCM score from which an image is known: a number, ``"otsu"``, ``"gmm"``
                or ``"tpr95"`` (needs images with labels), as for ``ueo-fast score``; ``None``:
                ``"otsu"``, and no verdict if the scores cannot be split (a single image).
            mcm_scale: multiplies the cosines in the MCM score; 1 is the authors'.
            strict: fail at an image that cannot be read.
            progress: show a progress bar; ``None``: if the standard error stream is a terminal.
            precision: of the image tower: ``fp32``, ``bf16`` or ``fp16``.
            decode: how images are decoded, as for :func:`adapt`; ``None``: as there.
            options: ``batch_size``, ``num_workers``, ``channels_last`` of
                :func:`~ueo_fast.finetune.evaluation.predict.predict_batches`.

        Raises:
            TypeError, ValueError, OSError: an argument is unusable, no image can be read, or the
                scores allow no threshold of the kind that was asked for.
        """
        if decode is not None:
            check_decode(decode)
        choice = parse_threshold("otsu" if threshold is None else threshold)
        check_number("mcm_scale", mcm_scale, sign="positive")
        if images is None:
            fits = self._features_fit(precision)
            seen_by_tower = self.target.evaluation_images if fits else self.target.images
            views = Views(seen_by_tower, None, self.target.labels, self.names)
        else:
            views = make_views(
                images,
                self.classifier.model,
                self.classifier.prompt.class_names,
                needs_labels=choice.needs_labels,
                decode=self.decode if decode is None else decode,
            )
        names, count = self.classifier.prompt.class_names, len(views.names)
        if threshold is not None:
            check_threshold(choice, views.labels, count, len(names))
        batches = score_batches(
            self.classifier,
            views.plain,
            top_k=1,
            mcm_scale=mcm_scale,
            precision=precision,
            **options,
        )
        seen = list(watched("predict", count, progress)(batches))

        def joined(field: str) -> Tensor:
            return torch.cat([getattr(batch, field) for batch in seen])

        failures = [failure for batch in seen for failure in batch.failures]
        positions, scores, best = joined("positions"), joined("scores"), joined("classes").flatten()
        unreadable = unreadable_images(
            failures, views.names, readable=len(positions), strict=strict
        )
        _warn_of(classes=names, predicted=best)
        is_known = None if views.labels is None else (views.labels.cpu()[positions] >= 0).numpy()
        value, known = None, None
        try:
            value = choose_threshold(choice, scores.numpy(), is_known)
        except ValueError:
            if threshold is not None:
                raise
        if value is not None:
            error = cosine_error(precision, self.classifier.logit_scale.device)
            known = scores >= lowest_known(value, mcm_scale, error)
        return Prediction(
            names=tuple(views.names[position] for position in positions.tolist()),
            classes=tuple(names[index] for index in best.tolist()),
            probabilities=joined("probabilities").flatten(),
            mcm=scores,
            known=known,
            threshold=value,
            cosines=joined("cosines"),
            unreadable=unreadable,
        )

    def _features_fit(self, precision: str) -> bool:
        """Whether kept features have this precision and belong to the tower as it is now."""
        now = adapted_state(self.classifier)
        tower = (name for name in now if name != CONTEXT)
        return precision == self.precision and all(now[n].equal(self.start[n]) for n in tower)

    def restore(self) -> None:
        """Put the model back as it was before :func:`adapt`: zero-shot CLIP, to adapt anew.

        From then on, ``classifier`` is the zero-shot classifier. What was learned is lost unless it
        was saved with :meth:`save`.
        """
        load_adapted_state(self.classifier, self.start)

    def save(self, path: str | os.PathLike[str], base: BaseModel | None = None) -> Path:
        """Write what was learned as a delta (safetensors, a few hundred kB).

        Args:
            path: of the file; its folder is created.
            base: name and weights of the model, from ``load_clip`` or ``describe_base(model,
                "RN50", "openai")``; ``None`` records only its fingerprint, which is enough to
                refuse another model.
        """
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        base = base or describe_base(self.classifier.model)
        # For ueo-fast score.
        extra = {"mcm_scale": getattr(self.method, "mcm_scale", 1.0), "decode": self.decode}
        return save_delta(path, self.classifier, base, method=self.method.name, extra=extra)


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
    progress: bool | None = None,
    decode: Decoding = "auto",
    cache: str | os.PathLike[str] = "auto",
) -> Adaptation:
    """Adapt a CLIP model to unlabelled images, some of which may belong to no class.

        model, _, _ = open_clip.create_model_and_transforms("RN50", pretrained="openai")
        tokenizer = open_clip.get_tokenizer("RN50")
        result = adapt(model, tokenizer, "photos", ["cat", "dog"])
        print(result.predict().classes)
        result.save("delta.safetensors")

    Args:
        model: any open_clip model with an image and a text tower, on the device where the work is
            to be done. Changed in place: pass a deep copy to keep the original. Its current state
            counts as zero-shot CLIP; a warning says so if it was adapted before.
        tokenizer: open_clip's tokenizer of that model.
        images: a folder, list file, CSV or image file, an ``ImageList``, paths of image files, or
            images that PIL has opened, which get the model's preprocessing and the authors'
            augmentation; images that cannot be read are left out and listed. Or a dataset or tensor
            (N, 3, H, W) of un-augmented preprocessed images.
        class_names: the known classes, C of them.
        method: a name (``ueo``, ``infomax``, ``entmin``, ``adabn``, ``tent``, ``upl``, ``pouf``,
            ``dance``, ``oracle``, ``zeroshot``) or a method with choices, e.g. ``UEO(eps=1e-5)``.
        config: budget and optimiser; ``None`` takes the authors'.
        hooks: callbacks of each step, and where checkpoints go. Without ``on_warning``, what looks
            wrong (a collapse) becomes a Python warning.
        augmented: with a dataset: the same images, randomly augmented anew at each access.
        labels: (N,) int64 position in ``class_names``, -1 for unknown, for images without labels of
            their own. Only the oracle looks at them. The labels of a folder, list file or CSV are
            read from it, and ignored if they cannot be used.
        template: ``{}`` is the class name; the words before it are where the context starts.
        scope: which affine parameters are trained, see :func:`ueo_fast.affine_parameters`.
        patch: run the image tower with :func:`ueo_fast.patch_visual`.
        strict: fail at an image that cannot be read.
        eval_batch_size: images per step of the zero-shot pass.
        progress: show progress bars; ``None``: if the standard error stream is a terminal.
        decode: ``auto`` makes views from a copy with twice the model's pixels per side, for which
            a JPEG is decoded at 1/2, 1/4 or 1/8 of its size; ``full`` makes them from all pixels,
            as the authors do.
        cache: where the copies of image files are kept, so that each is decoded once. ``auto``: in
            a temporary folder until ``adapt`` returns; ``off``: nowhere; or a folder, which stays.

    Returns:
        The adapted classifier, and what it was made from.

    Raises:
        TypeError, ValueError, OSError: an argument is unusable; the message names it and the way
            out.
        NonFiniteLossError: the loss became NaN or infinite.

    Source: Liang et al., 2024, arXiv 2308.12919; authors' ``demo.py``.
    """
    for name, value, kind in (("config", config, TrainerConfig), ("hooks", hooks, Hooks)):
        if value is not None and not isinstance(value, kind):
            raise TypeError(f"{name} must be a {kind.__name__}, got {type(value).__name__}")
    check_decode(decode)
    if not isinstance(method, str | Method):
        raise TypeError(
            f"method must be a name or a Method, got {type(method).__name__}: 'ueo', UEO(eps=1e-5)"
        )
    config = config or TrainerConfig()
    chosen = make_method(method) if isinstance(method, str) else method
    chosen.check(config, tower=getattr(model, "visual", None))
    classifier = make_classifier(
        model, tokenizer, class_names, template=template, scope=scope, patch=patch
    )
    if classifier.was_adapted:
        warnings.warn(_ADAPTED_BEFORE, UserWarning, stacklevel=2)
    needs_none = isinstance(chosen, ZeroShot) or isinstance(images, Tensor | Dataset)
    with temporary_copies("off" if needs_none else cache, decode) as copies:
        views = make_views(
            images,
            classifier.model,
            classifier.prompt.class_names,
            augmented,
            labels,
            needs_labels=chosen.reads_labels,
            decode=decode,
            copies=copies,
        )
        if chosen.reads_labels:
            check_labels(views.labels)
        target = zero_shot_target(
            classifier,
            views.plain,
            config.image_pass(eval_batch_size),
            augmented=views.augmented,
            labels=views.labels,
            names=views.names,
            strict=strict,
            keep_features=not chosen.trains_tower(config),
            watch=watched("zero-shot", len(views.names), progress),
        )
        said = target.zero_shot_cosines().argmax(dim=1)
        _warn_of(classes=classifier.prompt.class_names, predicted=said)
        before = adapted_state(classifier)
        with training_bar(chosen.name, progress) as bar:
            told = hooks or Hooks()
            if told.on_warning is Hooks.on_warning:  # the default, which ignores them
                told = replace(told, on_warning=_warn)
            history = chosen.adapt(
                classifier, target, config=config, hooks=combine(bar_hooks(bar), told)
            )
    names = views.names
    if target.positions is not None:
        names = tuple(names[position] for position in target.positions.tolist())
    return Adaptation(
        classifier=classifier,
        target=target,
        history=history,
        method=chosen,
        names=names,
        unreadable=target.unreadable,
        start=before,
        decode=decode,
        precision=config.precision,
    )


def _warn(text: str) -> None:
    warnings.warn(text, UserWarning, stacklevel=2)


def _warn_of(*, classes: Sequence[str], predicted: Tensor) -> None:
    for text in doubts(
        classes=classes, predicted=predicted.unique().tolist(), images=len(predicted)
    ):
        warnings.warn(text, UserWarning, stacklevel=3)
