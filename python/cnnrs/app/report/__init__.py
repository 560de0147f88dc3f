"""report.html: one self-contained page about a trained classifier."""

from cnnrs.app.report.page import Evidence, write_report

__all__ = ["Evidence", "write_report"]
