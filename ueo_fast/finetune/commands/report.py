"""`ueo-fast report`: one HTML page that tells what a run did."""

from __future__ import annotations

from pathlib import Path

from ueo_fast.finetune.commands.options import ReportConfig
from ueo_fast.finetune.report import write_report


def run(config: ReportConfig) -> None:
    """Write the page and say where it is."""
    path = write_report(Path(config.run), None if config.out is None else Path(config.out))
    print(f"report: {path}")
