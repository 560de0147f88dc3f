"""Warnings that point at the user's own code."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Hashable


def note(message: str) -> None:
    """A warning at the user's line, however deep in cnnrs and torch it is found out."""
    level = 2
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("cnnrs", "torch"):
        frame = frame.f_back
        level += 1
    warnings.warn(message, stacklevel=level)


_noted: set[Hashable] = set()


def is_news(key: Hashable) -> bool:
    """Whether this process has not asked for ``key`` before."""
    if key in _noted:
        return False
    _noted.add(key)
    return True


def note_once(key: Hashable, message: str) -> None:
    """As :func:`note`, but only the first time in this process that there is something to say about ``key``."""
    if is_news(key):
        note(message)


def forget_notes() -> None:
    """Everything is news again: for tests, which come one after the other in one process."""
    _noted.clear()
