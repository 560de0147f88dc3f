"""What both demos use: the loop over epochs, predictions, checks."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cnnrs


def fit_all(
    model: nn.Module,
    train: Iterable[Any],
    valid: Iterable[Any],
    optimizer: torch.optim.Optimizer,
    epochs: int,
    loss_fn: Any = F.nll_loss,
) -> cnnrs.History:
    """The tutorial's loop over epochs, with a learning rate that falls along a half cosine."""
    fit = cnnrs.compile(optimizer=optimizer, loss_fn=loss_fn)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    history = cnnrs.History()
    for epoch in range(epochs):
        print(f"epoch {epoch + 1}/{epochs}")
        history.append(
            train=fit(epoch, model, train, phase="training"), valid=fit(epoch, model, valid, phase="validation")
        )
        scheduler.step()
    return history


@torch.no_grad()
def predict(model: nn.Module, batches: Iterable[Any], limit: int | None = None) -> Tensor:
    """Int64 class indices ``(N,)`` that ``model`` gives for the inputs of the first ``limit`` batches."""
    model.eval()
    return torch.cat([model(inputs).argmax(dim=1) for inputs, _ in itertools.islice(batches, limit)])


def save_curves(history: cnnrs.History, path: Path) -> None:
    """Write the curves and say where."""
    path.parent.mkdir(parents=True, exist_ok=True)
    history.plot(path)
    print(f"curves: {path.resolve()}")


def heading(text: str) -> None:
    """A line that can be found when scrolling back."""
    print(f"\n== {text}", flush=True)


def report(name: str, accuracy: float, threshold: float) -> bool:
    """Print an accuracy beside what it must reach."""
    return verdict(
        f"{name}: {accuracy:.2f} % validation accuracy, at least {threshold:.0f} % expected", accuracy >= threshold
    )


def verdict(text: str, good: bool) -> bool:
    """Print one check."""
    print(f"  {'ok    ' if good else 'FAILED'}  {text}")
    return good
