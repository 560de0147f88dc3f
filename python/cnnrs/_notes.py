"""Warnings that point at the user's own code."""

from __future__ import annotations

import sys
import warnings


def note(message: str) -> None:
    """A warning at the user's line, however deep in cnnrs and torch it is found out."""
    level = 2
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("cnnrs", "torch"):
        frame = frame.f_back
        level += 1
    warnings.warn(message, stacklevel=level)
