"""The training loop: SGD on the loss of each batch, in evaluation mode, resumable at any step."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ueo_fast.finetune.clip.model import ClipClassifier
from ueo_fast.finetune.data.loader import (
    IndexedImages,
    TrainingBatch,
    steps_per_epoch,
    training_batches,
)
from ueo_fast.finetune.engine.checkpoint import HeldSignals, TrainingState
from ueo_fast.finetune.engine.forward import (
    Forward,
    RunningStatistics,
    check_independent,
    evaluation_mode,
)
from ueo_fast.finetune.engine.hooks import (
    History,
    Hooks,
    NonFiniteLossError,
    StartRecord,
)
from ueo_fast.finetune.engine.monitor import (
    CollapseMonitor,
    EarlyStop,
    StepStatistics,
    Totals,
    measure,
    totals_of,
)
from ueo_fast.finetune.engine.objective import Objective, Step
from ueo_fast.finetune.engine.training_config import TrainerConfig
from ueo_fast.finetune.files.run_files import StepRecord
from ueo_fast.gradient_cache import GradCache

__all__ = ["History", "NonFiniteLossError", "TrainerConfig", "train"]

# Of a gradient, and of what a step adds to a weight: finite, but float32 ends at 3.4e38, and norms
# and attention take squares of what such weights give.
_LARGEST_CHANGE = 1e15
# Between checkpoints at most, where steps take long: what a crash or a power cut may cost.
_SECONDS_UNSAVED = 300.0
# fp16 starts at a loss scale of 2^16 and halves it at each overflow; after so many in a row the
# scale cannot be what is wrong.
_MOST_OVERFLOWS = 32


def train(
    classifier: ClipClassifier,
    images: Dataset[Any] | Tensor,
    objective: Objective,
    *,
    config: TrainerConfig | None = None,
    hooks: Hooks | None = None,
    zero_shot: Tensor | None = None,
) -> History:
    """Train ``classifier`` in place on unlabelled images.

    SGD, by default without momentum or weight decay; the learning rates follow one cosine from
    their start to 0 over all steps. The model is in evaluation mode, so the statistics of BatchNorm
    are never touched and dropout is off, unless ``objective.prepare`` says otherwise; afterwards it
    is in evaluation mode in any case.

    With ``hooks.checkpoints`` the run resumes from the checkpoint there, if there is one, and ends
    as it would have ended uninterrupted (bit for bit on a CPU with the same number of threads; the
    history has all steps). One is saved every ``config.checkpoint_every`` steps, five minutes after
    the last one, and, in the main thread, when Ctrl-C or SIGTERM asks to stop: the step is
    finished, the checkpoint saved, and only then does the signal do what it does otherwise (Ctrl-C
    raises ``KeyboardInterrupt``). A second one does so at once.

    Args:
        classifier: its prompt context and affine parameters are trained. To resume, the zero-shot
            model that the first run started from.
        images: N images, augmented by the dataset itself if at all.
        objective: the loss of a batch.
        config: budget and optimiser; ``None`` takes the authors'.
        hooks: callbacks, and where checkpoints are kept.
        zero_shot: (N, C) cosines before the training, which the collapse monitor compares with;
            ``None`` takes the predictions of the first epoch.

    Returns:
        The history, one entry per step.

    Raises:
        ValueError: nothing to train, a choice that does not go with this model or device, or a
            checkpoint of another run.
        NonFiniteLossError: loss or gradient is NaN or infinite. The classifier has the state after
            the last good step, and so has the last checkpoint.
        OSError: a checkpoint could not be saved; the one before is kept.
        KeyboardInterrupt: Ctrl-C; with ``hooks.checkpoints`` the steps that were done are saved.

    Source: authors' ``demo.py``, ``train_clip``.
    """
    config, hooks = config or TrainerConfig(), hooks or Hooks()
    try:
        run = _Run(classifier, images, objective, config, hooks, zero_shot)
        state = run.state
        with HeldSignals(hooks.checkpoints is not None and state.history.stopped is None) as held:
            started = run.saved = time.perf_counter()
            for epoch, batch, positions in run.batches(images):
                rates = run.set_learning_rates()
                step, statistics = run.gradients(batch, positions)
                if state.scaler is None:
                    state.sgd.step()
                else:  # skips a step whose gradients overflowed, and lowers the loss scale
                    state.scaler.step(state.sgd)
                    state.scaler.update()
                with torch.no_grad():
                    objective.remember(step)
                state.step += 1
                run.report(statistics, epoch, rates, time.perf_counter() - started)
                run.stop_and_save(statistics, epoch, held)
                if state.history.stopped is not None:
                    break
                started = time.perf_counter()
        state.sgd.zero_grad(set_to_none=True)
        return state.history
    finally:
        classifier.eval()


def make_sgd(classifier: ClipClassifier, config: TrainerConfig) -> torch.optim.SGD:
    """The optimiser, with a group for the prompt and one for the affine parameters.

    Parameters require a gradient from here on if their learning rate is not 0, and no others do.

    Raises:
        ValueError: nothing to train, or a prompt that cannot be.
    """
    if config.prompt_lr > 0:
        classifier.prompt.check_trainable()
    groups = []
    for name, rate, parameters in (
        ("prompt", config.prompt_lr, classifier.prompt_parameters()),
        ("affine", config.affine_lr, classifier.affine_parameters()),
    ):
        for parameter in parameters:
            parameter.requires_grad_(rate > 0)
            parameter.grad = None
        if rate > 0 and parameters:
            groups.append({"params": parameters, "name": name, "start": rate})
    if not groups:
        raise ValueError(
            "nothing to train: prompt_lr and affine_lr are both 0"
            if config.prompt_lr == config.affine_lr == 0
            else "nothing to train: prompt_lr is 0, and the visual tower has no affine parameters "
            "in scope"
        )
    return torch.optim.SGD(
        groups, lr=0.0, momentum=config.momentum, weight_decay=config.weight_decay
    )


class _Run:
    """What :func:`train` does besides the optimiser's step."""

    def __init__(
        self,
        classifier: ClipClassifier,
        images: Dataset[Any] | Tensor,
        objective: Objective,
        config: TrainerConfig,
        hooks: Hooks,
        zero_shot: Tensor | None,
    ) -> None:
        self.classifier, self.objective = classifier, objective
        self.config, self.hooks = config, hooks
        found, subset = len(IndexedImages(images)), objective.subset
        count = found if subset is None else len(subset)
        if count == 0:
            raise ValueError("images is empty: there is nothing to train on")
        classifier.eval()  # before anything is computed: fixed text features must have no dropout
        self.forward = Forward(classifier, config)
        sgd = make_sgd(classifier, config)
        device = self.forward.device
        self.epoch_steps = steps_per_epoch(count, config.batch_size)
        self.total = config.epochs * self.epoch_steps
        names = classifier.prompt.class_names
        start = None
        if zero_shot is not None:
            rows = zero_shot if subset is None else zero_shot[subset.to(zero_shot.device)]
            start = totals_of(rows, float(classifier.logit_scale))
        self.state = TrainingState(
            classifier,
            objective.to(device),
            sgd,
            torch.amp.GradScaler(device.type) if config.precision == "fp16" else None,
            CollapseMonitor(names, count, shuffled=config.shuffle, start=start),
            None if config.early_stop is None else EarlyStop(classifier, config.early_stop),
            {
                **config.decisive(),
                "images": found,
                "classes": list(names),
                "prompt": classifier.prompt.template,
                "objective": type(objective).__name__,
                "choices": objective.choices,
            },
            Totals(len(names)),
        )
        self.saved = 0.0
        self.overflows = 0
        checkpoint = None if hooks.checkpoints is None else hooks.checkpoints.load()
        if checkpoint is None:
            objective.prepare(classifier)
        else:
            self.state.load(checkpoint, self.total)
        visual = classifier.model.visual
        self.statistics = RunningStatistics(visual)
        if config.micro_batch_size is not None:
            check_independent(visual, config.micro_batch_size)
        step = self.state.step
        hooks.on_start(StartRecord(step, self.total, step // self.epoch_steps))

    def batches(self, images: Dataset[Any] | Tensor) -> Iterator[TrainingBatch]:
        """Those that are left; none where the run was stopped early."""
        if self.state.history.stopped is not None:
            return iter(())
        return training_batches(
            images,
            self.config.batch_size,
            seed=self.config.seed,
            epochs=self.config.epochs,
            start_step=self.state.step,
            num_workers=self.config.num_workers,
            subset=self.objective.subset,
            shuffle=self.config.shuffle,
            pin_memory=self.forward.device.type == "cuda",
        )

    def set_learning_rates(self) -> dict[str, float]:
        """Those of the next step, by group; 0 where frozen.

        ``cosine`` multiplies by ``(1 + cos(π done / total)) / 2``: 1 in the first step, and nearly
        0 in the last.

        Source: Loshchilov and Hutter, *SGDR*, 2017, equation 5, without restarts; authors'
        ``demo.py`` (``CosineAnnealingLR``, stepped per batch).
        """
        factor = 1.0
        if self.config.schedule == "cosine":
            factor = 0.5 * (1 + math.cos(math.pi * self.state.step / self.total))
        for group in self.state.sgd.param_groups:
            group["lr"] = group["start"] * factor
        return {"prompt": self.config.prompt_lr * factor, "affine": self.config.affine_lr * factor}

    def gradients(self, batch: Tensor, positions: Tensor) -> tuple[Step, StepStatistics]:
        """Forward and backward; if that fails (:meth:`_fail`), the state is that before it.

        Returns:
            What the loss was given, without gradients, and statistics of it.
        """
        forward, state = self.forward, self.state
        micro = self.config.micro_batch_size
        state.sgd.zero_grad(set_to_none=True)
        self.statistics.keep()
        batch = forward.to_device(batch)
        text = forward.text_features()
        cache = None
        if micro is not None and micro < len(batch):
            cache = GradCache(forward.image_features, batch.split(micro))
        image = forward.image_features(batch) if cache is None else cache.features
        cosines, logits = self.classifier.compare(image, text)
        step = Step(cosines, logits, image, text, positions.to(forward.device))
        try:
            loss = self.objective(step)
        except ValueError as error:
            # Some losses refuse NaN (in a confidence) before there is a value to look at.
            if step.cosines.isfinite().all():
                raise
            self._fail(f"the predictions are no longer finite ({error})")
        (loss if state.scaler is None else state.scaler.scale(loss)).backward()
        if cache is not None and self.config.affine_lr > 0 and image.grad is not None:
            cache.backward()
        # The one wait for the device, and the way to stop before a NaN reaches the weights.
        gradients = [p.grad for p in state.parameters if p.grad is not None]
        statistics = measure(loss, logits, gradients)
        self._check_finite(statistics.loss, statistics.largest_gradient)
        return Step(*(value.detach() for value in step)), statistics

    def _check_finite(self, loss: float, gradient: float) -> None:
        if not math.isfinite(loss):
            self._fail(f"the loss became {loss}")
        if self.state.scaler is not None:
            # The scaler leaves such a step out and tries a lower scale.
            self.overflows = 0 if math.isfinite(gradient) else self.overflows + 1
            if self.overflows >= _MOST_OVERFLOWS:
                self._fail(f"the gradient overflowed in {self.overflows} steps in a row")
            return
        largest_rate = max(group["lr"] for group in self.state.sgd.param_groups)
        if not gradient * max(1.0, largest_rate) < _LARGEST_CHANGE:
            self._fail(f"the gradient became {gradient} (the loss was {loss})")

    def _fail(self, what: str) -> NoReturn:
        self.statistics.restore()
        self.state.sgd.zero_grad(set_to_none=True)
        kept = ""
        if self.hooks.checkpoints is not None:
            try:
                self.hooks.checkpoints.save(self.state.checkpoint())
                kept = " and are saved as a checkpoint"
            except OSError as error:
                kept = f", but no checkpoint of them could be saved ({error})"
        config = self.config
        half = " Or take precision='bf16' or 'fp32'." if config.precision == "fp16" else ""
        raise NonFiniteLossError(
            f"{what} at step {self.state.step + 1} of {self.total} (prompt_lr={config.prompt_lr}, "
            f"affine_lr={config.affine_lr}, precision={config.precision}); the weights are those "
            f"of the step before{kept}. Lower the learning rates, and check the images for NaN."
            f"{half}"
        )

    def report(
        self, statistics: StepStatistics, epoch: int, rates: dict[str, float], seconds: float
    ) -> None:
        """Add the step to the history, and call the hook."""
        record = StepRecord(
            step=self.state.step,
            total=self.total,
            epoch=epoch,
            loss=statistics.loss,
            conditional_entropy=statistics.conditional_entropy,
            marginal_entropy=statistics.marginal_entropy,
            largest_share=statistics.largest_share,
            learning_rates=rates,
            seconds=seconds,
        )
        history = self.state.history
        history.loss.append(record.loss)
        history.conditional_entropy.append(record.conditional_entropy)
        history.marginal_entropy.append(record.marginal_entropy)
        self.state.totals.add(statistics)
        self.hooks.on_step(record)

    def stop_and_save(self, statistics: StepStatistics, epoch: int, held: HeldSignals) -> None:
        """After a step: warnings, the end of an epoch, early stopping, a checkpoint if one is due.

        With early stopping, at a reason to stop or at the end, go back to the best epoch.
        """
        state, stop = self.state, self.state.early_stop
        reasons = self._warn(state.monitor.step(statistics))
        epoch_ends = state.step % self.epoch_steps == 0
        last = state.step == self.total
        if epoch_ends:
            totals, state.totals = state.totals, Totals(len(statistics.histogram))
            record = totals.record(epoch)
            with evaluation_mode(self.classifier):
                self.hooks.on_epoch(record)
            reasons += self._warn(state.monitor.epoch(totals))
            # A collapsed epoch is never the best one.
            if stop is not None and not state.monitor.collapsed:
                reason = stop.epoch(record)
                reasons += [] if reason is None else [reason]
        if stop is not None and (reasons or last):
            state.history.kept_epoch = stop.restore()
            if reasons and not last:
                state.history.stopped = f"after step {state.step} of {self.total}: {reasons[0]}"
        if self.hooks.checkpoints is not None:
            every = self.config.checkpoint_every
            due = state.step % every == 0 if every else epoch_ends
            due = due or time.perf_counter() - self.saved > _SECONDS_UNSAVED
            due = due or last or state.history.stopped is not None or held.pending is not None
            if due:
                self.hooks.checkpoints.save(state.checkpoint())
                self.saved = time.perf_counter()
                held.deliver()

    def _warn(self, warnings: list[str]) -> list[str]:
        for text in warnings:
            self.hooks.on_warning(f"step {self.state.step} of {self.total}: {text}")
        return warnings
