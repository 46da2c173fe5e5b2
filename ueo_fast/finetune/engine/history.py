"""What a training run gives back, and how it fails."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

SERIES = ("loss", "conditional_entropy", "marginal_entropy")
"""The fields of :class:`History` that have one number per step."""


@dataclass
class History:
    """One entry per step, of all steps: a resumed run has those before it was killed, too.

    Attributes:
        loss: the value of the method's loss.
        conditional_entropy: mean entropy of the batch's predictions, nats; every image weighs the
            same, so that methods can be compared.
        marginal_entropy: entropy of the batch's mean prediction, nats, at most log C. Near 0 it
            says that everything is put into one class: the training has collapsed.
        stopped: why the training ended before its last step; ``None`` where it did not.
        kept_epoch: with early stopping, the epoch whose state the classifier was left in (0: that
            before the training); else ``None``.
        online: (N, C) predictions that were made on the way, where the method makes such.
    """

    loss: list[float] = field(default_factory=list)
    conditional_entropy: list[float] = field(default_factory=list)
    marginal_entropy: list[float] = field(default_factory=list)
    stopped: str | None = None
    kept_epoch: int | None = None
    online: Tensor | None = field(default=None, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.loss)

    def __repr__(self) -> str:
        last = f", last loss {self.loss[-1]:.4g}" if self.loss else ""
        stopped = f", stopped {self.stopped}" if self.stopped else ""
        return f"History({len(self)} steps{last}{stopped})"

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers, lists and ``None``, without ``online``: what JSON can hold."""
        series = {name: list(getattr(self, name)) for name in SERIES}
        return {**series, "stopped": self.stopped, "kept_epoch": self.kept_epoch}


class NonFiniteLossError(RuntimeError):
    """Loss or gradient became NaN or infinite; the weights are those of the step before."""
