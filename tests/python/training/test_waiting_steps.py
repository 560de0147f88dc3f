"""Few samples and a huge layer: steps wait for each other where nobody can look, and nobody can tell."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import cnnrs
import tutorial
from cnnrs import _cnnrs

pytestmark = pytest.mark.usefixtures("two_threads")
BATCH = 5


def head() -> nn.Module:
    """2^22 weights and more in the first layer; smooth, so that rounding does not grow."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(10_501, 400), nn.Tanh(), nn.Linear(400, 3))


def columns(rows: int = 63) -> tuple[torch.Tensor, torch.Tensor]:
    drawn = torch.Generator().manual_seed(1)
    return torch.randn(rows, 10_501, generator=drawn), torch.randint(3, (rows,), generator=drawn)


def batches(features: torch.Tensor, labels: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return list(zip(features.split(BATCH), labels.split(BATCH), strict=True))


def rows(features: torch.Tensor, labels: torch.Tensor) -> Any:
    return cnnrs.DataLoader(cnnrs.FeatureDataset(features, labels), batch_size=BATCH)


def fit(model: nn.Module, data: Any, optimizer: Any, **options: Any) -> tuple[float, float]:
    return cnnrs.fit(
        0, model, data, optimizer=optimizer, loss_fn=F.cross_entropy, engine="cpu", verbose=False, **options
    )  # fmt: skip


def same(a: Any, b: Any) -> None:
    """Weights, or momentum, up to some dozen roundings of numbers of up to 0.1."""
    for one, other in zip(a, b, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.fixture
def unseen(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """What the engine is told of every epoch."""
    found: list[bool] = []
    original = _cnnrs.fit_cpu

    def spy(epoch: Any, graph: Any, tensors: Any, task: Any, *rest: Any) -> Any:
        found.append(task["unseen"])
        return original(epoch, graph, tensors, task, *rest)

    monkeypatch.setattr(_cnnrs, "fit_cpu", spy)
    return found


@pytest.mark.parametrize("data", [batches, rows])
@pytest.mark.parametrize(
    "options",
    [
        {"lr": 0.05},
        {"lr": 0.01, "momentum": 0.9},
        {"lr": 0.01, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
        {"lr": 0.01, "momentum": 0.5, "dampening": 0.3, "weight_decay": 0.1, "maximize": True},
    ],
    ids=["plain", "momentum", "nesterov", "maximize"],
)
def test_epochs_are_the_loops(data: Callable[..., Any], options: dict[str, Any], unseen: list[bool]) -> None:
    theirs, their_sgd, ours, our_sgd = tutorial.twins(head(), lambda parameters: torch.optim.SGD(parameters, **options))
    for _ in range(2):
        expected = tutorial.fit(theirs, batches(*columns()), "training", their_sgd, F.cross_entropy)
        assert fit(ours, data(*columns()), our_sgd) == pytest.approx(expected, rel=1e-5)
        same(ours.parameters(), theirs.parameters())
        if "momentum" in options:
            buffers = [[sgd.state[p]["momentum_buffer"] for p in m.parameters()] for m, sgd in
                       ((ours, our_sgd), (theirs, their_sgd))]  # fmt: skip
            same(*buffers)
    assert unseen == [True, True]


def test_whoever_looks_sees_the_weights_of_the_last_step(unseen: list[bool]) -> None:
    theirs, their_sgd, ours, our_sgd = tutorial.twins(head(), lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9))
    seen: dict[str, list[torch.Tensor]] = {"loop": [], "loader": [], "callback": []}

    def looking(model: nn.Module, to: list[torch.Tensor]) -> Iterator[Any]:
        for batch in batches(*columns()):
            to.append(model[0].weight.detach().clone())  # type: ignore[index]
            yield batch

    tutorial.fit(theirs, looking(theirs, seen["loop"]), "training", their_sgd, F.cross_entropy)
    fit(ours, looking(ours, seen["loader"]), our_sgd)
    same(seen["loader"], seen["loop"])
    _, _, ours, our_sgd = tutorial.twins(head(), lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9))
    weight = ours[0].weight  # type: ignore[index]
    look = lambda batch, mean: seen["callback"].append(weight.detach().clone())  # noqa: E731
    fit(ours, batches(*columns()), our_sgd, on_batch_end=look)
    same(seen["callback"][:-1], seen["loop"][1:])
    assert unseen == [False, False]


@pytest.mark.parametrize("data", [batches, rows])
@pytest.mark.parametrize("bad", [1, 6, 10])
def test_an_epoch_that_ends_early_has_taken_every_step_before(data: Callable[..., Any], bad: int) -> None:
    features, labels = columns()
    features[bad * BATCH + 2, 5] = float("nan")
    theirs, their_sgd, ours, our_sgd = tutorial.twins(head(), lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9))
    with pytest.raises(cnnrs.NonFiniteLossError, match=f"batch {bad}"):
        fit(ours, data(features, labels), our_sgd)
    tutorial.fit(theirs, batches(features, labels)[:bad], "training", their_sgd, F.cross_entropy)
    same(ours.parameters(), theirs.parameters())
    same(*([sgd.state[p]["momentum_buffer"] for p in m.parameters()]
           for m, sgd in ((ours, our_sgd), (theirs, their_sgd))))  # fmt: skip


def test_a_bar_changes_nothing(unseen: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cnnrs.training.fit.is_shown", lambda: True)
    model = head()
    fit(model, rows(*columns()), torch.optim.SGD(model.parameters(), lr=0.01), progress=True)
    assert unseen == [True]


def test_what_cannot_wait_does_not(unseen: list[bool]) -> None:
    for make, options in (
        # (Where gradients are next to nothing, Adam makes steps of their rounding.)
        (lambda p: torch.optim.Adam(p, lr=1e-3, eps=1e-2), {}),
        (lambda p: torch.optim.SGD(p, lr=0.1), {"clip_grad_norm": 0.1}),
        (lambda p: torch.optim.SGD(p, lr=0.1), {"accumulate": 2}),
    ):
        theirs, their_optimizer, ours, our_optimizer = tutorial.twins(head(), make)
        cnnrs.fit(
            0, theirs, batches(*columns()), optimizer=their_optimizer, loss_fn=F.cross_entropy, engine="python",
            verbose=False, **options,
        )  # fmt: skip
        fit(ours, batches(*columns()), our_optimizer, **options)
        same(ours.parameters(), theirs.parameters())
    assert unseen == [True] * 3
