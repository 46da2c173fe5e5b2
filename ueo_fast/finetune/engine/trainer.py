"""The training loop: SGD on the loss of each batch, in evaluation mode, resumable at any step."""

from __future__ import annotations

import math
import time
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ueo_fast.finetune.clip.model import ClipClassifier
from ueo_fast.finetune.data.batches import IndexedImages, steps_per_epoch, training_batches
from ueo_fast.finetune.engine.early_stop import EarlyStop
from ueo_fast.finetune.engine.forward import Forward
from ueo_fast.finetune.engine.history import History, NonFiniteLossError
from ueo_fast.finetune.engine.hooks import Hooks, StartRecord
from ueo_fast.finetune.engine.modes import RunningStatistics, check_independent, evaluation_mode
from ueo_fast.finetune.engine.monitor import CollapseMonitor, totals_of
from ueo_fast.finetune.engine.objective import Objective, Step
from ueo_fast.finetune.engine.optimizer import Optimizer
from ueo_fast.finetune.engine.step_statistics import StepStatistics, Totals, measure
from ueo_fast.finetune.engine.stopping import HeldSignals
from ueo_fast.finetune.engine.training_config import TrainerConfig
from ueo_fast.finetune.engine.training_state import TrainingState, fingerprint
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

    With ``hooks.checkpoints`` the run goes on from the checkpoint there, if there is one, and ends
    as it would have ended uninterrupted (bit for bit on a CPU with the same number of threads; the
    history has all steps). One is saved every ``config.checkpoint_every`` steps, five minutes after
    the last one, and, in the main thread, when Ctrl-C or SIGTERM asks to stop: the step is
    finished, the checkpoint saved, and only then does the signal do what it does otherwise (Ctrl-C
    raises ``KeyboardInterrupt``). A second one does so at once.

    Args:
        classifier: what is trained: its prompt context and affine parameters. To resume, the
            zero-shot model that the first run started from.
        images: N images, augmented by the dataset itself if at all.
        objective: the loss of a batch.
        config: budget and optimiser; ``None`` takes the authors'.
        hooks: who is told of each step, and where checkpoints are kept.
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
        return _Run(classifier, images, objective, config, hooks, zero_shot).go()
    finally:
        classifier.eval()


class _Run:
    def __init__(
        self,
        classifier: ClipClassifier,
        images: Dataset[Any] | Tensor,
        objective: Objective,
        config: TrainerConfig,
        hooks: Hooks,
        zero_shot: Tensor | None,
    ) -> None:
        self.classifier, self.images, self.objective = classifier, images, objective
        self.config, self.hooks = config, hooks
        found, subset = len(IndexedImages(images)), objective.subset
        count = found if subset is None else len(subset)
        if count == 0:
            raise ValueError("images is empty: there is nothing to train on")
        classifier.eval()  # before anything is computed: fixed text features must have no dropout
        self.forward = Forward(classifier, config)
        self.optimizer = Optimizer(classifier, config)
        self.epoch_steps = steps_per_epoch(count, config.batch_size)
        self.total = config.epochs * self.epoch_steps
        names = classifier.prompt.class_names
        start = None
        if zero_shot is not None:
            rows = zero_shot if subset is None else zero_shot[subset.to(zero_shot.device)]
            start = totals_of(rows, float(classifier.logit_scale))
        self.state = TrainingState(
            classifier,
            objective.to(self.forward.device),
            self.optimizer,
            CollapseMonitor(names, count, shuffled=config.shuffle, start=start),
            None if config.early_stop is None else EarlyStop(classifier, config.early_stop),
            fingerprint(config, classifier, objective, found),
        )
        self.step = 0
        self.saved = 0.0
        self.overflows = 0

    def go(self) -> History:
        self._begin()
        if self.state.history.stopped is None:
            with HeldSignals(self.hooks.checkpoints is not None) as held:
                self._steps(held)
        self.optimizer.clear()
        return self.state.history

    def _begin(self) -> None:
        """Take up the run where it was left."""
        store, state = self.hooks.checkpoints, self.state
        checkpoint = None if store is None else store.load()
        if checkpoint is not None:
            state.check(checkpoint, self.total)
            state.load_classifier(checkpoint)
            self.step = checkpoint.step
        self.objective.prepare(self.classifier)
        if checkpoint is not None:
            state.load(checkpoint)
        visual = self.classifier.model.visual
        self.statistics = RunningStatistics(visual)
        if self.config.micro_batch_size is not None:
            check_independent(visual, self.config.micro_batch_size)
        self.hooks.on_start(StartRecord(self.step, self.total, self.step // self.epoch_steps))

    def _steps(self, held: HeldSignals) -> None:
        started = self.saved = time.perf_counter()
        batches = training_batches(
            self.images,
            self.config.batch_size,
            seed=self.config.seed,
            epochs=self.config.epochs,
            start_step=self.step,
            num_workers=self.config.num_workers,
            subset=self.objective.subset,
            shuffle=self.config.shuffle,
            pin_memory=self.forward.device.type == "cuda",
        )
        for epoch, images, positions in batches:
            rates = self.optimizer.set_rates(self.step, self.total)
            statistics = self._step(images, positions)
            self.step += 1
            self._tell(statistics, epoch, rates, time.perf_counter() - started)
            reasons = self._warn(self.state.monitor.step(statistics))
            ends = self.step % self.epoch_steps == 0
            if ends:
                reasons += self._end_epoch(epoch)
            self._maybe_stop(reasons)
            self._maybe_save(ends, held)
            if self.state.history.stopped is not None:
                return
            started = time.perf_counter()

    def _step(self, batch: Tensor, positions: Tensor) -> StepStatistics:
        """One gradient step; if it fails (:meth:`_fail`), the state is that before it."""
        forward, optimizer = self.forward, self.optimizer
        micro = self.config.micro_batch_size
        optimizer.clear()
        self.statistics.keep()
        batch = forward.to_device(batch)
        text = forward.text_features()
        cache = None
        if micro is not None and micro < len(batch):
            cache = GradCache(forward.image_features, batch.split(micro))
        image = forward.image_features(batch) if cache is None else cache.features
        cosines, logits = self.classifier.compare(image, text)
        step = Step(cosines, logits, image, text, positions.to(forward.device))
        loss = self._loss(step)
        optimizer.scaled(loss).backward()
        if cache is not None and self.config.affine_lr > 0 and image.grad is not None:
            cache.backward()
        # The one wait for the device, and the way to stop before a NaN reaches the weights.
        statistics = measure(loss, logits, optimizer.gradients())
        self._check_finite(statistics)
        optimizer.step()
        with torch.no_grad():
            self.objective.remember(Step(*(value.detach() for value in step)))
        return statistics

    def _loss(self, step: Step) -> Tensor:
        try:
            return self.objective(step)
        except ValueError as error:
            # Some losses refuse NaN (in a confidence) before there is a value to look at.
            if step.cosines.isfinite().all():
                raise
            self._fail(f"the predictions are no longer finite ({error})")

    def _check_finite(self, statistics: StepStatistics) -> None:
        loss, gradient = statistics.loss, statistics.largest_gradient
        if not math.isfinite(loss):
            self._fail(f"the loss became {loss}")
        if self.optimizer.scaler is not None:
            # The scaler leaves such a step out and tries a lower scale.
            self.overflows = 0 if math.isfinite(gradient) else self.overflows + 1
            if self.overflows >= _MOST_OVERFLOWS:
                self._fail(f"the gradient overflowed in {self.overflows} steps in a row")
        elif not gradient * max(1.0, self.optimizer.largest_rate) < _LARGEST_CHANGE:
            self._fail(f"the gradient became {gradient} (the loss was {loss})")

    def _fail(self, what: str) -> NoReturn:
        self.statistics.restore()
        self.optimizer.clear()
        kept = ""
        if self.hooks.checkpoints is not None:
            try:
                self.hooks.checkpoints.save(self.state.checkpoint(self.step))
                kept = " and are saved as a checkpoint"
            except OSError as error:
                kept = f", but no checkpoint of them could be saved ({error})"
        config = self.config
        half = " Or take precision='bf16' or 'fp32'." if config.precision == "fp16" else ""
        raise NonFiniteLossError(
            f"{what} at step {self.step + 1} of {self.total} (prompt_lr={config.prompt_lr}, "
            f"affine_lr={config.affine_lr}, precision={config.precision}); the weights are those "
            f"of the step before{kept}. Lower the learning rates, and check the images for NaN."
            f"{half}"
        )

    def _tell(
        self, statistics: StepStatistics, epoch: int, rates: dict[str, float], seconds: float
    ) -> None:
        history, marginal = self.state.history, statistics.marginal_entropy
        history.loss.append(statistics.loss)
        history.conditional_entropy.append(statistics.conditional_entropy)
        history.marginal_entropy.append(marginal)
        self.state.totals.add(statistics)
        self.hooks.on_step(
            StepRecord(
                step=self.step,
                total=self.total,
                epoch=epoch,
                loss=statistics.loss,
                conditional_entropy=statistics.conditional_entropy,
                marginal_entropy=marginal,
                largest_share=statistics.largest_share,
                learning_rates=rates,
                seconds=seconds,
            )
        )

    def _end_epoch(self, epoch: int) -> list[str]:
        """Returns why to stop."""
        state, totals = self.state, self.state.totals
        record = totals.record(epoch)
        state.totals = Totals(len(record.histogram))
        with evaluation_mode(self.classifier):
            self.hooks.on_epoch(record)
        reasons = self._warn(state.monitor.epoch(totals))
        # A collapsed epoch is never the best one.
        if state.early_stop is not None and not state.monitor.collapsed:
            reason = state.early_stop.epoch(record)
            reasons += [] if reason is None else [reason]
        return reasons

    def _warn(self, warnings: list[str]) -> list[str]:
        for text in warnings:
            self.hooks.on_warning(f"step {self.step} of {self.total}: {text}")
        return warnings

    def _maybe_stop(self, reasons: list[str]) -> None:
        """With early stopping: at a reason, or at the end, go back to the best epoch."""
        stop = self.state.early_stop
        if stop is None or not (reasons or self.step == self.total):
            return
        history = self.state.history
        history.kept_epoch = stop.restore()
        if reasons and self.step < self.total:
            history.stopped = f"after step {self.step} of {self.total}: {reasons[0]}"

    def _maybe_save(self, epoch_ends: bool, held: HeldSignals) -> None:
        if self.hooks.checkpoints is None:
            return
        every = self.config.checkpoint_every
        due = self.step % every == 0 if every else epoch_ends
        due = due or time.perf_counter() - self.saved > _SECONDS_UNSAVED
        last = self.step == self.total or self.state.history.stopped is not None
        if due or last or held.pending is not None:
            self.hooks.checkpoints.save(self.state.checkpoint(self.step))
            self.saved = time.perf_counter()
            held.deliver()
