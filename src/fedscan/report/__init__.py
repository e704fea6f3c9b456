"""Reports: the record of a run, or of several, as one HTML page that a radiologist can read."""

from fedscan.report.page import write_comparison, write_report

__all__ = ["write_comparison", "write_report"]
