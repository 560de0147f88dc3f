"""Whose memory it is: what is dropped, held, shared or moved while a native engine or a consumer reads it."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import cnnrs
import tutorial
from cnnrs import _cnnrs
from cnnrs.model.lowering import lower
from tensors import (
    ENGINES,
    LABELS,
    compiled,
    digits,
    fitted,
    follows,
    images,
    loop,
    network,
    outcome,
    sgd,
    small,
)

# -- whose memory it is ------------------------------------------------------------------------------------------------


def churn() -> None:
    """What was freed is written over."""
    for rows in (1, 6, 6, 6, 64):
        torch.full((rows, 3, 8, 8), float("nan"))


@pytest.mark.parametrize("engine", ENGINES)
def test_batches_that_are_dropped_while_they_are_read(engine: str) -> None:
    theirs, their_sgd, ours, our_sgd = tutorial.twins(network(), sgd)

    def batches() -> Iterator[Any]:
        for i in range(8):
            yield images() + i, LABELS.clone()
            churn()

    expected = outcome(lambda: loop(theirs, their_sgd, [(images() + i, LABELS) for i in range(8)]))
    follows(outcome(lambda: fitted(ours, our_sgd, batches(), engine)), expected, "auto")


def test_features_that_are_dropped_while_they_are_read() -> None:
    rows = torch.randn(60, 6, generator=torch.Generator().manual_seed(2))
    means = []
    for drop in (False, True):
        model, seen = small(), []
        dataset = cnnrs.FeatureDataset(rows.clone(), torch.arange(60) % 3)

        def after(_: int, mean: float, dataset: Any = dataset, seen: list[float] = seen, drop: bool = drop) -> None:
            seen.append(mean)
            if drop and len(seen) == 1:
                dataset.features, dataset.labels = torch.empty(60, 6), torch.arange(60)
                gc.collect()
                torch.full((60, 6), float("nan"))

        cnnrs.fit(
            0, model, cnnrs.DataLoader(dataset, batch_size=8), optimizer=sgd(model.parameters()), engine="cpu",
            loss_fn=F.cross_entropy, on_batch_end=after, verbose=False,
        )  # fmt: skip
        means.append(seen)
    assert len(means[0]) == 8 and means[0] == means[1]


def test_features_outlive_their_network_and_their_weights() -> None:
    net, model = compiled()
    with torch.no_grad():
        expected = model(images())
    churn()
    features = net(images())
    row, array = features[2], features[3].numpy()
    del net, features
    for _ in range(3):
        other, _ = compiled()
        other(images() * 0)
        churn()
    # Sums of 600 terms of size one, each rounded by 6e-8.
    torch.testing.assert_close(row, expected[2], rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(torch.from_numpy(array), expected[3], rtol=1e-5, atol=2e-5)


def test_features_that_somebody_holds_are_not_written_over() -> None:
    net, _ = compiled()
    held = [net(images() + i) for i in range(12)]
    copies = [features.clone() for features in held]
    views = [features[1:, :2] for features in held[:6]]
    kept = [view.clone() for view in views]
    del held[:6]
    for i in range(20):
        net(images() - i)
    assert all(torch.equal(a, b) for a, b in zip(held, copies[6:], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(views, kept, strict=True))
    assert len({features.data_ptr() for features in [*held, *views]}) == 12
    addresses = [net(images()).data_ptr() for _ in range(6)]
    assert len(set(addresses)) < 6, "memory that nobody holds is used again"


def test_batches_are_tensors_like_any_others(mnist_root: Path) -> None:
    loader = cnnrs.DataLoader(digits(mnist_root), batch_size=16)
    batches = iter(loader)
    first, _ = next(batches)
    kept = first.clone()
    assert torch.equal(pickle.loads(pickle.dumps(first)), kept)
    assert torch.equal(copy.deepcopy(first), kept)
    assert torch.equal(torch.from_numpy(first.numpy()), kept)
    assert first.share_memory_() is first and first.is_shared() and torch.equal(first, kept)
    first.mul_(2)
    rest = [x for x, _ in batches]
    del loader, batches
    churn()
    assert torch.equal(first, kept * 2)
    plain = [x for x, _ in cnnrs.DataLoader(digits(mnist_root), batch_size=16)]
    assert torch.equal(plain[0], kept) and all(torch.equal(a, b) for a, b in zip(rest, plain[1:], strict=True))
    parameter = nn.Parameter(rest[0])
    (parameter * 2).sum().backward()
    assert parameter.grad is not None and bool((parameter.grad == 2).all())


def test_digits_outlive_their_data_set(mnist_root: Path) -> None:
    dataset = digits(mnist_root)
    expected = [x for x, _ in cnnrs.DataLoader(dataset, batch_size=16)]
    batches = iter(cnnrs.DataLoader(dataset, batch_size=16, num_workers=2))
    found = [next(batches)[0]]
    dataset.data = torch.zeros_like(dataset.data)
    del dataset
    gc.collect()
    torch.full((70, 28, 28), 9, dtype=torch.uint8)
    found += [x for x, _ in batches]
    assert [len(x) for x in found] == [len(x) for x in expected]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


# -- memory that moves ---------------------------------------------------------------------------------------------


class Moving:
    """Batches; before one of them, or behind the last, the model's memory moves."""

    def __init__(self, model: nn.Module, at: int, move: Callable[[nn.Module], object]) -> None:
        generator = torch.Generator().manual_seed(5)
        self.data = [(torch.randn(8, 6, 8, 8, generator=generator), torch.arange(8) % 3) for _ in range(4)]
        self.model, self.at, self.move = model, at, move

    def __iter__(self) -> Iterator[Any]:
        for number, batch in enumerate(self.data):
            if number == self.at:
                self.move(self.model)
            yield batch
        if self.at == len(self.data):
            self.move(self.model)


def normed() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(6, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(128, 3))


def renew(model: nn.Module) -> None:
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data = tensor.data.clone()


MOVES: dict[str, Callable[[nn.Module], object]] = {"share_memory": lambda m: m.share_memory(), "data": renew}


@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES)
@pytest.mark.parametrize("at", [2, 4])
def test_weights_that_move_between_two_steps(at: int, move: Callable[[nn.Module], object]) -> None:
    ours, theirs = normed(), normed()
    for model, fit in ((ours, "auto"), (theirs, "python")):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        data: Any = Moving(model, at, move)
        cnnrs.fit(0, model, data, optimizer=optimizer, loss_fn=F.cross_entropy, engine=fit, verbose=False)  # type: ignore[arg-type]
    for (name, a), b in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES)
@pytest.mark.parametrize("at", [1, 3])
def test_weights_that_move_within_a_step(at: int, move: Callable[[nn.Module], object]) -> None:
    model = normed()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    data: Any = Moving(model, at, move)
    with pytest.raises(ValueError, match="were given other memory within a step"):
        cnnrs.fit(
            0, model, data, optimizer=optimizer, loss_fn=F.cross_entropy, engine="cpu", accumulate=2, verbose=False
        )


@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES)
def test_a_frozen_network_follows_its_weights(move: Callable[[nn.Module], object]) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 5, 3)).eval()
    lowered = lower(model, gradients=False)
    network = _cnnrs.CpuNetwork(lowered.graph, lowered.tensors, 2, False)
    for size in (8, 12):
        x = torch.randn(2, 3, size, size)
        with torch.no_grad():
            torch.testing.assert_close(network(x), model(x))
        move(model)
