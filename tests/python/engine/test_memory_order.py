"""`engine="auto"` may give a called network its batches in channels_last where that is faster: only rounding tells."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import cnnrs
import tutorial
import which_engine
from cnnrs.engine import memory_order

LAST: Any = torch.channels_last
pytestmark = pytest.mark.usefixtures("two_threads")


class Net(nn.Module):
    """Convolutions without a max-pool behind them, which are left to PyTorch; batch norm and dropout have state."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.deep = nn.Conv2d(8, 8, 3, stride=2)
        self.drop = nn.Dropout(0.3)
        self.fc = nn.Linear(8 * 5 * 5, 4)
        self.seen: list[tuple[int, ...]] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.deep(F.relu(self.norm(self.conv(x)))))
        return self.fc(self.drop(self.flat(x)))

    def flat(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1)


class Viewing(Net):
    """The tutorials' way to flatten, which channels_last does not allow."""

    def flat(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(x.size(0), -1)


class Counting(Net):
    """State of its own, which nobody may move."""

    calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return super().forward(x)


class Striding(Net):
    """Sees how its numbers lie."""

    def flat(self, x: torch.Tensor) -> torch.Tensor:
        return x.as_strided((x.shape[0], 200), (200, 1))


class Overwriting(Net):
    """Leaves its batch changed."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.mul_(0.5))


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small networks count as large."""
    monkeypatch.setattr(memory_order, "LEAST_WEIGHTS", 1)
    monkeypatch.setattr(memory_order, "LEAST_PIXELS", 1)


@pytest.fixture
def faster(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """A clock on which channels_last batches take half as long, or (param False) twice."""
    factor = 0.5 if getattr(request, "param", True) else 2.0

    def done(self: Any) -> None:
        if self._timed is not None:
            trial, last = self._timed
            trial.seconds[last].append(factor if last else 1.0)
            self._timed = None

    monkeypatch.setattr(memory_order.MemoryOrder, "done", done)


def batches(count: int = 10, last: int = 3) -> list[tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(3)
    return [(torch.randn(n, 3, 12, 12), torch.randint(4, (n,))) for n in (*[6] * count, last)]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """For every batch of engine "python" whether it was changed."""
    found: list[bool] = []
    original = memory_order.MemoryOrder.ordered

    def ordered(self: Any, inputs: Any) -> Any:
        result = original(self, inputs)
        found.append(not result.is_contiguous())
        return result

    monkeypatch.setattr(memory_order.MemoryOrder, "ordered", ordered)
    yield found


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.01, momentum=0.9)


def trained(model: nn.Module, data: Any, optimizer: Any = None, engine: Any = "auto", **options: Any) -> Any:
    torch.manual_seed(5)
    return cnnrs.fit(
        0, model, data, optimizer=optimizer or sgd(model.parameters()), loss_fn=F.cross_entropy, engine=engine,
        verbose=False, **options,
    )  # fmt: skip


@pytest.mark.parametrize("faster", [True, False], indirect=True)
def test_the_faster_order_is_taken_and_kept(faster: None, seen: list[bool], request: pytest.FixtureRequest) -> None:
    wins = request.node.callspec.params["faster"]
    model = Net()
    optimizer = sgd(model.parameters())
    with which_engine.watched() as engines:
        trained(model, batches(), optimizer)
        # Eight in turn; then what was faster, for the last and smaller batch too.
        assert seen == [False, True] * 4 + [wins] * 3
        seen.clear()
        trained(model, batches(2), optimizer)
        cnnrs.fit(0, model, batches(2), "validation", loss_fn=F.cross_entropy, verbose=False)
    assert seen == [wins] * 6 and set(engines) == {"python"}
    assert ("channels_last;" in str(cnnrs.explain(model))) == wins


def test_few_batches_are_timed_over_several_epochs(faster: None, seen: list[bool]) -> None:
    model = Net()
    for _ in range(4):
        trained(model, batches(3))
    # The smaller batch of each epoch is not timed, and not changed before it is known what is faster.
    assert seen == [
        False,
        True,
        False,
        False,
        True,
        False,
        True,
        False,
        False,
        True,
        True,
        True,
        True,
        True,
        True,
        True,
    ]


def test_numbers_are_the_loops_up_to_rounding_and_nothing_moves(faster: None) -> None:
    theirs, their_optimizer, ours, our_optimizer = tutorial.twins(Net(), sgd)
    data = batches()
    before = [(p, p.data_ptr(), p.stride()) for p in ours.parameters()]
    torch.manual_seed(5)
    expected = tutorial.fit(theirs, data, "training", their_optimizer, F.cross_entropy)
    after_theirs = torch.get_rng_state()
    # Sums of some 1e2 float32 terms in another order, eleven steps of them.
    assert trained(ours, data, our_optimizer) == pytest.approx(expected, rel=1e-4)
    assert torch.equal(torch.get_rng_state(), after_theirs)
    for name, tensor in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], tensor, rtol=1e-3, atol=1e-5)
    assert all(
        p is q and (p.data_ptr(), p.stride()) == (at, stride)
        for p, (q, at, stride) in zip(ours.parameters(), before, strict=True)
    )
    for p in ours.parameters():
        assert p.grad is not None and p.grad.stride() == p.stride()
        assert our_optimizer.state[p]["momentum_buffer"].stride() == p.stride()
    assert all(x.is_contiguous() for x, _ in data)


@pytest.mark.parametrize("kind", [Viewing, Counting, Striding, Overwriting])
def test_networks_that_would_notice_have_the_loops_bits_and_no_trace(
    kind: type[Net], faster: None, seen: list[bool]
) -> None:
    theirs, their_optimizer, ours, our_optimizer = tutorial.twins(kind(), sgd)
    data, same = batches(), batches()
    torch.manual_seed(5)
    expected = tutorial.fit(theirs, data, "training", their_optimizer, F.cross_entropy)
    after = torch.get_rng_state()
    assert trained(ours, same, our_optimizer) == expected
    assert all(torch.equal(x, y) for (x, _), (y, _) in zip(data, same, strict=True))
    assert not any(seen) and torch.equal(torch.get_rng_state(), after)
    assert tutorial.same(ours.state_dict(), theirs.state_dict())
    assert getattr(ours, "calls", None) == getattr(theirs, "calls", None)
    assert "that of the batches, because" in str(cnnrs.explain(ours))


def test_hooks_are_called_once_per_batch(faster: None, seen: list[bool]) -> None:
    model, calls = Net(), []
    model.deep.register_forward_hook(lambda module, args, output: calls.append(output.is_contiguous()))
    trained(model, batches())
    assert calls == [True] * 11 and not any(seen)


def test_outputs_whose_strides_a_loss_may_ask_for_stay(faster: None, seen: list[bool]) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    data = [(x, torch.zeros(len(x), 8, 8, dtype=torch.int64)) for x, _ in batches()]
    trained(model, data)
    assert not any(seen)


@pytest.mark.parametrize("what", ["model", "batches", "engine", "format", "deterministic", "amp"])
def test_the_users_choice_stays(what: str, faster: None, seen: list[bool]) -> None:
    model, data, options = Net(), batches(), {}
    if what == "model":
        model.to(memory_format=LAST)  # type: ignore[call-overload]
    elif what == "batches":
        data = [(x.permute(0, 1, 3, 2), y) for x, y in data]
    elif what == "engine":
        options = {"engine": "python"}
    elif what == "amp":
        options = {"amp": "bf16"}
    elif what == "format":
        options = {"memory_format": LAST}
    theirs, their_optimizer, ours, our_optimizer = tutorial.twins(model, sgd)
    torch.use_deterministic_algorithms(what == "deterministic")
    try:
        torch.manual_seed(5)
        if what == "format":
            theirs.to(memory_format=LAST)  # type: ignore[call-overload]
        if what != "amp":
            given = [(x.to(memory_format=LAST) if what == "format" else x, y) for x, y in data]
            expected = tutorial.fit(theirs, given, "training", their_optimizer, F.cross_entropy)
            assert trained(ours, data, our_optimizer, **options) == expected
            assert tutorial.same(ours.state_dict(), theirs.state_dict())
        else:
            trained(ours, data, our_optimizer, **options)
    finally:
        torch.use_deterministic_algorithms(False)
    changed = [not x.is_contiguous() for x, _ in data]
    assert what == "format" or seen == changed


def test_small_networks_and_batches_keep_the_loops_bits(
    monkeypatch: pytest.MonkeyPatch, faster: None, seen: list[bool]
) -> None:
    monkeypatch.setattr(memory_order, "LEAST_PIXELS", 6 * 12 * 12 + 1)
    trained(Net(), batches())
    monkeypatch.setattr(memory_order, "LEAST_PIXELS", 1)
    monkeypatch.setattr(memory_order, "LEAST_WEIGHTS", 1 << 19)
    model = Net()
    trained(model, batches())
    assert not any(seen) and "order of memory" not in str(cnnrs.explain(model))


def test_asking_changes_nothing() -> None:
    model = Net()
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    why = cnnrs.explain(model)
    assert why.order is not None and "timed on the first 8" in why.order and why.order in str(why)
    assert tutorial.same(model.state_dict(), before) and torch.equal(torch.get_rng_state(), state)
    assert model not in memory_order._MEASURED


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "efficientnet_b0", "shufflenet_v2_x0_5"])
def test_torchvisions_networks_may_be_tried(name: str) -> None:
    torchvision = pytest.importorskip("torchvision")
    model = torchvision.models.get_model(name, num_classes=3)
    assert memory_order.obstacle(model) is None
    assert memory_order._runs(model, torch.randn(2, 3, 64, 64))

    # As it is fine-tuned: within a class of one's own, which is looked through.
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = model

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.body(x).relu()  # type: ignore[no-any-return]

    assert memory_order.obstacle(Own()) is None
