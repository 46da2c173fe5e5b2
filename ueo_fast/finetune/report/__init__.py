"""One HTML page that tells what a run did."""

from ueo_fast.finetune.report.page import write_report
from ueo_fast.finetune.report.read_run import RunData, read_run
from ueo_fast.finetune.report.thumbnails import write_thumbnails

__all__ = ["RunData", "read_run", "write_report", "write_thumbnails"]
