"""What a recorded step does and does not do, and what is left of one that could not be recorded."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision import models as zoo

from cnnrs.engine import cuda_capture, cuda_graph
from cnnrs.engine.recording import WARM_UP
from cnnrs.model.lowering import lower
from cnnrs.model.player import OPERATIONS, play
from dry_run import DryRun
from host_waits import WAITS
from recorded import FULL, Recorder, adam, assert_same, batches, fit, sgd, twins

Work = Callable[[], None]


def waits(work: Work) -> list[str]:
    """Operations for which the host would wait, as the profiler sees them: under a mode some take other paths."""
    with torch.autograd.profiler.profile() as profile:
        work()
    found = [event for event in profile.function_events if event.name in WAITS]
    # The CPU's kernel reads the learning rate at once; CUDA's reads it on the device.
    return [event.name for event in found if "_fused_" not in _outermost(event).name]


def _outermost(event: Any) -> Any:
    while event.cpu_parent is not None:
        event = event.cpu_parent
    return event


class Strict(Recorder):
    """What it replays may not read back anything."""

    def __call__(self, work: Work, stream: Any) -> Work:
        self.looked = False

        def without_waits() -> None:
            if not self.looked:
                self.looked = True
                assert waits(work) == []
            else:
                work()

        return super().__call__(without_waits, stream)


@pytest.fixture
def strict(monkeypatch: pytest.MonkeyPatch, recorder: Recorder) -> Recorder:
    made = Strict()
    monkeypatch.setitem(cuda_capture.RECORDERS, "cpu", made)
    return made


WEIGHT = torch.tensor([1.0, 2.0, 0.5, 1.0, 3.0])
CLASSES: dict[str, Any] = {
    "nll_loss": F.nll_loss,
    "its options": nn.NLLLoss(WEIGHT, ignore_index=2),
    "cross_entropy": F.cross_entropy,
    "weights": nn.CrossEntropyLoss(WEIGHT, ignore_index=1),
    "smoothing": nn.CrossEntropyLoss(label_smoothing=0.1, ignore_index=0),
}
VALUES: dict[str, Any] = {
    "mse_loss": F.mse_loss,
    "bce": F.binary_cross_entropy_with_logits,
    "probabilities": F.cross_entropy,
    "weighed probabilities": functools.partial(F.cross_entropy, weight=WEIGHT),
}


def values(data: Any) -> Any:
    return [(x, F.one_hot(y, 5).float()) for x, y in data]


@pytest.mark.parametrize("device", ["cpu"])
@pytest.mark.parametrize("options", [
    {}, {"clip_grad_norm": 0.1}, {"clip_grad_value": 0.01}, {"accumulate": 2}, {"amp": "bf16"},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("make", [sgd, adam])
@pytest.mark.parametrize("name", [*CLASSES, *VALUES])
def test_nothing_in_a_step_waits_for_the_device(
    name: str, make: Any, options: dict[str, Any], device: str, strict: Recorder
) -> None:
    if options and (name not in ("weights", "bce") or make is not adam):
        pytest.skip("options are the same for every loss")
    _, _, model, optimizer = twins(device, strict, make)
    data = batches(device, (FULL,) * 6)
    loss_fn = (CLASSES | VALUES)[name]
    for phase in ("training", "validation"):
        strict.watch(model)
        fit(model, optimizer, data if name in CLASSES else values(data), phase, loss_fn=loss_fn, **options)
    assert strict.recorded == 2


class Rest(nn.Module):
    """The operations that the networks below have not."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.ZeroPad2d(1), nn.Conv2d(3, 8, 3), nn.LeakyReLU(), nn.AvgPool2d(2), nn.ReLU6(), nn.Dropout2d(0.5),
            nn.Tanh(), nn.GELU("tanh"), nn.Sigmoid(), nn.ChannelShuffle(2),
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layers(x)
        return F.softmax(torch.cat([x, x * x], 1).mean((2, 3)).view(x.size(0), -1), 1)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "rest": Rest,
    "resnet18": lambda: zoo.resnet18(weights=None),
    "mobilenet_v3_small": lambda: zoo.mobilenet_v3_small(weights=None),
    "convnext_tiny": lambda: zoo.convnext_tiny(weights=None),
    "efficientnet_b0": lambda: zoo.efficientnet_b0(weights=None),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_no_operation_of_a_network_waits_for_the_device(name: str) -> None:
    torch.manual_seed(0)
    lowered, x = lower(NETWORKS[name]()), torch.randn(2, 3, 64, 64)
    assert waits(lambda: play(lowered, lowered.tensors, x).square().mean().backward()) == []


def test_the_networks_have_every_operation() -> None:
    kinds = {kind for make in NETWORKS.values() for kind in lower(make()).kinds}
    # Those of graphs without gradients, which are not recorded.
    kinds |= {"Attention", "Expand", "GroupNorm", "PatchMerging", "ResponseNorm", "Shift", "Upsample"}
    kinds.add("WindowAttention")
    assert OPERATIONS.keys() <= kinds, OPERATIONS.keys() - kinds


@pytest.mark.parametrize("device", ["cpu"])
def test_what_would_wait_is_not_recorded(device: str, strict: Recorder) -> None:
    theirs, their_sgd, ours, our_sgd = twins(device, strict, sgd)
    data = batches(device, (FULL,) * 6)
    loss_fn = nn.CrossEntropyLoss(WEIGHT, label_smoothing=0.1)
    assert "aten::masked_select" in waits(lambda: loss_fn(torch.randn(FULL, 5), data[0][1]))
    torch.manual_seed(0)
    theirs.train()
    for x, y in data:
        their_sgd.zero_grad()
        loss_fn(theirs(x), y).backward()
        their_sgd.step()
    torch.manual_seed(0)
    fit(ours, our_sgd, data, loss_fn=loss_fn)
    assert strict.recorded == 0
    assert_same(ours, our_sgd, theirs, their_sgd)
    lowered = lower(ours)
    said = cuda_graph.obstacle(lowered, loss_fn, our_sgd, torch.device(device))
    assert said == "PyTorch's cross entropy with class weights and label smoothing waits for the device"


class Twice(Recorder):
    """Looks at the work twice before it is replayed: a graph repeats the first time, whatever Python would do."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[str, list[int]]] = []

    def __call__(self, work: Work, stream: Any) -> Work:
        before = [p.grad for p in self.parameters()]
        first, second = DryRun(), DryRun()
        first(work)
        second(work)
        assert first.operations == second.operations
        self.operations = first.operations
        for p, grad in zip(self.parameters(), before, strict=True):
            p.grad = grad
        return super().__call__(work, stream)


@pytest.mark.parametrize("device", ["cpu"])
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("make", [sgd, adam])
def test_a_step_is_the_same_operations_on_the_same_memory_every_time(
    make: Any, accumulate: int, device: str, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    twice = Twice()
    monkeypatch.setitem(cuda_capture.RECORDERS, device, twice)
    _, _, model, optimizer = twins(device, twice, make)
    data = batches(device, (FULL,) * 12)
    for phase in ("training", "validation"):
        twice.watch(model)
        fit(model, optimizer, data, phase, accumulate=accumulate, clip_grad_norm=1.0)
        names = [name for name, _ in twice.operations]
        # One loss per batch, and one step, is part of it; so is nothing that Python would have to do again.
        assert sum("convolution.default" in name for name in names) == 2 * (accumulate if phase == "training" else 1)
        assert sum("_fused_" in name for name in names) == (1 if phase == "training" else 0)
    weights = {p.data_ptr() for p in model.parameters()}
    assert weights <= {address for _, addresses in twice.operations for address in addresses}


class HalfWay(Recorder):
    """Fails at one of the operations."""

    def __init__(self, at: int, error: type[BaseException]) -> None:
        super().__init__()
        self.at = at
        self.error = error

    def __call__(self, work: Work, stream: Any) -> Work:
        def fails(number: int) -> None:
            if number == self.at:
                raise self.error("half way")

        self.recorded += 1
        DryRun(fails)(work)
        raise AssertionError(f"there are not {self.at} operations")


def at_all_stages(accumulate: int) -> list[Any]:
    """In the first forward pass, backward, the update, and the last of several batches."""
    return [pytest.param(at, accumulate, id=f"{at}-{accumulate}") for at in (0, 5, 30, 60, 90, 120 * accumulate - 40)]


@pytest.mark.parametrize("device", ["cpu"])
@pytest.mark.parametrize("at, accumulate", [*at_all_stages(1), *at_all_stages(2)])
@pytest.mark.parametrize("make", [sgd, adam])
def test_a_recording_that_fails_half_way_changes_nothing(
    make: Any, at: int, accumulate: int, device: str, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs, their_optimizer, ours, our_optimizer = twins(device, recorder, make)
    half_way = HalfWay(at, RuntimeError)
    monkeypatch.setitem(cuda_capture.RECORDERS, device, half_way)
    data = batches(device)
    for seed in range(2):
        torch.manual_seed(seed)
        plain(theirs, their_optimizer, data, accumulate)
        expected = torch.get_rng_state()
        torch.manual_seed(seed)
        if seed == 0:
            with pytest.warns(UserWarning, match="cannot be recorded .* and runs eagerly: RuntimeError: half way"):
                fit(ours, our_optimizer, data, accumulate=accumulate)
        else:
            fit(ours, our_optimizer, data, accumulate=accumulate)
        assert torch.equal(torch.get_rng_state(), expected)
        assert_same(ours, our_optimizer, theirs, their_optimizer)
    assert half_way.recorded == 1


@pytest.mark.parametrize("device", ["cpu"])
@pytest.mark.parametrize("at", [0, 30, 60, 90])
def test_ctrl_c_half_way_through_a_recording_leaves_whole_steps(
    at: int, device: str, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs, their_adam, ours, our_adam = twins(device, recorder, adam)
    data = batches(device)
    torch.manual_seed(0)
    plain(theirs, their_adam, data[:WARM_UP])
    monkeypatch.setitem(cuda_capture.RECORDERS, device, HalfWay(at, KeyboardInterrupt))
    torch.manual_seed(0)
    with pytest.raises(KeyboardInterrupt):
        fit(ours, our_adam, data)
    assert_same(ours, our_adam, theirs, their_adam)
    # And it is recorded from there on.
    monkeypatch.setitem(cuda_capture.RECORDERS, device, recorder)
    torch.manual_seed(1)
    plain(theirs, their_adam, data)
    torch.manual_seed(1)
    fit(ours, our_adam, data)
    assert recorder.replayed > 0
    assert_same(ours, our_adam, theirs, their_adam)


def plain(model: nn.Module, optimizer: Any, data: Any, accumulate: int = 1) -> None:
    model.train()
    optimizer.zero_grad()
    for i, (x, y) in enumerate(data):
        (F.nll_loss(model(x), y) / accumulate).backward()
        if (i + 1) % accumulate == 0 or i + 1 == len(data):
            optimizer.step()
            if i + 1 < len(data):
                optimizer.zero_grad()


def test_gradients_do_not_go_where_somebody_else_has_differentiated(device: str, recorder: Recorder) -> None:
    """Autograd would add them up on the stream of the user's own step, as long as its result is kept."""
    _, _, model, optimizer = twins(device, recorder, sgd)
    data = batches(device)
    kept = F.nll_loss(model(data[0][0]), data[0][1])
    called: list[str] = []
    for name, p in model.named_parameters():
        node = p.expand_as(p).grad_fn.next_functions[0][0]  # type: ignore[union-attr]
        node.register_hook(lambda *_, name=name: called.append(name))
    fit(model, optimizer, data)
    assert recorder.replayed > 0 and called == []
    kept.backward()
    assert len(called) == len(list(model.parameters()))


def benchmark(on: bool) -> None:
    torch.backends.cudnn.benchmark = on


def products(on: bool) -> None:
    torch.set_float32_matmul_precision("high" if on else "highest")


def reduced(on: bool) -> None:
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = not on


@pytest.mark.parametrize("switch", [benchmark, products, reduced])
def test_another_choice_of_kernels_is_recorded_anew(
    switch: Callable[[bool], None], device: str, recorder: Recorder
) -> None:
    _, _, model, optimizer = twins(device, recorder, sgd)
    data = batches(device, (FULL,) * 6)
    try:
        for on, recorded in ((False, 1), (False, 1), (True, 2), (True, 2)):
            switch(on)
            fit(model, optimizer, data)
            assert recorder.recorded == recorded
    finally:
        switch(False)


@pytest.mark.parametrize("rate", [0.5, 0.1, 0.3, 1e-3])
@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
def test_a_learning_rate_on_the_device_is_a_float32_number(make: Any, rate: float, device: str) -> None:
    """What fused kernels make of a tensor they make of the same number, too, bit by bit."""
    generator = torch.Generator().manual_seed(0)
    weights, gradients = torch.randn(2, 1000, generator=generator)
    results = []
    for given in (torch.tensor(rate, device=device), torch.tensor(rate).item()):
        p = nn.Parameter(weights.clone().to(device))
        optimizer = make([p], lr=given, fused=True)
        for _ in range(3):
            p.grad = gradients.clone().to(device)
            optimizer.step()
        results.append(p.detach())
    assert torch.equal(*results)
