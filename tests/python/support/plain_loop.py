"""`fit` beside the loop as anybody writes it: the same bits."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import nn

import cnnrs
import tutorial


def plain(model: nn.Module, loader: Iterable[Any], optimizer: Any, loss_fn: Callable[..., torch.Tensor]) -> list[float]:
    """The loop, as anybody writes it."""
    model.train()
    losses = []
    for inputs, targets in loader:
        optimizer.zero_grad()
        outputs = model(inputs)
        loss = loss_fn(outputs, targets)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def follows(
    model: nn.Module,
    data: list[Any],
    loss_fn: Callable[..., torch.Tensor],
    make: Callable[..., Any] = sgd,
    engine: Any = "auto",
    **options: Any,
) -> tuple[float, float]:
    """What `fit` returns; weights and state must have the loop's bits."""  # fmt: skip
    theirs, their_optimizer, ours, our_optimizer = tutorial.twins(model, make)
    torch.manual_seed(1)
    losses = plain(theirs, options.pop("pairs", data), their_optimizer, loss_fn)
    torch.manual_seed(1)
    got = cnnrs.fit(0, ours, data, optimizer=our_optimizer, loss_fn=loss_fn, engine=engine, verbose=False, **options)
    assert tutorial.same(ours.state_dict(), theirs.state_dict())
    assert tutorial.same(our_optimizer.state_dict(), their_optimizer.state_dict())
    # Equal batches: a mean of means, in double from float32 losses.
    assert got[0] == pytest.approx(sum(losses) / len(losses), rel=8 * 2**-24)
    return got


def batches(n: int = 3, size: int = 4) -> list[tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(0)
    return [(torch.randn(size, 6), torch.randint(3, (size,))) for _ in range(n)]
