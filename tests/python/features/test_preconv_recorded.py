"""The frozen network's call as a recording: on CUDA devices that are none, and at the end on CUDA itself."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import cnnrs
from cnnrs.engine import cuda_capture
from cnnrs.engine.recording import WARM_UP
from cnnrs.features.pipeline import Pipeline
from cnnrs.features.recorded import Recorded
from fake_cuda import FakeCuda
from gpu_batches import TRANSFORM, Large, batches, layers, preconv


def replays(cuda: FakeCuda) -> int:
    return len([what for what, _ in cuda.launches if what == "a graph"])


@pytest.mark.parametrize("device", ["cuda:0", "cuda:1"])
@pytest.mark.parametrize("options", [{}, {"precision": "bf16"}, {"dtype": "float16"}])
def test_full_batches_are_replayed(fake_cuda: FakeCuda, device: str, options: Any) -> None:
    data = [*batches(8), (batches(1)[0][0][:3], torch.arange(3))]
    expected = preconv(data, layers().to(device), engine="python", **options)
    assert replays(fake_cuda) == 0
    found = preconv(data, layers().to(device), **options)
    # After those that warm up, and the one that it is compared with.
    assert replays(fake_cuda) == 8 - WARM_UP
    assert torch.equal(found.features, expected.features)


def test_what_is_no_graph_or_draws_is_called(fake_cuda: FakeCuda) -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = layers()
            self.calls = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return self.layers(x)  # type: ignore[no-any-return]

    class Drawing(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.dropout(x.flatten(1))

    model = Counting().cuda()
    preconv(batches(), model)
    assert model.calls == 7
    with pytest.warns(UserWarning, match="drawn at random"):
        preconv(batches(), nn.Sequential(Drawing(), nn.Linear(1728, 2)).cuda())
    assert replays(fake_cuda) == 0


def test_a_recording_that_fails_is_said_once_and_loses_nothing(
    fake_cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(work: Callable[[], None], stream: Any) -> Callable[[], None]:
        try:
            raise RuntimeError("an operation that waits\nC++ stack")
        finally:
            # As CUDA does about the end of a recording that went wrong.
            raise RuntimeError("operation failed due to a previous error during capture")

    expected = preconv(batches(), layers().cuda()).features
    monkeypatch.setitem(cuda_capture.RECORDERS, "cuda", fails)
    words = "is called for every batch: RuntimeError: an operation that waits$"
    with pytest.warns(UserWarning, match=words) as notes:
        assert torch.equal(preconv(batches(), layers().cuda()).features, expected)
    assert len([one for one in notes if "CUDA graph" in str(one.message)]) == 1


def test_a_network_that_waits_is_called(fake_cuda: FakeCuda) -> None:
    network = Recorded(lambda x: x * x.sum().item(), torch.device("cuda:1"))
    with pytest.warns(UserWarning, match="is called for every batch: HostWait: the host waits while a graph is rec"):
        for number in range(8):
            assert network(torch.full((2,), float(number)).to("cuda:1")).tolist() == [2.0 * number**2] * 2


def test_ctrl_c_while_recording_is_ctrl_c(fake_cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(work: Callable[[], None], stream: Any) -> Callable[[], None]:
        try:
            raise KeyboardInterrupt
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")

    monkeypatch.setitem(cuda_capture.RECORDERS, "cuda", interrupted)
    with pytest.raises(KeyboardInterrupt):
        preconv(batches(), layers().cuda())


def test_a_replay_that_computes_something_else_is_not_used(
    fake_cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = preconv(batches(), layers().cuda()).features
    real = cuda_capture._record

    def wrong(work: Callable[[], None], stream: Any) -> Callable[[], None]:
        real(work, stream)
        return lambda: None

    monkeypatch.setitem(cuda_capture.RECORDERS, "cuda", wrong)
    with pytest.warns(UserWarning, match="its replay computes other numbers"):
        assert torch.equal(preconv(batches(), layers().cuda()).features, expected)


def resumed(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first run replays where the second one calls, and the other way round."""
    data = cnnrs.ImageFolder(folder, TRANSFORM)

    def run(out: str) -> bytes:
        preconv(data, layers().cuda(), out=tmp_path / out, batch_size=2)
        return (tmp_path / out / "features.npy").read_bytes()

    expected = run("whole")
    launch = Pipeline._launch
    left = [9]

    def interrupted(self: Pipeline, inputs: torch.Tensor) -> Any:
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        return launch(self, inputs)

    monkeypatch.setattr(Pipeline, "_launch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run("killed")
    assert not (tmp_path / "killed" / "features.npy").exists()
    assert run("killed") == expected and -10 < left[0] < -3


def test_a_resumed_run_has_the_same_bytes(
    fake_cuda: FakeCuda, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resumed(folder, tmp_path, monkeypatch)


# -- CUDA itself -------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_cuda_resumes_with_the_same_bytes(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resumed(folder, tmp_path, monkeypatch)


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"precision": "bf16"}, {"precision": "fp16"}, {"dtype": "float16"}])
def test_cuda_replays_what_it_computes(monkeypatch: pytest.MonkeyPatch, options: Any) -> None:
    data = [*batches(8), (batches(1)[0][0][:3], torch.arange(3))]
    expected = preconv(data, layers(), device="cuda", engine="python", **options)
    replayed: list[int] = []

    def counting(work: Callable[[], None], stream: Any) -> Callable[[], None]:
        run = cuda_capture._record(work, stream)
        return lambda: (replayed.append(1), run())[1]  # type: ignore[func-returns-value]

    monkeypatch.setitem(cuda_capture.RECORDERS, "cuda", counting)
    found = preconv(data, layers(), device="cuda", **options)
    assert len(replayed) == 8 - WARM_UP
    assert found.features.dtype == expected.features.dtype and torch.equal(found.features, expected.features)


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["cuda:0", "cuda:1"])
def test_cuda_rows_have_landed(device: str) -> None:
    if torch.device(device).index >= torch.cuda.device_count():
        pytest.skip(f"needs {device}")
    # Rows of several MiB, whose copies take longer than it takes to ask for them.
    data = [(torch.full((4, 1 << 20), float(number)), torch.arange(4)) for number in range(12)]
    model = nn.LeakyReLU(inplace=False).to(device)
    model.register_buffer("place", torch.zeros((), device=device))
    found = preconv(data, model)
    assert torch.equal(found.features[:, 0], torch.arange(12.0).repeat_interleave(4))
    assert torch.equal(found.features.amin(1), found.features.amax(1))


@pytest.mark.gpu
def test_cuda_waits_for_no_batch() -> None:
    counts = []
    for count in (6, 12):
        model = layers().cuda()
        data = batches(count)
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as found:
                warnings.simplefilter("always")
                preconv(data, model, dtype="float16")
        finally:
            torch.cuda.set_sync_debug_mode("default")
        counts.append(len([one for one in found if "synchronizing" in str(one.message)]))
    assert counts[0] == counts[1]


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["infinite", "NaN"])
def test_cuda_flags_what_overflows(kind: str) -> None:
    with pytest.raises(ValueError, match="a feature is infinite or NaN: in float16"):
        preconv(batches(), Large(kind), device="cuda", precision="fp16")


@pytest.mark.gpu
def test_cuda_gets_bytes_of_a_data_set(folder: Path) -> None:
    data = cnnrs.ImageFolder(folder, TRANSFORM)
    found = preconv(data, layers(), device="cuda", precision="exact")
    expected = preconv(data, layers(), engine="python")
    # Sums of 2,904 products of values around one, in another order: each rounded by 6e-8.
    assert (
        torch.allclose(found.features, expected.features, rtol=0, atol=2e-4) and found.labels.tolist() == data.targets
    )
