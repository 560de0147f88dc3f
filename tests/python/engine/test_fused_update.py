"""A step in one pass over the weights is the optimizer's own up to rounding, and nothing else is to be seen of it."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer

import cnnrs
from cnnrs.engine import fused_update
from cnnrs.engine.fused_update import fused

Made = Callable[[list[nn.Parameter]], Optimizer]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it is not worth its while."""
    monkeypatch.setattr(fused_update, "_LEAST_OF_MOMENTUM", 1)
    monkeypatch.setattr(fused_update, "_LEAST", 1)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The fused kernels that have been called."""
    found: list[str] = []

    def spy(name: str) -> None:
        original = getattr(torch, name)

        def called(*args: Any, **options: Any) -> None:
            found.append(name)
            original(*args, **options)

        monkeypatch.setattr(torch, name, called)

    for kind in (SGD, Adam, AdamW):
        fused_update._are_there(kind)
    for name in ("_fused_sgd_", "_fused_adam_", "_fused_adamw_"):
        spy(name)
    return found


def weights() -> list[nn.Parameter]:
    torch.manual_seed(0)
    last = torch.randn(8, 3, 5, 5).contiguous(memory_format=torch.channels_last)
    return [nn.Parameter(t) for t in (torch.randn(33, 7), torch.randn(5), last, torch.randn(4, 4))]


def stepped(parameters: list[nn.Parameter], optimizer: Optimizer, steps: Iterator[int] | range, fast: bool) -> None:
    for step in steps:
        torch.manual_seed(step)
        # The last one begins later, and has no gradient every other step.
        for number, p in enumerate(parameters):
            p.grad = None if number == 3 and step % 2 == 0 else torch.randn(p.shape).as_strided(p.shape, p.stride())
        if fast:
            with fused(optimizer):
                optimizer.step()
        else:
            optimizer.step()


MOMENTA = [
    {"momentum": 0.9}, {"momentum": 0.9, "weight_decay": 1e-3}, {"momentum": 0.5, "nesterov": True},
    {"momentum": 0.9, "dampening": 0.3, "maximize": True},
]  # fmt: skip


@pytest.mark.parametrize("options", MOMENTA)
def test_sgd_up_to_rounding(options: dict[str, Any], seen: list[str]) -> None:
    ours = weights()[:3]
    theirs = copy.deepcopy(ours)
    optimizers = [SGD(p, lr=0.0137, **options) for p in (ours, theirs)]
    stepped(ours, optimizers[0], range(5), True)
    stepped(theirs, optimizers[1], range(5), False)
    assert len(seen) == 5
    assert_close(ours, theirs, 5)
    assert_same_state(*optimizers)


@pytest.mark.parametrize("kind", [Adam, AdamW])
@pytest.mark.parametrize("options", [{}, {"weight_decay": 1e-2}, {"amsgrad": True}, {"maximize": True, "eps": 1e-6}])
def test_adam_up_to_rounding(kind: Any, options: dict[str, Any], seen: list[str]) -> None:
    ours = weights()
    theirs = copy.deepcopy(ours)
    optimizers = [kind(p, lr=1e-3, **options) for p in (ours, theirs)]
    stepped(ours, optimizers[0], range(6), True)
    stepped(theirs, optimizers[1], range(6), False)
    assert seen
    assert_close(ours, theirs, 6)
    assert_same_state(*optimizers)


def assert_close(ours: list[nn.Parameter], theirs: list[nn.Parameter], steps: int) -> None:
    for one, other in zip(ours, theirs, strict=True):
        # A few roundings per step, of weights below 8.
        assert (one - other).abs().max() <= steps * 4 * 8 * 2**-24


def assert_same_state(one: Optimizer, other: Optimizer) -> None:
    ours, theirs = one.state_dict(), other.state_dict()
    assert ours["param_groups"] == theirs["param_groups"] and ours["state"].keys() == theirs["state"].keys()
    for of_ours, of_theirs in zip(ours["state"].values(), theirs["state"].values(), strict=True):
        assert of_ours.keys() == of_theirs.keys()
        for name, value in of_ours.items():
            wanted = of_theirs[name]
            if not isinstance(wanted, torch.Tensor):
                assert value == wanted
                continue
            assert (value.dtype, value.shape, value.stride()) == (wanted.dtype, wanted.shape, wanted.stride())
            assert torch.allclose(value, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", [SGD, Adam])
def test_filters_of_one_pixel(kind: Any, seen: list[str]) -> None:
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.randn(8, 16, 1, 1)), nn.Parameter(torch.randn(16, 1, 3, 3))]
    theirs = copy.deepcopy(ours)
    more = {"momentum": 0.9} if kind is SGD else {}
    optimizers = [kind(p, lr=0.01, **more) for p in (ours, theirs)]
    for _ in range(3):
        for one, other in zip(ours, theirs, strict=True):
            # Of PyTorch's convolutions in channels_last.
            o, i, h, w = one.shape
            other.grad = torch.randn(o, h, w, i).permute(0, 3, 1, 2)
            one.grad = other.grad.clone()
        assert ours[0].grad is not None and ours[0].grad.stride() != ours[0].stride()
        with fused(optimizers[0]):
            optimizers[0].step()
        optimizers[1].step()
    assert len(seen) == 3
    assert_close(ours, theirs, 3)
    for values in zip(*(o.state_dict()["state"].values() for o in optimizers), strict=True):
        for name in values[0]:
            assert torch.allclose(values[0][name], values[1][name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", [SGD, Adam])
def test_state_goes_on_in_either_way(kind: Any) -> None:
    ours = weights()[:3]
    theirs = copy.deepcopy(ours)
    more = {"momentum": 0.9} if kind is SGD else {}
    optimizers = [kind(p, lr=1e-3, **more) for p in (ours, theirs)]
    for begin, fast in ((0, True), (2, False), (4, True)):
        stepped(ours, optimizers[0], range(begin, begin + 2), fast)
        stepped(theirs, optimizers[1], range(begin, begin + 2), False)
    assert_close(ours, theirs, 6)


def test_momentum_that_begins_later_is_left_to_the_optimizer(seen: list[str]) -> None:
    ours = weights()
    theirs = copy.deepcopy(ours)
    optimizers = [SGD(p, lr=0.01, momentum=0.9) for p in (ours, theirs)]
    stepped(ours, optimizers[0], range(5), True)
    stepped(theirs, optimizers[1], range(5), False)
    assert_close(ours, theirs, 5)
    # Not at the first step of the last one; all have a momentum from then on.
    assert len(seen) == 4


def hooked(optimizer: Any) -> None:
    optimizer.register_step_pre_hook(lambda *_: None)


def with_rate(optimizer: Any) -> None:
    optimizer.param_groups[0]["lr"] = torch.tensor(0.01)


def with_other_strides(optimizer: Any) -> None:
    p = optimizer.param_groups[0]["params"][0]
    p.grad = p.grad.t().contiguous().t()


def with_options(**options: Any) -> Any:
    return lambda optimizer: optimizer.param_groups[0].update(options)


def with_sparse(optimizer: Any) -> None:
    p = optimizer.param_groups[0]["params"][0]
    p.grad = torch.randn(p.shape).to_sparse()


@pytest.mark.parametrize(
    "change",
    [
        hooked, with_rate, with_other_strides, with_options(fused=False), with_options(foreach=True),
        with_options(foreach=False, differentiable=False, fused=False), with_sparse,
    ],
)  # fmt: skip
def test_what_is_left_to_the_optimizer(change: Any, seen: list[str]) -> None:
    parameters = weights()[:3]
    optimizer = SGD(parameters, lr=0.01)
    for p in parameters:
        p.grad = torch.randn(p.shape).as_strided(p.shape, p.stride())
    optimizer.param_groups[0]["weight_decay"] = 0.0
    change(optimizer)
    if change is with_sparse:
        optimizer.param_groups[0]["momentum"] = 0.0
    before = {name: value for name, value in optimizer.param_groups[0].items() if name != "params"}
    with fused(optimizer):
        optimizer.step()
    assert not seen
    assert {name: value for name, value in optimizer.param_groups[0].items() if name != "params"} == before


def test_deterministic_algorithms_are_the_plain_loops(seen: list[str]) -> None:
    parameters = weights()[:3]
    torch.use_deterministic_algorithms(True)
    try:
        stepped(parameters, SGD(parameters, lr=0.01, momentum=0.9), range(3), True)
    finally:
        torch.use_deterministic_algorithms(False)
    assert not seen


def test_a_weight_that_is_there_twice(seen: list[str]) -> None:
    ours = weights()[:3]
    theirs = copy.deepcopy(ours)
    with warnings.catch_warnings():
        # That this will be an error one day.
        warnings.simplefilter("ignore")
        optimizers = [Adam(p + p, lr=0.01) for p in (ours, theirs)]
    stepped(ours, optimizers[0], range(3), True)
    stepped(theirs, optimizers[1], range(3), False)
    assert not seen
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(("kind", "fast"), [(Adam, False), (AdamW, False), (SGD, True)])
def test_steps_are_counted_in_the_default_type(kind: Any, fast: bool, seen: list[str]) -> None:
    ours = weights()[:3]
    theirs = copy.deepcopy(ours)
    more = {"momentum": 0.9} if kind is SGD else {}
    torch.set_default_dtype(torch.float64)
    try:
        optimizers = [kind(p, lr=0.01, **more) for p in (ours, theirs)]
        for parameters, optimizer in zip((ours, theirs), optimizers, strict=True):
            for p in parameters:
                p.grad = p.detach().clone()
            with fused(optimizer) if parameters is ours else nullcontext():
                optimizer.step()
    finally:
        torch.set_default_dtype(torch.float32)
    assert bool(seen) is fast
    assert_same_state(*optimizers)


def test_derivatives_that_need_the_old_weights_are_refused(seen: list[str]) -> None:
    parameters = weights()[:3]
    optimizer = SGD(parameters, lr=0.01, momentum=0.9)
    loss = (parameters[0] ** 2).sum()
    stepped(parameters, optimizer, range(1), True)
    assert seen
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_rounding_is_pytorchs_where_all_else_is(monkeypatch: pytest.MonkeyPatch, seen: list[str]) -> None:
    monkeypatch.setattr("cnnrs.engine.frozen_front.LEAST_FLOPS", 1)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))
    # Fewer pixels than are worth another order of memory.
    plain, batches = copy.deepcopy(model), [(torch.randn(4, 3, 5, 5), torch.arange(4) % 3) for _ in range(3)]
    optimizer = Adam(plain.parameters(), lr=0.01)
    for x, y in batches:
        optimizer.zero_grad()
        F.cross_entropy(plain(x), y).backward()
        optimizer.step()
    fit = cnnrs.compile(optimizer=Adam(model.parameters(), lr=0.01), loss_fn=F.cross_entropy, verbose=False)
    fit(0, model, batches, phase="training")
    assert not seen
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one, other)
    monkeypatch.setattr("cnnrs.engine.memory_order.LEAST_PIXELS", 1)
    fit(1, model, batches, phase="training")
    assert seen


def test_other_optimizers_and_subclasses(seen: list[str]) -> None:
    class Own(SGD):
        pass

    for kind in (Own, torch.optim.RMSprop):
        parameters = weights()
        optimizer = kind(parameters, lr=0.01)
        stepped(parameters, optimizer, range(1, 3), True)
    assert not seen


def test_options_are_as_before_whatever_happens() -> None:
    parameters = weights()
    optimizer = Adam([{"params": parameters[:2]}, {"params": parameters[2:], "fused": False}])
    for p in parameters:
        p.grad = torch.randn(p.shape).as_strided(p.shape, p.stride())
    with pytest.raises(KeyboardInterrupt), fused(optimizer):
        assert [group["fused"] for group in optimizer.param_groups] == [True, False]
        raise KeyboardInterrupt
    assert [group["fused"] for group in optimizer.param_groups] == [None, False]


def test_a_torch_without_them(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("`fused=True` requires all the params to be CUDA")

    monkeypatch.setattr(SGD, "step", refuse)
    fused_update._are_there.cache_clear()
    try:
        assert not fused_update._are_there(SGD)
    finally:
        fused_update._are_there.cache_clear()


def test_only_where_it_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    cases = [
        (SGD, {}, (2, 1 << 20), False), (SGD, {"momentum": 0.9}, (2, 1 << 20), True),
        (SGD, {"momentum": 0.9}, (100, 1000), False), (SGD, {"momentum": 0.9, "nesterov": True}, (2, 1 << 16), True),
        (SGD, {"weight_decay": 0.1}, (2, 1 << 16), True), (Adam, {}, (2, 1 << 16), True),
        (AdamW, {}, (20, 1000), False),
    ]  # fmt: skip
    for kind, options, (count, size), faster in cases:
        made: Any = kind
        parameters = [nn.Parameter(torch.zeros(size)) for _ in range(count)]
        for p in parameters:
            p.grad = torch.zeros(size)
        optimizer = made(parameters, lr=0.1, **options)
        with fused(optimizer):
            assert (optimizer.param_groups[0]["fused"] is True) is faster
