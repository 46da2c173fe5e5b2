"""What one method did on one seed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ueo_fast.finetune.engine.hooks import History
from ueo_fast.finetune.evaluation.metrics import Metrics


@dataclass(frozen=True)
class MethodResult:
    """What one method did on one seed.

    Attributes:
        seed: of the problem.
        method: title of the method, as in the table.
        known: names of the known classes, in the order of ``metrics.class_accuracies``.
        metrics: on the whole shifted target.
        scores: (N,) MCM score of each target image.
        history: one entry per gradient step.
        seconds: wall time of the adaptation.
    """

    seed: int
    method: str
    known: tuple[str, ...]
    metrics: Metrics
    scores: Tensor
    history: History
    seconds: float

    def record(self) -> dict[str, Any]:
        """The line of ``metrics.jsonl``."""
        return {
            "seed": self.seed,
            "method": self.method,
            "known_classes": list(self.known),
            "seconds": round(self.seconds, 3),
            **self.metrics.as_dict(),
        }

    def history_record(self) -> dict[str, Any]:
        """The line of ``history.jsonl``."""
        return {"seed": self.seed, "method": self.method, **self.history.as_dict()}
