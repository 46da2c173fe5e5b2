"""SGD on the prompt's context and the affine parameters, and fp16's loss scale."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ueo_fast.finetune.clip.model import ClipClassifier
from ueo_fast.finetune.engine.schedule import decay
from ueo_fast.finetune.engine.training_config import TrainerConfig


class Optimizer:
    """One group per kind of parameter, each with its learning rate.

    Sets which parameters require a gradient: those whose learning rate is not 0.

    Args:
        classifier: what is trained.
        config: learning rates, momentum, weight decay, schedule, precision.

    Raises:
        ValueError: nothing to train, or a prompt that cannot be.
    """

    def __init__(self, classifier: ClipClassifier, config: TrainerConfig) -> None:
        self._schedule = config.schedule
        self._rates = {"prompt": config.prompt_lr, "affine": config.affine_lr}
        if config.prompt_lr > 0:
            classifier.prompt.check_trainable()
        parameters = {
            "prompt": classifier.prompt_parameters(),
            "affine": classifier.affine_parameters(),
        }
        self.parameters: list[nn.Parameter] = []
        groups = []
        for name, members in parameters.items():
            trained = self._rates[name] > 0
            for parameter in members:
                parameter.requires_grad_(trained)
                parameter.grad = None
            if trained and members:
                groups.append({"params": members, "name": name})
                self.parameters += members
        if not groups:
            raise ValueError(
                "nothing to train: prompt_lr and affine_lr are both 0"
                if not any(self._rates.values())
                else "nothing to train: prompt_lr is 0, and the visual tower has no affine "
                "parameters in scope"
            )
        self._sgd = torch.optim.SGD(
            groups, lr=0.0, momentum=config.momentum, weight_decay=config.weight_decay
        )
        self.scaler: torch.amp.GradScaler | None = None
        if config.precision == "fp16":
            self.scaler = torch.amp.GradScaler(classifier.logit_scale.device.type)

    def set_rates(self, done: int, total: int) -> dict[str, float]:
        """The learning rates of the step after ``done`` of ``total``, by group; 0 where frozen."""
        factor = decay(self._schedule, done, total)
        rates = {name: rate * factor for name, rate in self._rates.items()}
        for group in self._sgd.param_groups:
            group["lr"] = rates[group["name"]]
        return rates

    @property
    def largest_rate(self) -> float:
        """Of all groups, in this step."""
        return max(float(group["lr"]) for group in self._sgd.param_groups)

    def scaled(self, loss: Tensor) -> Tensor:
        """What to call ``backward`` on."""
        return loss if self.scaler is None else self.scaler.scale(loss)

    def gradients(self) -> list[Tensor]:
        """Of all that is trained; scaled as the loss was."""
        return [p.grad for p in self.parameters if p.grad is not None]

    def step(self) -> None:
        """Change the parameters. With fp16, gradients that overflowed are left out and the scale is
        lowered."""
        if self.scaler is None:
            self._sgd.step()
        else:
            self.scaler.step(self._sgd)
            self.scaler.update()

    def clear(self) -> None:
        """Let go of the gradients."""
        self._sgd.zero_grad(set_to_none=True)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Momentum by parameter, and the loss scale, for a checkpoint."""
        momentum = {
            str(index): self._sgd.state[parameter]["momentum_buffer"]
            for index, parameter in enumerate(self.parameters)
            if self._sgd.state.get(parameter, {}).get("momentum_buffer") is not None
        }
        return momentum, {} if self.scaler is None else self.scaler.state_dict()

    def load(self, momentum: Mapping[str, Tensor], scaling: Mapping[str, Any]) -> None:
        """The inverse of :meth:`state`.

        Raises:
            KeyError, RuntimeError: it is of other parameters.
        """
        for index, parameter in enumerate(self.parameters):
            if str(index) in momentum:
                buffer = torch.empty_like(parameter)
                buffer.copy_(momentum[str(index)].expand_as(parameter))
                self._sgd.state[parameter]["momentum_buffer"] = buffer
        if self.scaler is not None:
            self.scaler.load_state_dict(dict(scaling))
