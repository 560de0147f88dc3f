"""The devices that are none: what is wrong on a GPU is wrong there, what is right runs and computes the same."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fake_cuda import FakeCuda, HostWait, Race
from host_waits import no_host_waits

pytestmark = pytest.mark.usefixtures("fake_cuda")


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5))


def test_tensors_are_where_they_were_put() -> None:
    x = torch.ones(2, 3, device="cuda:1")
    assert x.device == torch.device("cuda:1") and x.is_cuda and x.get_device() == 1
    assert (x[0] + 1).device == x.device and torch.zeros_like(x).device == x.device
    assert x.cpu().device.type == "cpu" and x.to("cuda").device == torch.device("cuda:0")
    assert torch.tensor([1, 2], device="cuda").device.index == 0 and torch.ones(2).cuda(1).device.index == 1
    assert x.to(torch.float16).device == x.device and x.cpu().to(x).device == x.device
    model = copy.deepcopy(network().cuda())
    assert {t.device for t in model.state_dict().values()} == {torch.device("cuda:0")}
    with pytest.raises(RuntimeError, match="on the same device, but found cpu, cuda:0"):
        model(torch.ones(2, 3, 6, 6))
    with pytest.raises(RuntimeError, match="on the same device, but found cuda:0, cuda:1"):
        x.to("cuda:0") + x
    with pytest.raises(RuntimeError, match="invalid device ordinal"):
        torch.ones(2, device="cuda:2")
    with pytest.raises(TypeError, match="can't convert cuda:1"):
        x.numpy()


def test_training_computes_the_same(fake_cuda: FakeCuda) -> None:
    x, y = torch.randn(4, 3, 6, 6), torch.arange(4)
    losses = []
    for device in ("cpu", "cuda:1"):
        model = network().to(device)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for _ in range(3):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x.to(device)), y.to(device))
            loss.backward()
            optimizer.step()
        losses.append(float(loss))
        assert {p.grad.device for p in model.parameters() if p.grad is not None} == {torch.device(device)}
    assert losses[0] == losses[1]
    assert fake_cuda.waits[-1].startswith("item(), bool(), int() or float()")


def side() -> Any:
    return torch.cuda.Stream("cuda:1")


def reads_too_early(x: torch.Tensor) -> None:
    with torch.cuda.stream(side()):
        x + 1


def reads_what_another_stream_makes(x: torch.Tensor) -> None:
    with torch.cuda.stream(side()):
        y = torch.ones(3, device="cuda:1")
    y.record_stream(torch.cuda.current_stream("cuda:1"))
    x + y


def writes_while_another_stream_reads(x: torch.Tensor) -> None:
    stream = side()
    stream.wait_stream(torch.cuda.current_stream("cuda:1"))
    with torch.cuda.stream(stream):
        x + 1
    x.zero_()


def host_reads_before_the_copy_has_landed(x: torch.Tensor) -> None:
    host = torch.empty(3, pin_memory=True)
    host.copy_(x, non_blocking=True)
    host.numpy()


def event_on_another_stream(x: torch.Tensor) -> None:
    host = torch.empty(3, pin_memory=True)
    host.copy_(x, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    event.synchronize()
    host.sum()


def host_writes_while_it_is_copied(x: torch.Tensor) -> None:
    host = torch.ones(3).pin_memory()
    x.copy_(host, non_blocking=True)
    host.zero_()


def synchronizes_another_device(x: torch.Tensor) -> None:
    host = torch.empty(3, pin_memory=True)
    host.copy_(x, non_blocking=True)
    torch.cuda.synchronize()
    host.sum()


def gives_memory_back_too_early(x: torch.Tensor) -> None:
    stream = side()
    y = x * 2
    stream.wait_stream(torch.cuda.current_stream("cuda:1"))
    with torch.cuda.stream(stream):
        y + 1
    del y
    torch.ones(3, device="cuda:1")


@pytest.mark.parametrize("wrong", [
    reads_too_early, reads_what_another_stream_makes, writes_while_another_stream_reads,
    host_reads_before_the_copy_has_landed, event_on_another_stream, host_writes_while_it_is_copied,
    synchronizes_another_device, gives_memory_back_too_early,
])  # fmt: skip
def test_races_are_found(wrong: Callable[[torch.Tensor], None]) -> None:
    x = torch.ones(3, device="cuda:1")
    with pytest.raises(Race) as error:
        wrong(x)
    # Both places, or the one of the access that may not be over.
    assert str(error.value).count("test_fake_cuda.py") == (1 if wrong is gives_memory_back_too_early else 2)
    torch.cuda.synchronize("cuda:1")


def test_what_is_in_order_is_no_race(fake_cuda: FakeCuda) -> None:
    stream = side()
    x = torch.ones(3, device="cuda:1")
    current = torch.cuda.current_stream("cuda:1")
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        assert torch.cuda.current_device() == 1
        y = torch.ones(3).pin_memory().to("cuda:1", non_blocking=True) + x
        host = torch.empty(3, pin_memory=True)
        host.copy_(y, non_blocking=True)
        event = stream.record_event()
    assert not event.query() and fake_cuda.waits == []
    current.wait_event(event)
    z = y * 2
    y.record_stream(current)
    del y
    event.synchronize()
    assert event.query() and host.tolist() == [2, 2, 2]
    assert z.cpu().tolist() == [4, 4, 4]
    assert [one.split(" at ")[0] for one in fake_cuda.waits] == ["Event.synchronize", "a copy cuda:1 -> cpu"]


@pytest.mark.parametrize("wait, words", [
    (lambda x: x.sum().item(), r"item\(\)"), (lambda x: x[x > 0], "an index of booleans"),
    (lambda x: x.nonzero(), "nonzero"), (lambda x: x[[0, 1]], "an index that is on the host"),
    (lambda x: x.cpu(), "a copy cuda:0 -> cpu"), (lambda x: x.copy_(torch.zeros(3)), "a copy cpu -> cuda:0"),
    (lambda x: torch.tensor([1.0], device="cuda"), "a copy cpu -> cuda:0"),
    (lambda x: torch.masked_select(x, x > 0), "masked_select"), (lambda x: x.tolist(), "tolist"),
])  # fmt: skip
def test_the_host_waits(fake_cuda: FakeCuda, wait: Callable[[torch.Tensor], Any], words: str) -> None:
    x = torch.ones(3, device="cuda")
    wait(x)
    (found,) = fake_cuda.waits
    assert found.startswith(words.replace("\\", "")) and "test_fake_cuda.py" in found
    # Nor can it be recorded.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with pytest.raises(HostWait, match=words), torch.cuda.graph(torch.cuda.CUDAGraph(), stream=stream):
        wait(x)


@pytest.mark.parametrize("wait", [
    lambda x: x.sum().item(), lambda x: x[x > 0], lambda x: bool((x > 0).all()), lambda x: x.unique(),
    lambda x: torch.repeat_interleave(x, torch.tensor([1, 2, 3])),
])  # fmt: skip
def test_waits_are_found_on_the_cpu(wait: Callable[[torch.Tensor], Any]) -> None:
    with pytest.raises(HostWait, match="the host waits for the device"), no_host_waits():
        wait(torch.ones(3))
    with no_host_waits():
        F.cross_entropy(torch.ones(1, 3), torch.tensor([0]))


def test_a_graph_computes_when_it_is_replayed(fake_cuda: FakeCuda) -> None:
    model = network().eval().cuda()
    images = torch.randn(2, 3, 6, 6).cuda()
    total = torch.zeros(5, device="cuda")
    stream = torch.cuda.Stream()
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph, stream=stream):
        out = model(images)
        total += out.sum(0)
    assert total.tolist() == [0] * 5
    stream.wait_stream(torch.cuda.current_stream())
    expected = torch.zeros(5)
    for _ in range(2):
        images.copy_(torch.randn(2, 3, 6, 6))
        graph.replay()
        with torch.no_grad():
            wanted = model(images)
        assert torch.equal(out, wanted)
        expected += wanted.sum(0).cpu()
    assert torch.equal(total.cpu(), expected)
    images.zero_()
    with torch.cuda.stream(stream), pytest.raises(Race, match="a graph is reading"):
        graph.replay()


def test_outside_everything_is_as_before() -> None:
    assert torch.cuda.is_available() and torch.ones(1).cuda().is_cuda


def test_outside(request: pytest.FixtureRequest) -> None:
    cuda = request.getfixturevalue("fake_cuda")
    x = torch.ones(1).cuda()
    cuda.__exit__()
    try:
        assert (
            x.device.type == "cpu" and torch.cuda.Stream is not type(cuda) and "fake_cuda" not in str(torch.cuda.Stream)
        )
    finally:
        cuda.__enter__()
