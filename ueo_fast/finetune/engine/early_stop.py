"""Stops when the mutual information of image and prediction no longer rises; needs no labels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ueo_fast.finetune.clip.adapted_state import adapted_state, load_adapted_state
from ueo_fast.finetune.clip.model import ClipClassifier
from ueo_fast.finetune.files.run_files import EpochRecord


class EarlyStop:
    """Keeps the state of the best epoch.

    Mutual information (marginal minus conditional entropy) is high where predictions are certain
    and spread over the classes. It is that of the predictions which training made during the epoch.

    Args:
        classifier: before the training; its state is the best until an epoch is over.
        patience: epochs without a rise after which to stop.
    """

    def __init__(self, classifier: ClipClassifier, patience: int) -> None:
        self._classifier = classifier
        self._patience = patience
        self._information: float | None = None
        self._state = adapted_state(classifier)
        self.best_epoch = 0

    def epoch(self, record: EpochRecord) -> str | None:
        """Take notice of an epoch, when the classifier has its state.

        Returns:
            Why to stop, or ``None`` to go on.
        """
        if self._information is None or record.mutual_information > self._information:
            self._information = record.mutual_information
            self._state = adapted_state(self._classifier)
            self.best_epoch = record.epoch
        elif record.epoch - self.best_epoch >= self._patience:
            return (
                f"the mutual information has not risen for {self._patience} epoch(s) since epoch "
                f"{self.best_epoch}, whose state was kept"
            )
        return None

    def restore(self) -> int:
        """Put the best epoch's state back.

        Returns:
            That epoch; 0 is before the training.
        """
        load_adapted_state(self._classifier, self._state)
        return self.best_epoch

    def state(self) -> tuple[dict[str, Tensor], dict[str, object]]:
        """Tensors and values, for a checkpoint."""
        return self._state, {"information": self._information, "best_epoch": self.best_epoch}

    def load(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """The inverse of :meth:`state`."""
        self._state = dict(tensors)
        self._information = values["information"]
        self.best_epoch = values["best_epoch"]
