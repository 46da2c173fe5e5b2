"""One HTML page about a run."""

from ueo_fast.finetune.report.page import write_report
from ueo_fast.finetune.report.run_data import RunData, read_run, write_thumbnails

__all__ = ["RunData", "read_run", "write_report", "write_thumbnails"]
