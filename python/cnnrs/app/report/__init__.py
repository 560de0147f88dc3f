"""report.html: one self-contained page about a trained classifier."""

from cnnrs.app.report.evidence import Evidence
from cnnrs.app.report.page import write_report

__all__ = ["Evidence", "write_report"]
