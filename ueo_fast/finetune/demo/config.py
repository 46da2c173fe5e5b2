"""Everything that can be chosen about the demonstration, with a sentence for each choice."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from ueo_fast.finetune.declared_options import flat, shortest_command
from ueo_fast.finetune.engine.training_config import TrainerConfig
from ueo_fast.ranges import (
    LARGEST_FACTOR,
    MOST_THREADS,
    check_count,
    check_number,
    check_one_of,
)

Tower = Literal["bn", "vit"]
Shift = Literal["contrast", "noise", "rotation", "texture"]
Scenario = Literal["CSDA", "CDA", "PDA", "ODA", "OPDA"]

# Strong enough to cost the zero-shot model a good part of its accuracy, weak enough to leave it
# above chance. A tower with BatchNorm suffers from contrast and texture far more than a ViT does.
_SEVERITY: dict[str, dict[str, float]] = {
    "bn": {"contrast": 0.25, "noise": 0.4, "rotation": 0.3, "texture": 0.3},
    "vit": {"contrast": 0.5, "noise": 0.7, "rotation": 0.3, "texture": 0.7},
}

# Steps until both towers read more than 95% of the un-shifted digits.
_PRETRAIN_STEPS: dict[str, int] = {"bn": 150, "vit": 300}


def _group(name: str) -> dict[str, str]:
    return {"group": name}


@dataclass(frozen=True)
class DemoConfig:
    """Choices of ``ueo-fast demo``.

    The learning rates and the number of epochs were chosen on the seeds 100 to 104, which are not
    among the default ones: docs/demo.md has the grid.

    Attributes:
        tower: image tower of the tiny CLIP: 'bn' is a ResNet with BatchNorm, 'vit' a ViT.
        shift: how the target's images differ from those the model was trained on: low contrast,
            Gaussian noise, turned digits, or a coloured background.
        scenario: which classes the unlabelled images show: CSDA the known ones, nothing unknown
            anywhere; CDA all known ones; PDA some known; ODA all known and some unknown; OPDA some
            known and some unknown. Except in CSDA the test also holds unknown classes.
        seeds: one complete run per seed, which draws the split, the known digits, the initial
            weights and the order of the batches; the table shows mean and spread.
        out: run folder, new or empty; default: runs/demo-<date>-<time> in the current folder.
        severity: strength of the shift in [0, 1]; default: a value suited to tower and shift.
        pretrain_steps: pre-training steps on the source domain; default: 150 (bn) or 300 (vit).
        known_classes: how many of the ten digits are on the user's list of classes; has no effect
            under CSDA, where all ten are.
        epochs: passes over the unlabelled images; EntMin, InfoMax and UEO take the same gradient
            steps, AdaBN one pass without gradients.
        batch_size: images per step.
        prompt_lr: learning rate of the prompt's context; 0 freezes it.
        affine_lr: learning rate of the normalisation layers' affine parameters; 0 freezes them.
        trade_off: weight of the marginal entropy (UEO, InfoMax).
        mcm_scale: multiplies the cosines before the softmax that gives UEO's confidence weights.
        eps: added inside the logarithms; 1e-5 is the authors' released code.
        patch: run the image tower with the fused layers of ueo_fast.patch_visual; false runs
            PyTorch's own, to the same result up to rounding.
        threads: seeds that are computed at the same time, each in a process of its own on one
            thread, so that no number depends on it; default: one per processor.

    Raises:
        ValueError: a value outside its range; the message names it.
    """

    tower: Tower = field(default="bn", metadata=_group("model"))
    shift: Shift = field(default="contrast", metadata=_group("data"))
    scenario: Scenario = field(default="OPDA", metadata=_group("data"))
    seeds: tuple[int, ...] = field(default=(10, 11, 12, 13, 14), metadata=_group("training"))
    out: str | None = field(default=None, metadata=_group("output"))
    severity: float | None = field(default=None, metadata=_group("data"))
    pretrain_steps: int | None = field(default=None, metadata=_group("model"))
    known_classes: int = field(default=6, metadata=_group("data"))
    epochs: int = field(default=10, metadata=_group("training"))
    batch_size: int = field(default=64, metadata=_group("training"))
    prompt_lr: float = field(default=1e-3, metadata=_group("training"))
    affine_lr: float = field(default=3e-2, metadata=_group("training"))
    trade_off: float = field(default=1.0, metadata=_group("method"))
    mcm_scale: float = field(default=1.0, metadata=_group("method"))
    eps: float = field(default=0.0, metadata=_group("method"))
    patch: bool = field(default=True, metadata=_group("speed"))
    threads: int | None = field(default=None, metadata=_group("speed"))

    def __post_init__(self) -> None:
        for name, choices in (("tower", Tower), ("shift", Shift), ("scenario", Scenario)):
            check_one_of(name, getattr(self, name), get_args(choices))
        object.__setattr__(self, "seeds", tuple(self.seeds))
        if not self.seeds:
            raise ValueError("seeds is empty: give at least one, e.g. --seeds 0 1 2")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(
                f"seeds has repetitions, which would fake a small spread: {self.seeds}"
            )
        if self.out == "":
            raise ValueError(
                "out is empty: name a folder, or leave it out for a new one under runs/"
            )
        if self.severity is not None and not 0.0 <= self.severity <= 1.0:
            raise ValueError(f"severity must lie in [0, 1], got {self.severity}")
        if not 2 <= self.known_classes <= 9:
            raise ValueError(
                f"known_classes must lie in 2..9, so that some of the ten digits are unknown, got "
                f"{self.known_classes}; for a closed set use --scenario CSDA"
            )
        if self.pretrain_steps is not None:
            check_count("pretrain_steps", self.pretrain_steps)
        if self.threads is not None:
            check_count("threads", self.threads, 1, MOST_THREADS)
        check_number("mcm_scale", self.mcm_scale, sign="positive")
        check_number("eps", self.eps, sign="not negative")
        check_number("trade_off", self.trade_off, sign="any", most=LARGEST_FACTOR)
        for seed in self.seeds:
            check_count("seeds", seed, 0, 2**63 - 1)
        self.trainer(seed=0)  # checks epochs, batch_size and the learning rates
        if self.prompt_lr == 0 and self.affine_lr == 0:
            raise ValueError("nothing to train: prompt_lr and affine_lr are both 0")

    @property
    def effective_severity(self) -> float:
        """``severity``, or the value suited to tower and shift."""
        if self.severity is not None:
            return self.severity
        return _SEVERITY[self.tower][self.shift]

    @property
    def effective_pretrain_steps(self) -> int:
        """``pretrain_steps``, or the tower's."""
        return self.pretrain_steps or _PRETRAIN_STEPS[self.tower]

    def trainer(self, seed: int) -> TrainerConfig:
        """Budget and optimiser of the methods that are trained."""
        return TrainerConfig(
            epochs=self.epochs,
            batch_size=self.batch_size,
            prompt_lr=self.prompt_lr,
            affine_lr=self.affine_lr,
            seed=seed,
        )

    def as_dict(self) -> dict[str, Any]:
        """What ``--config`` reads back; without ``out``, so that a rerun gets its own folder."""
        return flat(self, without=("out",))

    def command(self) -> str:
        """The shortest command that gives the same run; without ``--out``."""
        return shortest_command("demo", self, without=("out",))
