"""The tutorial's own training loop, the reference that `cnnrs.fit` is compared with."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

Loader = Iterable[tuple[torch.Tensor, torch.Tensor]]


def fit(
    model: nn.Module, loader: Loader, phase: str, optimizer: torch.optim.Optimizer, loss_fn: Callable[..., torch.Tensor]
) -> tuple[float, float]:
    """Section 4 of the tutorial with the optimizer and the loss as arguments; accuracy as a float."""
    if phase == "training":
        model.train()
    if phase == "validation":
        model.eval()
    running_loss = 0.0
    running_correct = 0
    samples = 0
    for data, target in loader:
        if phase == "training":
            optimizer.zero_grad()
        output = model(data)
        loss = loss_fn(output, target)
        running_loss += loss_fn(output, target, reduction="sum").item()
        preds = output.data.max(dim=1, keepdim=True)[1]
        running_correct += int(preds.eq(target.data.view_as(preds)).cpu().sum())
        samples += len(data)
        if phase == "training":
            loss.backward()
            optimizer.step()
    return running_loss / samples, 100.0 * running_correct / samples


def mean(loss_fn: Any, means: list[float], data: Loader) -> float:
    """The batches' means as one: each counts by what torch divides its sum by, which ignored targets are no part of."""
    parts = []
    for _, targets in data:
        counts = targets != getattr(loss_fn, "ignore_index", -100)
        weight = getattr(loss_fn, "weight", None)
        whole = targets.is_floating_point()
        parts.append(
            float(len(targets) if whole else counts.sum() if weight is None else weight[targets[counts]].sum())
        )
    return sum(mean * part for mean, part in zip(means, parts, strict=True)) / sum(parts)


def twins(model: nn.Module, make: Callable[..., Any]) -> tuple[nn.Module, Any, nn.Module, Any]:
    """Two copies of a model with an optimizer each."""
    a, b = copy.deepcopy(model), copy.deepcopy(model)
    return a, make(a.parameters()), b, make(b.parameters())


def same(a: Any, b: Any) -> bool:
    """Whether two state dicts hold the same bits."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)
