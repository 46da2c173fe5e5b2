"""`ueo-fast compare`: runs side by side."""

from __future__ import annotations

from pathlib import Path

from ueo_fast.finetune.commands.options import CompareConfig
from ueo_fast.finetune.evaluation.compare import compare_runs


def run(config: CompareConfig) -> None:
    """Print the tables."""
    comparison = compare_runs([Path(name) for name in config.runs])
    print(comparison.markdown() if config.markdown else comparison.text())
