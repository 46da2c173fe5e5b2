"""`ueo-fast compare`: runs side by side."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ueo_fast.finetune.evaluation.compare import compare_runs


@dataclass(frozen=True)
class CompareConfig:
    """Choices of ``ueo-fast compare``."""

    runs: tuple[str, ...] = field(
        metadata={"help": "folders of runs of ueo-fast finetune", "positional": True}
    )
    markdown: bool = field(default=False, metadata={"help": "print GitHub tables"})

    def __post_init__(self) -> None:
        object.__setattr__(self, "runs", tuple(self.runs))


def run(config: CompareConfig) -> None:
    """Print the tables."""
    comparison = compare_runs([Path(name) for name in config.runs])
    print(comparison.markdown() if config.markdown else comparison.text())
