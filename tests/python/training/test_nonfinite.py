"""What ends an epoch early leaves weights, optimizer and buffers as after the last step of the optimizer."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import cnnrs
import tutorial

ENGINES = ["auto", "cpu", "torch", "python"]


def normalised() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4, momentum=None), nn.ReLU(), nn.Flatten(), nn.Linear(16, 5),
    )  # fmt: skip


class Counting(nn.Module):
    """Buffers of its own: one is written in place, one is replaced, one grows."""

    def __init__(self) -> None:
        super().__init__()
        self.body = normalised()
        for name in ("steps", "mean", "seen"):
            self.register_buffer(name, torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.steps += 1
            self.mean = 0.9 * self.mean + 0.1 * x.mean().detach()
            self.seen = torch.cat([self.seen, x.mean().detach()[None]])
        return self.body(x)


def batches(count: int) -> list[Any]:
    generator = torch.Generator().manual_seed(1)
    make = lambda: (torch.randn(6, 1, 10, 10, generator=generator), torch.randint(5, (6,), generator=generator))  # noqa: E731
    return [make() for _ in range(count)]


def nan_at(data: list[Any], at: int) -> Iterator[Any]:
    for i, (x, y) in enumerate(data):
        yield x * (math.nan if i == at else 1.0), y


def raises_at(data: list[Any], at: int, error: type[BaseException]) -> Iterator[Any]:
    for i, batch in enumerate(data):
        if i == at:
            raise error("stop here")
        yield batch


def twins(make: Callable[[], nn.Module]) -> Any:
    torch.manual_seed(0)
    model = make()
    twin = copy.deepcopy(model)
    return model, torch.optim.Adam(model.parameters(), lr=0.01), twin, torch.optim.Adam(twin.parameters(), lr=0.01)


def assert_same(model: nn.Module, adam: Any, twin: nn.Module, twin_adam: Any) -> None:
    assert tutorial.same(model.state_dict(), twin.state_dict())
    assert tutorial.same(adam.state_dict()["state"], twin_adam.state_dict()["state"])


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("end", ["nan", "loader", "ctrl-c", "shape", "callback"])
def test_an_epoch_that_ends_early(end: str, engine: Any, accumulate: int) -> None:
    """The batch of number 4 is bad: with three batches to a step the last whole one is after number 2."""
    data, bad = batches(6), 4
    model, adam, twin, twin_adam = twins(normalised)
    options: dict[str, Any] = {"loss_fn": F.cross_entropy, "engine": engine, "verbose": False, "accumulate": accumulate}
    whole = bad - bad % accumulate
    cnnrs.fit(0, twin, data[:whole], optimizer=twin_adam, **options)
    error: type[BaseException] = cnnrs.NonFiniteLossError
    loader: Any = nan_at(data, bad)
    if end == "loader" or end == "ctrl-c":
        error = ZeroDivisionError if end == "loader" else KeyboardInterrupt
        loader = raises_at(data, bad, error)
    elif end == "shape":
        error, loader = RuntimeError, [*data[:bad], (torch.randn(6, 1, 4, 4), data[0][1])]
    elif end == "callback":

        def stop(batch: int, loss: float) -> None:
            if batch == bad - 1:
                raise StopAsyncIteration

        error, loader, options["on_batch_end"] = StopAsyncIteration, data, stop
    with pytest.raises(error):
        cnnrs.fit(0, model, loader, optimizer=adam, **options)
    assert_same(model, adam, twin, twin_adam)
    # And it goes on from there as if nothing had been.
    options.pop("on_batch_end", None)
    cnnrs.fit(1, model, data, optimizer=adam, **options)
    cnnrs.fit(1, twin, data, optimizer=twin_adam, **options)
    assert_same(model, adam, twin, twin_adam)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_buffers_of_the_users_own(accumulate: int) -> None:
    data, bad = batches(6), 4
    model, adam, twin, twin_adam = twins(Counting)
    options: dict[str, Any] = {"loss_fn": F.cross_entropy, "engine": "python", "verbose": False}
    cnnrs.fit(0, twin, data[: bad - bad % accumulate], optimizer=twin_adam, accumulate=accumulate, **options)
    with pytest.raises(cnnrs.NonFiniteLossError):
        cnnrs.fit(0, model, nan_at(data, bad), optimizer=adam, accumulate=accumulate, **options)
    assert_same(model, adam, twin, twin_adam)
    assert len(model.seen) == len(twin.seen) > 1


@pytest.mark.parametrize("engine", ENGINES)
def test_validation_of_what_is_not_finite(engine: Any) -> None:
    model, adam, twin, twin_adam = twins(normalised)
    with pytest.raises(cnnrs.NonFiniteLossError, match="validation epoch 0, batch 1"):
        cnnrs.fit(0, model, nan_at(batches(3), 1), "validation", loss_fn=F.cross_entropy, engine=engine, verbose=False)
    assert_same(model, adam, twin, twin_adam)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_callback_sees_state_and_counters_as_they_are(engine: Any) -> None:
    data = batches(3)
    model, _, twin, _ = twins(normalised)
    sgd, twin_sgd = (torch.optim.SGD(m.parameters(), lr=0.01, momentum=0.9) for m in (model, twin))
    seen: list[Any] = []

    def look(batch: int, loss: float) -> None:
        seen.append((int(model[1].num_batches_tracked), len(sgd.state_dict()["state"])))

    cnnrs.fit(0, model, data, optimizer=sgd, loss_fn=F.cross_entropy, engine=engine, verbose=False, on_batch_end=look)
    assert seen == [(batch, len(list(model.parameters()))) for batch in (1, 2, 3)]
    cnnrs.fit(0, twin, data, optimizer=twin_sgd, loss_fn=F.cross_entropy, engine=engine, verbose=False)
    assert_same(model, sgd, twin, twin_sgd)
