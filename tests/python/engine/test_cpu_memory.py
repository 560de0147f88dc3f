"""Who owns, shares and initialises what an engine writes."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import cnnrs
import tutorial
from cnnrs.engine import cpu_training
from cnnrs.model.lowering import lower

pytestmark = pytest.mark.usefixtures("two_threads")
ENGINES = ["auto", "cpu", "torch", "python"]
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
}
# A step of float32 sums of some hundred terms in another order: 1e-6 of values of order 1; Adam divides by small roots.
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}


def data(count: int = 4) -> list[Any]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(8, 6, generator=generator), torch.randint(5, (8,), generator=generator)) for _ in range(count)]


def plain(model: nn.Module, optimizer: torch.optim.Optimizer, batches: Any) -> None:
    model.train()
    for x, y in batches:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


def fit(model: nn.Module, optimizer: Any, batches: Any, engine: Any, **options: Any) -> None:
    cnnrs.fit(0, model, batches, optimizer=optimizer, loss_fn=F.cross_entropy, engine=engine, verbose=False, **options)


def assert_close(model: nn.Module, optimizer: Any, twin: nn.Module, twin_optimizer: Any) -> None:
    """Weights and state; state exists where the plain loop has it."""
    for (name, a), b in zip(model.state_dict().items(), twin.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, **TOLERANCE, msg=lambda text, name=name: f"{name}: {text}")
    ours, theirs = optimizer.state_dict()["state"], twin_optimizer.state_dict()["state"]
    assert ours.keys() == theirs.keys()
    for index, state in theirs.items():
        assert ours[index].keys() == state.keys()
        for name, value in state.items():
            torch.testing.assert_close(ours[index][name], value, **TOLERANCE)


class Two(nn.Module):
    """Two hidden layers, a head, and one that nothing comes of."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head, self.unused = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 5), nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.b(torch.relu(self.a(x))))
        self.unused(x)
        return self.head(x)


def make(seed: int = 0) -> Two:
    torch.manual_seed(seed)
    return Two()


def share_all(model: Two) -> None:
    model.b.weight.data = model.a.weight.data


def share_part(model: Two) -> None:
    whole = torch.randn(9, 6)
    model.a.weight.data, model.b.weight.data = whole[:6], whole[3:]


def share_with_state(model: Two) -> None:
    model.b.bias.data = model.a.weight.data[0]


@pytest.mark.parametrize("engine", ["auto", "torch", "python"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("tie", [share_all, share_part, share_with_state])
def test_parameters_over_one_memory(tie: Callable[[Two], None], optimizer: str, engine: Any) -> None:
    runs = []
    # Threads that wrote the same memory would not do so in the same order every time.
    for run in range(21 if engine == "auto" else 2):
        model = make()
        tie(model)
        step = OPTIMIZERS[optimizer](model.parameters())
        if run == 0:
            plain(model, step, data())
        else:
            fit(model, step, data(), engine)
        runs.append(model.state_dict())
    assert all(tutorial.same(run, runs[0]) for run in runs)
    model = make()
    tie(model)
    with pytest.raises(cnnrs.UnsupportedModelError, match="share memory"):
        fit(model, torch.optim.SGD(model.parameters(), lr=0.1), data(), "cpu")


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_state_exists_where_there_was_a_gradient(optimizer: str, engine: Any) -> None:
    model, twin = make(), make()
    ours, theirs = OPTIMIZERS[optimizer](model.parameters()), OPTIMIZERS[optimizer](twin.parameters())
    for _ in range(2):
        plain(twin, theirs, data())
        fit(model, ours, data(), engine)
        assert model.unused.weight not in ours.state
        assert_close(model, ours, twin, theirs)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_no_state_before_the_first_step(optimizer: str, engine: Any) -> None:
    model = make()
    step = OPTIMIZERS[optimizer](model.parameters())

    def broken() -> Any:
        yield from data(2)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fit(model, step, broken(), engine, accumulate=3)
    assert not step.state
    if engine == "cpu":
        with pytest.raises(cnnrs.UnsupportedModelError):
            fit(model, step, data(), engine, amp="bf16")
    assert cpu_training.obstacles(lower(model), loss={"kind": "mse"}, optimizer=step) == []
    assert not step.state


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("groups", [1, 2])
def test_one_parameter_twice_in_the_optimizer(groups: int, engine: Any) -> None:
    def optimizer(model: nn.Module) -> torch.optim.Optimizer:
        step = torch.optim.SGD([{"params": list(model.parameters())}, {"params": [nn.Parameter(torch.zeros(1))]}], 0.05)
        step.param_groups[groups - 1]["params"].append(model.a.weight)  # type: ignore[union-attr]
        return step

    model, twin = make(), make()
    ours, theirs = optimizer(model), optimizer(twin)
    if engine == "cpu":
        with pytest.raises(cnnrs.UnsupportedModelError, match="the optimizer"):
            fit(model, ours, data(), engine)
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain(twin, theirs, data())
        fit(model, ours, data(), engine)
    assert tutorial.same(model.state_dict(), twin.state_dict())


def new_memory(model: Two, optimizer: Any) -> None:
    model.a.weight.data = model.a.weight.data.clone() * 0.5


def new_parameters(model: Two, optimizer: Any) -> None:
    model.load_state_dict({k: v.clone() * 0.5 for k, v in model.state_dict().items()}, assign=True)


def new_type(model: Two, optimizer: Any) -> None:
    model.to(torch.float64).to(torch.float32)


def frozen(model: Two, optimizer: Any) -> None:
    model.a.requires_grad_(False)


def new_group(model: Two, optimizer: Any) -> None:
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))], "lr": 1.0})


def new_options(model: Two, optimizer: Any) -> None:
    optimizer.param_groups[0]["maximize"] = True


def new_state(model: Two, optimizer: Any) -> None:
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def no_state(model: Two, optimizer: Any) -> None:
    optimizer.state.clear()


CHANGES = [new_memory, new_parameters, new_type, frozen, new_group, new_options, new_state, no_state]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_between_epochs_counts(change: Any, engine: Any) -> None:
    model, twin = make(), make()
    ours, theirs = OPTIMIZERS["SGD"](model.parameters()), OPTIMIZERS["SGD"](twin.parameters())
    for _ in range(2):
        plain(twin, theirs, data())
        fit(model, ours, data(), engine)
        assert_close(model, ours, twin, theirs)
        change(twin, theirs)
        change(model, ours)
        if change is new_parameters:
            # They are not the optimizer's.
            return


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_between_batches_counts(change: Any, engine: Any) -> None:
    model, twin = make(), make()
    ours, theirs = OPTIMIZERS["SGD"](model.parameters()), OPTIMIZERS["SGD"](twin.parameters())

    def at_the_second(batch: int, loss: float) -> None:
        if batch == 1:
            change(model, ours)

    batches = data(4)
    plain(twin, theirs, batches[:2])
    change(twin, theirs)
    fit(model, ours, batches, engine, on_batch_end=at_the_second)
    plain(twin, theirs, batches[2:])
    assert_close(model, ours, twin, theirs)


def expanded(model: Two) -> None:
    model.b.bias = nn.Parameter(torch.zeros(1).expand(6))


def transposed(model: Two) -> None:
    model.b.weight = nn.Parameter(torch.randn(6, 6, generator=torch.Generator().manual_seed(2)).t())


def held_but_frozen(model: Two) -> None:
    model.b.weight.requires_grad_(False)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("change", [expanded, transposed, held_but_frozen])
def test_parameters_in_unusual_memory(change: Any, engine: Any) -> None:
    model, twin = make(), make()
    change(model), change(twin)
    ours, theirs = OPTIMIZERS["SGD"](model.parameters()), OPTIMIZERS["SGD"](twin.parameters())
    try:
        plain(twin, theirs, data())
    except RuntimeError as refused:
        with pytest.raises((RuntimeError, cnnrs.UnsupportedModelError)) as found:
            fit(model, ours, data(), engine)
        assert engine == "cpu" or str(found.value)[:30] == str(refused)[:30]
        return
    if engine == "cpu" and change is transposed:
        with pytest.raises(cnnrs.UnsupportedModelError, match="not contiguous"):
            fit(model, ours, data(), engine)
        return
    fit(model, ours, data(), engine)
    assert_close(model, ours, twin, theirs)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("rows", [False, True])
def test_inputs_over_the_memory_of_a_parameter(rows: bool, engine: Any) -> None:
    model, twin = make(), make()
    ours, theirs = OPTIMIZERS["SGD"](model.parameters()), OPTIMIZERS["SGD"](twin.parameters())
    labels = torch.tensor([0, 1, 2, 3, 4, 0])
    plain(twin, theirs, [(twin.b.weight.detach(), labels)] * 4)
    inputs = model.b.weight.detach()
    if rows:
        dataset = cnnrs.FeatureDataset(inputs, labels)
        for _ in range(4):
            fit(model, ours, cnnrs.DataLoader(dataset, batch_size=6), engine)
    else:
        fit(model, ours, [(inputs, labels)] * 4, engine)
    assert_close(model, ours, twin, theirs)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_batch_norm_that_nothing_reads_counts_all_the_same(engine: Any) -> None:
    class Aside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.aside, self.head = nn.Conv2d(1, 3, 1), nn.BatchNorm2d(3), nn.Linear(3, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.conv(x.view(x.size(0), 1, 2, 3))
            self.aside(x)
            return self.head(x.mean((2, 3)))

    torch.manual_seed(0)
    model = Aside()
    twin = copy.deepcopy(model)
    ours, theirs = OPTIMIZERS["SGD"](model.parameters()), OPTIMIZERS["SGD"](twin.parameters())
    plain(twin, theirs, data())
    if engine == "cpu":
        with pytest.raises(ValueError, match="does not reach the output"):
            fit(model, ours, data(), engine)
        return
    fit(model, ours, data(), engine)
    assert_close(model, ours, twin, theirs)


@pytest.mark.parametrize("engine", ENGINES)
def test_state_that_is_not_what_a_step_leaves(engine: Any) -> None:
    model, twin = make(), make()
    ours, theirs = OPTIMIZERS["Adam"](model.parameters()), OPTIMIZERS["Adam"](twin.parameters())
    plain(twin, theirs, data())
    fit(model, ours, data(), engine)
    for optimizer, of in ((ours, model), (theirs, twin)):
        optimizer.state[of.a.weight]["exp_avg"] = torch.zeros(3)
    with pytest.raises(RuntimeError) as expected:
        plain(twin, theirs, data())
    with pytest.raises((RuntimeError, cnnrs.UnsupportedModelError)) as found:
        fit(model, ours, data(), engine)
    assert engine == "cpu" or str(found.value)[:20] == str(expected.value)[:20]
