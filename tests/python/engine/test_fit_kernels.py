"""`fit` with native kernels: when they are used, and that everything else of a step stays the plain loop's."""

from __future__ import annotations

import copy
import gc
import re
import warnings
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import cnnrs
from cnnrs._util import kept_memory
from cnnrs.engine import frozen_front, kept_plans, memory_order, verify
from cnnrs.engine.kernels import Kernels
from cnnrs.model.lowering import Lowered, lower
from native_block import Block

LAST: Any = torch.channels_last
pytestmark = pytest.mark.usefixtures("two_threads")


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small networks count as large, and on the clock native kernels take half as long."""

    def done(self: Any) -> None:
        if self._timed is not None:
            trial, last = self._timed
            trial.seconds[last].append(0.5 if last else 1.0)
            self._timed = None

    monkeypatch.setattr(memory_order.MemoryOrder, "done", done)
    monkeypatch.setattr(frozen_front, "_LEAST_SHARE", 2.0)
    monkeypatch.setattr(memory_order, "LEAST_PIXELS", 1)
    monkeypatch.setattr("cnnrs.engine.frozen_front.LEAST_FLOPS", 1)


def batches(count: int, last: int = 3) -> list[tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(3)
    return [(torch.randn(n, 3, 20, 20), torch.randint(4, (n,))) for n in (*[6] * count, last)]


class Dropping(Block):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(super().forward(x), 0.2, self.training)


def trained(engine: Any, model: nn.Module, data: Any, **options: Any) -> tuple[Any, ...]:
    model = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    torch.manual_seed(5)
    results = [
        cnnrs.fit(
            epoch, model, data, phase, optimizer=optimizer, loss_fn=F.cross_entropy, engine=engine, verbose=False,
            **options,
        )
        for epoch in range(3)
        for phase in ("training", "validation")
    ]  # fmt: skip
    return results, model, torch.get_rng_state()


@pytest.mark.parametrize("options", [{}, {"accumulate": 2}, {"clip_grad_norm": 0.5}, {"on_batch_end": lambda *_: None}])
def test_fit_trains_with_them_as_the_plain_loop_does(
    options: dict[str, Any], fast: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    played = []
    original = Kernels.play
    monkeypatch.setattr(Kernels, "play", lambda self, *a: played.append(len(a[2])) or original(self, *a))
    torch.manual_seed(1)
    model, data = Dropping(), batches(11)
    theirs, their_model, their_random = trained("python", model, data, **options)
    assert not played
    ours, our_model, our_random = trained("auto", model, data, **options)
    # Two samples first; four of the eight timed batches; then all that come.
    assert played[:1] == [2] and played.count(6) == 4 + 3 + 2 * 11 and played.count(3) == 3
    assert torch.equal(our_random, their_random)
    # 36 steps with smooth activations, each with rounding of some 1e-6.
    for (loss, _), (expected, _) in zip(ours, theirs, strict=True):
        assert loss == pytest.approx(expected, rel=1e-4)
    for (name, got), wanted in zip(our_model.state_dict().items(), their_model.state_dict().values(), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-4, msg=name)
    assert "native kernels" in str(cnnrs.explain(our_model.train(), (6, 3, 20, 20)))


def test_what_is_mostly_native_is_so_from_the_first_batch_on(fast: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frozen_front, "_LEAST_SHARE", 0.7)
    monkeypatch.setattr(memory_order.MemoryOrder, "done", lambda self: None)
    played = []
    original = Kernels.play
    monkeypatch.setattr(Kernels, "play", lambda self, *a: played.append(len(a[2])) or original(self, *a))
    torch.manual_seed(1)
    model, data = Block(), batches(4)
    first, ours, _ = trained("auto", model, data)
    assert played == [2] + 3 * [6, 6, 6, 6, 3]
    # The same in every run: no clock.
    again, theirs, _ = trained("auto", model, data)
    assert first == again and all(
        torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True)
    )
    assert re.search(
        r"channels_last with native kernels, which are \d+ % of the arithmetic; not timed",
        str(cnnrs.explain(ours.train(), (6, 3, 20, 20))),
    )


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() not in frozen_front._MEASURED_ON, reason="not measured")
def test_the_clock_decides_about_what_has_not_been_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def share(model: nn.Module) -> float | None:
        front = frozen_front.front_of(lower(model.train()), torch.zeros(64, 3, 64, 64), True, 1)
        assert front is not None
        return front.share

    def layers(**last: Any) -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 32, 1), nn.Conv2d(32, 32, 3, padding=1), nn.Conv2d(32, 32, **last))

    assert share(layers(kernel_size=3, padding=1)) == pytest.approx(0.99, abs=0.01)
    # Half of the arithmetic PyTorch's; convolutions in groups, which it is slow at in channels_last.
    assert share(layers(kernel_size=3, padding=1, stride=1, dilation=2)) is None
    assert share(layers(kernel_size=1, groups=2)) is None
    monkeypatch.setattr(torch, "get_num_threads", lambda: 9)
    assert share(layers(kernel_size=3, padding=1)) is None


def test_exact_does_without_winograds_convolutions(fast: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """In what is trained and in the frozen front; what was timed without it does not count for it."""
    groups, plans = list[list[str]](), list[bool]()
    play, take = Kernels.play, kept_plans.take

    def played(self: Kernels, lowered: Lowered, *rest: Any) -> torch.Tensor:
        groups.append([lowered.kinds[node] for group in self.groups.values() for node in group.nodes])
        return play(self, lowered, *rest)

    def taken(*arguments: Any, exact: bool, **options: Any) -> Any:
        plans.append(exact)
        return take(*arguments, exact=exact, **options)

    monkeypatch.setattr(Kernels, "play", played)
    monkeypatch.setattr(kept_plans, "take", taken)
    torch.manual_seed(1)
    model, data = Block(), batches(9)
    trained("auto", model, data)
    usual = groups[-1]
    groups.clear()
    trained("auto", model, data, precision="exact")
    # Depthwise and 1 x 1 convolutions are sums as PyTorch's are.
    assert groups and all(kinds.count("Conv2d") == usual.count("Conv2d") - 2 for kinds in groups)
    plans.clear()
    model.stem.requires_grad_(False).eval()
    front = cnnrs.freeze(nn.Sequential(model.stem), statistics=True)
    whole = nn.Sequential(front, nn.Conv2d(16, 16, 3, padding=1), nn.Flatten(), nn.LazyLinear(4))
    whole(data[0][0])
    trained("auto", whole, data, precision="exact")
    assert plans and all(plans)


def test_wrong_kernels_are_found_and_not_used(fast: None, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Kernels.play
    monkeypatch.setattr(Kernels, "play", lambda self, *a: original(self, *a) * 1.01)
    torch.manual_seed(1)
    model, data = Block(), batches(9)
    with pytest.warns(UserWarning, match="PyTorch's own kernels are used, because native ones do not do what they do"):
        ours, our_model, _ = trained("auto", model, data)
    theirs, their_model, _ = trained("python", model, data)
    assert [loss for loss, _ in ours[::2]] == [loss for loss, _ in theirs[::2]]
    assert all(torch.equal(a, b) for a, b in zip(our_model.parameters(), their_model.parameters(), strict=True))


class Raising(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, derivative: torch.Tensor) -> Any:
        raise RuntimeError("no derivative")


@pytest.mark.parametrize("options", [{}, {"accumulate": 2}])
def test_gradients_that_cannot_be_had_are_pytorchs(
    options: dict[str, Any], fast: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Kernels.play
    monkeypatch.setattr(Kernels, "play", lambda self, *a: Raising.apply(original(self, *a)))
    torch.manual_seed(1)
    model, data = Dropping(), batches(10)
    with pytest.warns(
        UserWarning, match=r"native ones do not do what they do: backward raises RuntimeError \(no deriv"
    ):
        ours, our_model, our_random = trained("auto", model, data, **options)
    theirs, their_model, their_random = trained("python", model, data, **options)
    assert torch.equal(our_random, their_random)
    # The loss that is counted of the one batch is that of native kernels.
    assert [loss for loss, _ in ours[::2]] == pytest.approx([loss for loss, _ in theirs[::2]], rel=1e-6)
    for (name, got), wanted in zip(our_model.state_dict().items(), their_model.state_dict().values(), strict=True):
        assert torch.equal(got, wanted), name
    assert "does not run, or not alike, in channels_last" in str(cnnrs.explain(our_model.train(), (6, 3, 20, 20)))


class Scaled(nn.Module):
    """A loss with weights of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(outputs * self.scale, targets)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_gradients_of_a_loss_are_not_added_twice(accumulate: int, fast: None, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Kernels.play
    monkeypatch.setattr(Kernels, "play", lambda self, *a: Raising.apply(original(self, *a)))
    found = []
    for engine in ("auto", "python"):
        torch.manual_seed(1)
        model, loss = Block(), Scaled()
        optimizer = torch.optim.SGD([*model.parameters(), *loss.parameters()], lr=0.02, momentum=0.9)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            cnnrs.fit(
                0, model, batches(5), "training", optimizer=optimizer, loss_fn=loss, engine=engine, verbose=False,
                accumulate=accumulate,
            )  # fmt: skip
        assert any("no derivative" in str(warning.message) for warning in caught) == (engine == "auto")
        found.append([*model.parameters(), loss.scale, loss.scale.grad])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*found, strict=True))


def test_they_are_compared_with_what_the_check_has_computed(fast: None, monkeypatch: pytest.MonkeyPatch) -> None:
    played: list[int] = []
    original = frozen_front.play

    def spy(lowered: Any, tensors: Any, inputs: torch.Tensor, **rest: Any) -> torch.Tensor:
        played.append(len(inputs))
        return original(lowered, tensors, inputs, **rest)

    monkeypatch.setattr(frozen_front, "play", spy)
    torch.manual_seed(1)
    model = Dropping()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cnnrs.fit(0, model, batches(9), optimizer=optimizer, loss_fn=F.cross_entropy, verbose=False)
    # Four timed batches, and no two samples once more.
    assert played == [6] * 4
    # Where nothing has been checked before, PyTorch computes them.
    model.act = nn.Hardswish()
    cnnrs.fit(1, model, batches(9), optimizer=optimizer, loss_fn=F.cross_entropy, check=False, verbose=False)
    assert played == [6] * 8


def test_what_the_check_has_computed_holds_until_the_weights_change(fast: None) -> None:
    torch.manual_seed(1)
    model, data = Block(), batches(9)
    # The first batch is the user's choice of order, so the trial begins behind a step, with the same images.
    data[0] = (data[1][0].contiguous(memory_format=LAST), data[0][1])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cnnrs.fit(0, model, data, optimizer=optimizer, loss_fn=F.cross_entropy, verbose=False)
    assert "native kernels; 6 x 3 x 20 x 20" in str(cnnrs.explain(model.train(), (6, 3, 20, 20)))


def test_the_trial_leaves_weights_gradients_and_statistics_as_they_are(fast: None) -> None:
    torch.manual_seed(1)
    model = Block().train()
    before = copy.deepcopy(model.state_dict())
    versions = [tensor._version for tensor in model.state_dict().values()]
    lowered = lower(model)
    front = frozen_front.front_of(lowered, torch.empty(6, 3, 20, 20), True, 10)
    assert front is not None
    rest = frozen_front._Rest(front, True, None)
    rest.on_copies(torch.randn(2, 3, 20, 20).contiguous(memory_format=LAST))
    assert all(torch.equal(now, before[name]) for name, now in model.state_dict().items())
    assert [tensor._version for tensor in model.state_dict().values()] == versions
    assert all(parameter.grad is None for parameter in model.parameters())


def test_what_the_check_frees_is_kept_for_the_steps(fast: None, monkeypatch: pytest.MonkeyPatch) -> None:
    users: list[int] = []
    original = verify.differs

    def spy(*args: Any, **options: Any) -> str | None:
        users.append(len(kept_memory._users))
        return original(*args, **options)

    monkeypatch.setattr(verify, "differs", spy)
    torch.manual_seed(1)
    model = nn.Sequential(Block(), nn.Linear(4, 1 << 18, bias=False), nn.Linear(1 << 18, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    before = len(kept_memory._users)
    cnnrs.fit(0, model, batches(1), optimizer=optimizer, loss_fn=F.cross_entropy, verbose=False)
    assert users == [before + (kept_memory._malloc() is not None)] and len(kept_memory._users) == before


def test_another_network_of_the_same_module_is_tried_anew(fast: None, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    model, data = Block(), batches(9)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    cnnrs.fit(0, model, data, optimizer=optimizer, loss_fn=F.cross_entropy, verbose=False)
    model.act = nn.Hardswish()
    original = Kernels.play
    monkeypatch.setattr(Kernels, "play", lambda self, *a: original(self, *a) * 1.01)
    with pytest.warns(UserWarning, match="PyTorch's own kernels are used"):
        cnnrs.fit(1, model, data, optimizer=optimizer, loss_fn=F.cross_entropy, verbose=False)
    said = str(cnnrs.explain(model, (6, 3, 20, 20)))
    assert "does not run, or not alike, in channels_last with native kernels" in said


def test_explain_says_what_was_measured_however_small_or_ordered_the_weights_are(fast: None) -> None:
    torch.manual_seed(1)
    model = Block().to(memory_format=LAST)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    cnnrs.fit(0, model, batches(9), optimizer=optimizer, loss_fn=F.cross_entropy, verbose=False)
    said = str(cnnrs.explain(model, (6, 3, 20, 20)))
    assert "channels_last with native kernels; 6 x 3 x 20 x 20 take 500 ms in channels_last with native kernels" in said


def test_the_default_dtype_is_not_that_of_the_values(fast: None) -> None:
    torch.manual_seed(1)
    model, data = Block(), batches(9)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    for epoch, dtype in enumerate((torch.float32, torch.float64)):
        torch.set_default_dtype(dtype)
        try:
            loss, _ = cnnrs.fit(epoch, model, data, optimizer=optimizer, loss_fn=F.cross_entropy, verbose=False)
        finally:
            torch.set_default_dtype(torch.float32)
        assert loss < 2.0


def test_their_memory_goes_with_the_epoch(fast: None, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: weakref.WeakSet[Kernels] = weakref.WeakSet()
    play = Kernels.play
    monkeypatch.setattr(Kernels, "play", lambda self, *a: alive.add(self) or play(self, *a))
    model, data = Block(), batches(9)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    gc.collect()
    gc.disable()
    try:
        for epoch in range(2):
            cnnrs.fit(epoch, model, data, optimizer=optimizer, loss_fn=F.cross_entropy, verbose=False)
            assert not alive
    finally:
        gc.enable()


def test_what_is_deterministic_stays_as_it_is(fast: None) -> None:
    torch.manual_seed(1)
    model, data = Block(), batches(9)
    torch.use_deterministic_algorithms(True)
    try:
        _, our_model, _ = trained("auto", model, data)
        _, their_model, _ = trained("python", model, data)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(our_model.parameters(), their_model.parameters(), strict=True))


def test_a_loss_that_is_not_finite_leaves_the_model_before_that_batch(fast: None) -> None:
    torch.manual_seed(1)
    model, data = Block(), batches(12)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    cnnrs.fit(0, model, data, optimizer=optimizer, loss_fn=F.cross_entropy, verbose=False)
    before = copy.deepcopy(model.state_dict())
    bad = torch.full((6, 3, 20, 20), torch.nan)
    with pytest.raises(cnnrs.NonFiniteLossError, match="loss is NaN in training epoch 1, batch 0"):
        cnnrs.fit(1, model, [(bad, data[0][1])], optimizer=optimizer, loss_fn=F.cross_entropy, verbose=False)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))


def test_means_that_are_rounding_only_do_not_count_against_them(fast: None) -> None:
    torch.manual_seed(1)
    # Behind a batch norm, the mean of a linear layer's output is 0.
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.Conv2d(16, 32, 1, bias=False), nn.BatchNorm2d(32), nn.Hardswish(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(32, 4),
    )  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cnnrs.fit(0, model, batches(9), optimizer=optimizer, loss_fn=F.cross_entropy, verbose=False)
    assert "native kernels; 6 x 3 x 20 x 20" in str(cnnrs.explain(model.train(), (6, 3, 20, 20)))
