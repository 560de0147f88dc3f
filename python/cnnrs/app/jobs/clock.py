"""Where the time of a command went, and what was typed."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class Clock:
    """Seconds per stage, in order."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.stages: dict[str, float] = {}

    def add(self, name: str, seconds: float) -> None:
        """More seconds of a stage."""
        self.stages[name] = self.stages.get(name, 0.0) + seconds

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measure the block."""
        before = time.perf_counter()
        try:
            yield
        finally:
            self.add(name, time.perf_counter() - before)


def typed(call: str) -> str:
    """The command that was typed; from Python the name of what was called."""
    if Path(sys.argv[0]).stem in ("cnnrs", "__main__"):
        return shlex.join(["cnnrs", *sys.argv[1:]])
    return f"{call}(...)"
