"""Which engine computes an epoch: seen at the doors of the engines, whatever the choice between them says."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from cnnrs import _cnnrs
from cnnrs.engine import choice, cuda_capture, cuda_graph
from cnnrs.training import epochs

#: By engine, where its epochs pass, whoever asks for them.
DOORS: dict[str, tuple[Any, str]] = {
    "cpu": (_cnnrs, "fit_cpu"),
    "python": (_cnnrs, "fit_python"),
    "recorded": (cuda_graph, "run"),
    "torch": (epochs, "_run_lowered"),
}


@contextmanager
def watched() -> Iterator[list[str]]:
    """The engines that run within, in order."""
    calls: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        for engine, (module, name) in DOORS.items():
            original = getattr(module, name)

            def spy(*args: Any, engine: str = engine, original: Any = original) -> Any:
                calls.append(engine)
                return original(*args)

            patch.setattr(module, name, spy)
        yield calls


@contextmanager
def played() -> Iterator[None]:
    """``engine="auto"`` plays lowered models on the CPU as on CUDA; a "recorded" step is one that is called again."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(cuda_capture.RECORDERS, "cpu", lambda work, stream: work)
        patch.setattr(choice, "slow_on_cpu", lambda lowered: ["played"])
        yield
