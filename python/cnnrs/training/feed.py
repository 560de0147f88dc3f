"""What the user's own module says to a batch that an engine would not take."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from cnnrs.training.buffers import Buffers


class Feed(Iterator[Any]):
    """An iterator that remembers what it yielded last.

    Attributes:
        current: that, None where the next one could not be had.
    """

    def __init__(self, batches: Iterator[Any]) -> None:
        self._batches = batches
        self.current: Any = None

    def __next__(self) -> Any:
        self.current = None
        self.current = next(self._batches)
        return self.current


@dataclass(frozen=True)
class Module:
    """What a plain loop calls for every batch.

    Args:
        model: in the mode it will run in.
        loss_fn: called with outputs and targets.
        training: whether there are gradients.
        autocast: makes the context that the layers run in.
    """

    model: nn.Module
    loss_fn: Callable[..., Any]
    training: bool
    autocast: Callable[[], AbstractContextManager[Any]]

    def ask(self, batch: tuple[Any, Any], cause: Exception) -> None:
        """Raises what the module, the loss or backward raises for a batch; parameters, gradients and buffers stay.

        So what PyTorch refuses is refused in its words; an engine's, which name the layer, are given as the cause.
        """
        inputs, targets = batch
        kept = Buffers(self.model)
        kept.keep()
        on_gpu = isinstance(inputs, torch.Tensor) and inputs.device.type == "cuda"
        devices = [inputs.device] if on_gpu else []
        try:
            with torch.random.fork_rng(devices), torch.set_grad_enabled(self.training):
                with self.autocast():
                    loss = self.loss_fn(self.model(inputs), targets)
                if self.training:
                    self._differentiate(loss)
        except Exception as theirs:
            raise theirs from cause
        finally:
            kept.put_back()

    def _differentiate(self, loss: Any) -> None:
        """As ``loss.backward()``, but leaves no gradients."""
        trained = [p for p in self.model.parameters() if p.requires_grad]
        if trained and isinstance(loss, torch.Tensor):
            torch.autograd.grad(loss, trained, allow_unused=True)
        else:
            loss.backward()
