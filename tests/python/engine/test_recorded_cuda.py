"""Recorded steps on devices that are none: whose stream does what, what the host waits for, what failures leave."""

from __future__ import annotations

import copy
import gc
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import Optimizer

import cnnrs
import fake_cuda as fakes
import tutorial
from cnnrs._util import streams
from cnnrs.engine import choice, cuda_capture, cuda_graph, explain
from cnnrs.engine.recording import WARM_UP, WINDOW
from cnnrs.training import batches as training_batches
from cnnrs.training import epochs
from fake_cuda import FakeCuda
from recorded import FULL, Counting, Net, adam, assert_same, batches, fit, sgd, twins

#: Not the current one.
DEVICE = "cuda:1"


@pytest.fixture
def recorder(fake_cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> Counting:
    """Lets ``fit`` take the devices for real ones."""
    made = Counting()
    monkeypatch.setitem(cuda_capture.RECORDERS, "cuda", made)
    # What makes the devices are modes, of this thread only, which nobody but the module itself obeys.
    monkeypatch.setattr(epochs, "unseen_by_libtorch", list)
    monkeypatch.setattr(epochs, "unseen_by_cpu", list)
    group = Optimizer._group_tensors_by_device_and_dtype
    # C++ sees that their memory is the CPU's.
    monkeypatch.setattr(Optimizer, "_group_tensors_by_device_and_dtype", staticmethod(lambda *args, **options: {
        (torch.device(DEVICE), dtype): found for (_, dtype), found in group(*args, **options).items()
    }))  # fmt: skip
    monkeypatch.setattr(fakes, "accesses", and_statistics(fakes.accesses))
    return made


def and_statistics(accesses: Callable[..., Any]) -> Callable[..., Any]:
    """Batch norm writes its running statistics, which its schema does not say."""

    def found(func: Any, args: Any, kwargs: Any) -> Any:
        reads, writes = accesses(func, args, kwargs)
        if func._schema.name == "aten::native_batch_norm" and args[5]:
            writes = [*writes, *(one for one in args[3:5] if one is not None)]
        return reads, writes

    return found


def loaded(data: Any) -> Iterator[Any]:
    """Batches of the host, as a loader makes them."""
    return iter([(x.cpu(), y.cpu()) for x, y in data])


@pytest.mark.parametrize(
    "options", [{}, {"accumulate": 3}, {"on_batch_end": lambda *_: None}], ids=["plain", "accumulate", "on_batch_end"]
)
@pytest.mark.parametrize("make", [sgd, adam])
def test_the_plain_loops_bits_without_a_race(make: Any, options: dict[str, Any], recorder: Counting) -> None:
    theirs, their_optimizer, ours, our_optimizer = twins("cpu", recorder, make)
    ours.to(DEVICE)
    data = batches("cpu", (FULL,) * 9 + (3,))
    for seed in range(2):
        torch.manual_seed(seed)
        theirs.train()
        accumulate = options.get("accumulate", 1)
        for i, (x, y) in enumerate(data):
            if i % accumulate == 0:
                their_optimizer.zero_grad()
            (F.nll_loss(theirs(x), y) / accumulate).backward()
            if (i + 1) % accumulate == 0 or i + 1 == len(data):
                their_optimizer.step()
        torch.manual_seed(seed)
        fit(ours, our_optimizer, loaded(data), **options)
        assert tutorial.same(copy.deepcopy(ours).cpu().state_dict(), theirs.state_dict())
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert p.grad is not None and q.grad is not None and torch.equal(p.grad.cpu(), q.grad)
    assert recorder.recorded == 1 and recorder.replayed > 0


# -- what the host waits for --------------------------------------------------------------------------------------


def test_batches_are_neither_waited_for_nor_looked_at_one_by_one(fake_cuda: FakeCuda, recorder: Counting) -> None:
    _, _, model, optimizer = twins(DEVICE, recorder, adam)
    waits = []
    for windows in (2, 2, 5):
        data = batches("cpu", (FULL,) * (windows * WINDOW))
        fake_cuda.waits.clear()
        fit(model, optimizer, loaded(data))
        waits.append(Counter(fake_cuda.waits))
    # The first epoch also looks at the first batch, and records.
    (more,) = (waits[2] - waits[1]).items()
    assert more[0].startswith("Event.synchronize at meter.py") and more[1] == 3
    assert not waits[1] - waits[2] and sum(waits[1].values()) <= 8


def test_rows_on_the_device_are_not_touched_by_the_host(fake_cuda: FakeCuda, recorder: Counting) -> None:
    torch.manual_seed(0)
    features, targets = torch.randn(16 * WINDOW, 6), torch.randint(3, (16 * WINDOW,))
    theirs = nn.Linear(6, 3)
    ours = copy.deepcopy(theirs).to(DEVICE)
    their_sgd, our_sgd = sgd(theirs.parameters()), sgd(ours.parameters())
    for epoch in range(2):
        for begin in range(0, len(features), 4):
            rows = slice(begin, begin + 4)
            their_sgd.zero_grad()
            F.cross_entropy(theirs(features[rows]), targets[rows]).backward()
            their_sgd.step()
        fake_cuda.waits.clear()
        resident = cnnrs.FeatureDataset(features.to(DEVICE), targets.to(DEVICE))
        if epoch == 0:
            kept = resident
        fit(ours, our_sgd, cnnrs.DataLoader(kept, batch_size=4), loss_fn=F.cross_entropy)
    assert torch.equal(ours.weight.cpu(), theirs.weight)
    assert recorder.recorded == 1 and recorder.replayed == (32 - WARM_UP) // 8 + 4
    looks = [wait for wait in fake_cuda.waits if "meter.py" in wait]
    assert len(looks) == 4


def test_batches_are_no_further_ahead_than_memory_goes(
    fake_cuda: FakeCuda, recorder: Counting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training_batches._Mover, "AHEAD", 0)
    _, _, model, optimizer = twins(DEVICE, recorder, sgd)
    data = batches("cpu", (FULL,) * 20)
    fit(model, optimizer, loaded(data))
    fake_cuda.waits.clear()
    fit(model, optimizer, loaded(data))
    waited = [wait for wait in fake_cuda.waits if "batches.py" in wait]
    # Two may be under way beside the one that is asked for.
    assert len(waited) == len(data) - 3


def test_recordings_share_one_stream_per_device(fake_cuda: FakeCuda, recorder: Counting) -> None:
    data = batches("cpu", (FULL,) * 6)
    for _ in range(3):
        _, _, model, optimizer = twins(DEVICE, recorder, sgd)
        for phase in ("training", "validation"):
            fit(model, optimizer, loaded(data), phase)
    assert recorder.recorded == 6
    on_device = [stream for stream, device in fake_cuda.streams.items() if device == torch.device(DEVICE)]
    # The default one, one for copies, one for steps.
    assert len(on_device) == 3 and set(streams._STREAMS) == {("copies", 1), ("recordings", 1)}


# -- targets from the host ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["auto", "python"])
@pytest.mark.parametrize("through", ["a list", "a loader of the device"])
def test_a_target_without_an_output_never_reaches_a_kernel(
    through: str, engine: Any, fake_cuda: FakeCuda, recorder: Counting
) -> None:
    _, _, model, optimizer = twins(DEVICE, recorder, sgd)
    images, targets = torch.randn(10 * FULL, 1, 10, 10), torch.randint(5, (10 * FULL,))
    targets[7 * FULL + 1] = 5
    if through == "a list":
        data: Any = list(zip(images.split(FULL), targets.split(FULL), strict=True))
    else:
        dataset = torch.utils.data.TensorDataset(images, targets)
        data = cnnrs.DataLoader(dataset, batch_size=FULL, device=DEVICE)
    with pytest.raises(IndexError, match=r"Target 5 .* the model has 5 outputs.* \(training epoch 0, batch 7\)$"):
        fit(model, optimizer, data, engine=engine)
    assert all(p.isfinite().all() for p in model.parameters())
    targets[7 * FULL + 1] = 4
    fit(model, optimizer, data, engine=engine)


# -- what is said of it -------------------------------------------------------------------------------------------


def test_explain_says_what_is_recorded(recorder: Counting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(explain, "lower", choice.lower)
    model = Net().to(DEVICE)
    said = str(cnnrs.explain(model, (2, 1, 10, 10)))
    assert "whole steps are recorded on cuda:1 once, and replayed; one kernel after the other with fp16, " in said
    model.norm.momentum = None
    said = str(cnnrs.explain(model, (2, 1, 10, 10)))
    assert (
        "steps run one kernel after the other on cuda:1: a batch norm with momentum=None counts batches on the host"
        in said
    )


# -- recordings that fail -----------------------------------------------------------------------------------------


def test_a_step_that_waits_goes_on_eagerly(recorder: Counting, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loss that were taken for one that does not."""
    theirs, their_sgd, ours, our_sgd = twins(DEVICE, recorder, sgd)
    data = batches(DEVICE, (FULL,) * 6)

    def waits(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(outputs, targets) * (targets[targets >= 0].numel() > 0)

    monkeypatch.setattr(cuda_graph, "known_loss", lambda loss: {"kind": "mse"})
    torch.manual_seed(0)
    theirs.train()
    for x, y in data:
        their_sgd.zero_grad()
        waits(theirs(x), y).backward()
        their_sgd.step()
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="runs eagerly: HostWait: .* an index of booleans"):
        fit(ours, our_sgd, data, loss_fn=waits)
    assert_same(ours, our_sgd, theirs, their_sgd)


class Generator:
    """CUDA's: of a torch that leaves it in a recording that has failed, it draws no more."""

    def __init__(self, device: Any = None) -> None:
        self.state = torch.zeros(16, dtype=torch.uint8)
        self.recording = False

    def get_state(self) -> torch.Tensor:
        return self.state.clone()

    def set_state(self, state: torch.Tensor) -> None:
        self.state = state.clone()

    def graphsafe_set_state(self, other: Generator) -> None:
        self.state, self.recording = other.state, other.recording


class Torch:
    """What a recording that fails leaves behind.

    Args:
        heals: whether its end takes allocator and generator out of it, as in newer versions.
    """

    def __init__(self, heals: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        self.heals = heals
        self.pools: list[Any] = []
        self.released: list[Any] = []
        self.generator = Generator()
        monkeypatch.setattr(torch.cuda, "graph", self.graph)
        monkeypatch.setattr(torch.cuda, "default_generators", (Generator(), self.generator))
        monkeypatch.setattr(torch, "Generator", Generator)
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", self.end, raising=False)
        monkeypatch.setattr(torch._C, "_cuda_releasePool", lambda _, pool: self.released.append(pool), raising=False)
        monkeypatch.setattr(cuda_capture, "_draw", self.draw)

    def graph(self, graph: Any, pool: Any, **_: Any) -> Any:
        return Attempt(self, pool)

    def end(self, device: int, pool: Any) -> None:
        assert device == 1
        if pool not in self.pools:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.pools.remove(pool)

    def draw(self, device: torch.device) -> None:
        self.generator.state[0] += 4
        if self.generator.recording:
            raise RuntimeError("Offset increment outside graph capture encountered unexpectedly.")


class Attempt:
    def __init__(self, of: Torch, pool: Any) -> None:
        self.of, self.pool = of, pool

    def __enter__(self) -> None:
        self.of.pools.append(self.pool)
        self.of.generator.recording = True

    def __exit__(self, *error: Any) -> None:
        if self.of.heals:
            self.of.pools.remove(self.pool)
            self.of.generator.recording = False
        raise RuntimeError("operation failed due to a previous error during capture")


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("heals", [True, False])
def test_allocator_and_generator_leave_a_recording_that_failed(
    heals: bool, error: type[BaseException], fake_cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Torch(heals, monkeypatch)
    device = torch.device(DEVICE)
    before = cuda_capture.generation(device)

    def work() -> None:
        raise error

    with pytest.raises(RuntimeError) as raised:
        cuda_capture._record(work, cuda_capture.stream_of(device))
    assert isinstance(raised.value.__context__, error)
    assert made.pools == [] and len(made.released) == (0 if heals else 1)
    assert not made.generator.recording and made.generator.state.tolist() == [0] * 16
    assert torch.cuda.current_stream(device) == torch.cuda.default_stream(device)
    # What was recorded earlier would draw from the generator that is no more.
    assert cuda_capture.generation(device) == before + (0 if heals else 1)


def test_what_was_recorded_with_another_generator_is_recorded_anew(recorder: Counting) -> None:
    _, _, model, optimizer = twins(DEVICE, recorder, sgd)
    for times, recorded in ((0, 1), (0, 1), (1, 2)):
        cuda_capture._replaced[torch.device(DEVICE)] += times
        fit(model, optimizer, batches(DEVICE, (FULL,) * 6))
        assert recorder.recorded == recorded


def test_recordings_die_with_their_model(recorder: Counting) -> None:
    _, _, model, optimizer = twins(DEVICE, recorder, sgd)
    fit(model, optimizer, batches(DEVICE, (FULL,) * 6))
    before = len(cuda_graph._RECORDINGS)
    recorder.parameters = list
    del model, optimizer, _
    gc.collect()
    assert len(cuda_graph._RECORDINGS) == before - 1
