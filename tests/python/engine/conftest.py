"""Steps that are recorded: with a stand-in on the CPU and, where there is a GPU, on it too."""

from __future__ import annotations

import pytest
import torch

from cnnrs.engine import choice, cuda_capture
from recorded import Counting, Recorder


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU"))])  # fmt: skip
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def recorder(device: str, monkeypatch: pytest.MonkeyPatch) -> Recorder:
    made = Recorder() if device == "cpu" else Counting()
    monkeypatch.setitem(cuda_capture.RECORDERS, device, made)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    # As on CUDA, where there is no engine "cpu" that "auto" would take first.
    monkeypatch.setattr(choice, "slow_on_cpu", lambda lowered: ["made so"])
    return made
