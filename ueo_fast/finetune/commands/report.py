"""`ueo-fast report`: one HTML page that tells what a run did."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ueo_fast.finetune.report import write_report


@dataclass(frozen=True)
class ReportConfig:
    """Choices of ``ueo-fast report``."""

    run: str = field(metadata={"help": "folder of a run of ueo-fast finetune", "positional": True})
    out: str | None = field(
        default=None, metadata={"help": "the page; default: report.html in the run folder"}
    )


def run(config: ReportConfig) -> None:
    """Write the page and say where it is."""
    path = write_report(Path(config.run), None if config.out is None else Path(config.out))
    print(f"report: {path}")
