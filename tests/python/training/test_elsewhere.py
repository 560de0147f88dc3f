"""Parameters outside the graph that the plain loop trains: engine "python" does, the others say that they would not."""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import cnnrs
from cnnrs.training.elsewhere import _read_by

Batches = list[tuple[torch.Tensor, torch.Tensor]]


def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))


def batches(count: int = 4) -> Batches:
    generator = torch.Generator().manual_seed(2)
    return [(torch.randn(6, 5, generator=generator), torch.randint(3, (6,), generator=generator)) for _ in range(count)]


def plain_loop(model: nn.Module, data: Any, optimizer: Any, loss_fn: Any) -> None:
    model.train()
    for x, y in data:
        optimizer.zero_grad()
        loss_fn(model(x), y).backward()
        optimizer.step()


class Centres(nn.Module):
    """Distance to learned centres of the classes."""

    def __init__(self) -> None:
        super().__init__()
        self.centres = nn.Parameter(torch.eye(3))

    def forward(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(outputs, targets) + (outputs - self.centres[targets]).square().mean()


#: A model, a loss, what the optimizer holds, batches; all that is trained is among what it holds.
Setting = tuple[nn.Module, Callable[..., Any], list[torch.Tensor], Any]


def centres_of_a_module() -> Setting:
    model, loss = network(), Centres()
    return model, loss, [*model.parameters(), *loss.parameters()], batches()


def centres_of_a_closure() -> Setting:
    model, centres = network(), nn.Parameter(torch.eye(3))
    return model, lambda o, y: (o - centres[y]).square().mean(), [*model.parameters(), centres], batches()


def a_weight_of_the_model_that_only_the_loss_reads() -> Setting:
    model = network()
    model.register_parameter("temperature", nn.Parameter(torch.ones(())))
    return model, lambda o, y: F.cross_entropy(o * model.temperature, y), list(model.parameters()), batches()


def inputs_that_another_model_has_computed() -> Setting:
    model, body = network(), nn.Linear(5, 5)

    class Computed:
        def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
            for x, y in batches():
                yield body(x), y

    return model, F.cross_entropy, [*model.parameters(), *body.parameters()], Computed()


def targets_that_are_learned() -> Setting:
    model, soft = network(), nn.Parameter(torch.zeros(6, 3))
    return model, F.mse_loss, [*model.parameters(), soft], [(x, soft) for x, _ in batches()]


def a_tensor_of_a_closure_in_forward() -> Setting:
    shift = nn.Parameter(torch.ones(3))

    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = network()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layers(x) + shift

    model = Shifted()
    return model, F.cross_entropy, [*model.parameters(), shift], batches()


def a_weight_of_a_closure_in_forward() -> Setting:
    weight = nn.Parameter(torch.ones(3, 3))

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = network()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.linear(self.layers(x), weight)

    model = Mixed()
    return model, F.cross_entropy, [*model.parameters(), weight], batches()


OUTSIDE = [
    centres_of_a_module, centres_of_a_closure, a_weight_of_the_model_that_only_the_loss_reads,
    inputs_that_another_model_has_computed, targets_that_are_learned, a_tensor_of_a_closure_in_forward,
    a_weight_of_a_closure_in_forward,
]  # fmt: skip


@pytest.mark.parametrize("setting", OUTSIDE, ids=lambda f: f.__name__)
def test_all_that_the_plain_loop_trains_is_trained(setting: Callable[[], Setting]) -> None:
    torch.manual_seed(0)
    model, loss_fn, expected, data = setting()
    plain_loop(model, data, torch.optim.Adam(expected, lr=0.1), loss_fn)
    torch.manual_seed(0)
    model, loss_fn, held, data = setting()
    before = [p.detach().clone() for p in held]
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        cnnrs.fit(0, model, data, optimizer=torch.optim.Adam(held, lr=0.1), loss_fn=loss_fn, verbose=False)
    assert all(torch.equal(p, q) for p, q in zip(held, expected, strict=True))
    assert not any(torch.equal(p, q) for p, q in zip(held, before, strict=True))


REASONS = {
    centres_of_a_module: r"the optimizer holds 1 parameters, the first of shape \(3, 3\), that no operation",
    a_weight_of_the_model_that_only_the_loss_reads: r"the optimizer holds 1 parameters, the first of shape \(\), that",
    inputs_that_another_model_has_computed: "got a Tensor that requires gradients",
    a_tensor_of_a_closure_in_forward: "is not a member of this module|neither parameter nor buffer",
}


@pytest.mark.parametrize("engine", ["cpu", "torch"])
@pytest.mark.parametrize("setting", REASONS, ids=lambda f: f.__name__)
def test_engines_that_would_not_train_it_say_so(setting: Any, engine: Any) -> None:
    model, loss_fn, held, data = setting()
    before = [p.detach().clone() for p in held]
    optimizer = torch.optim.Adam(held, lr=0.1)
    with pytest.raises(cnnrs.UnsupportedModelError) as refused:
        cnnrs.fit(0, model, data, optimizer=optimizer, loss_fn=loss_fn, engine=engine, verbose=False)
    known = re.search(REASONS[setting], str(refused.value))
    assert known or (engine == "cpu" and "the loss is none of" in str(refused.value)), refused.value
    assert all(torch.equal(p, q) for p, q in zip(held, before, strict=True))


def test_a_loss_with_weights_that_another_optimizer_steps() -> None:
    found = []
    for fit in (False, True):
        model, loss = network(), Centres()
        sgd, other = torch.optim.SGD(model.parameters(), lr=0.1), torch.optim.SGD(loss.parameters(), lr=0.5)

        def step(*_: Any, other: Any = other) -> None:
            other.step()
            other.zero_grad()

        if fit:
            cnnrs.fit(0, model, batches(), optimizer=sgd, loss_fn=loss, on_batch_end=step, verbose=False)
        else:
            for batch in batches():
                plain_loop(model, [batch], sgd, loss)
                step()
        found.append([p.detach() for p in [*model.parameters(), *loss.parameters()]])
    with pytest.raises(cnnrs.UnsupportedModelError):
        cnnrs.fit(0, model, batches(), optimizer=sgd, loss_fn=loss, on_batch_end=step, engine="cpu", verbose=False)
    assert all(torch.equal(p, q) for p, q in zip(*found, strict=True))


@pytest.mark.parametrize("engine", ["cpu", "torch"])
def test_batches_that_begin_to_require_gradients(engine: Any) -> None:
    model, data = network(), batches()
    data[2][0].requires_grad_()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(cnnrs.UnsupportedModelError, match="got a Tensor that requires gradients"):
        cnnrs.fit(0, model, data, optimizer=sgd, loss_fn=F.cross_entropy, engine=engine, verbose=False)
    cnnrs.fit(0, model, data, "validation", loss_fn=F.cross_entropy, engine=engine, verbose=False)


@pytest.mark.parametrize("engine", ["auto", "torch"])
@pytest.mark.parametrize("loss_fn", [
    F.cross_entropy, nn.CrossEntropyLoss(), lambda o, y: F.cross_entropy(o, y) * 2,
    functools.partial(F.cross_entropy, label_smoothing=0.1), nn.MultiMarginLoss(),
])  # fmt: skip
def test_what_trains_nothing_else_stays_compiled(loss_fn: Any, engine: Any) -> None:
    model = network()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cnnrs.fit(0, model, batches(), optimizer=sgd, loss_fn=loss_fn, engine=engine, verbose=False)


@pytest.mark.parametrize("engine", ["cpu", "torch"])
def test_an_unused_parameter_and_a_known_loss_stay_compiled(engine: Any) -> None:
    model = network()
    model.register_parameter("unused", nn.Parameter(torch.ones(2)))
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    cnnrs.fit(0, model, batches(), optimizer=sgd, loss_fn=F.cross_entropy, engine=engine, verbose=False)
    assert torch.equal(model.unused, torch.ones(2))


def test_where_a_loss_keeps_its_parameters() -> None:
    centres = Centres()

    def closed(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return centres(outputs, targets) if unset else outputs

    for function in (
        centres, centres.forward, functools.partial(centres), functools.partial(F.mse_loss, target=centres.centres),
        closed, lambda o, y, w=centres.centres: o, lambda o, y: [closed][0](o, y),
    ):  # fmt: skip
        assert [p is centres.centres for p in _read_by(function)] == [True], function
    unset = True
    assert not list(_read_by(F.cross_entropy))
