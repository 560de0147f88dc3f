"""What an epoch is, for every engine."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from torch.optim import Optimizer

from cnnrs._records import Clip
from cnnrs._util.notes import note
from cnnrs.engine.losses import Loss
from cnnrs.training.feed import Module

Phase = Literal["training", "validation"]


@dataclass(frozen=True)
class Loop:
    """What happens between the gradients and the next batch."""

    clip: Clip | None
    accumulate: int
    on_batch_end: Callable[[int, float], object] | None

    def clipper(self) -> Callable[[list[torch.Tensor]], None] | None:
        """PyTorch's own clipping of the gradients of some parameters."""
        if self.clip is None:
            return None
        kind, most = self.clip["kind"], self.clip["most"]

        def clip(parameters: list[torch.Tensor]) -> None:
            if kind == "norm":
                clip_grad_norm_(parameters, most)
            else:
                clip_grad_value_(parameters, most)

        return clip


@dataclass(frozen=True)
class Job:
    """One epoch.

    Attributes:
        optimizer: None in validation.
        amp: what the layers compute in, None for what they are.
        scaled: whether gradients are scaled, as float16 needs.
        around: whether it is an enclosing ``torch.autocast`` that asks for ``amp``.
        check: whether the first batch also goes through the module itself.
        exact: whether no convolution may be Winograd's.
        orders: whether a called module may get its batches in another order of memory.
        batches: how many there are; 1 where there is no telling.
        unseen: whether no code of the user's runs between the batches, who could look at model and optimizer.
    """

    epoch: int
    phase: Phase
    model: nn.Module
    loss_fn: Loss
    optimizer: Optimizer | None
    device: torch.device
    loop: Loop
    channels_last: bool
    amp: torch.dtype | None
    scaled: bool
    around: bool
    check: bool
    exact: bool
    orders: bool
    batches: int
    unseen: bool

    def module(self) -> Module:
        """What the plain loop would call."""
        return Module(self.model, self.loss_fn, self.optimizer is not None, lambda: self.autocast(keep=False))

    def autocast(self, keep: bool) -> AbstractContextManager[Any]:
        """``keep``: remember the weights in low precision until the block ends."""
        if self.amp is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.amp, cache_enabled=keep)

    def outside(self) -> AbstractContextManager[Any]:
        """As it is around the layers' autocast, where the user's own code runs."""
        if self.amp is None or self.around:
            return nullcontext()
        return torch.autocast(self.device.type, enabled=False)

    def call_user(self, batch: int, mean: float) -> None:
        """``on_batch_end``; says so if it leaves a training model in eval mode, in which the plain loop goes on too."""
        assert self.loop.on_batch_end is not None
        before = self.model.training
        with self.outside():
            self.loop.on_batch_end(batch, mean)
        if self.phase == "training" and before and not self.model.training:
            note(
                "on_batch_end has left the model in eval mode: as in a plain loop, the rest of the epoch trains "
                "without dropout and with fixed statistics; call model.train() at its end to go on as before"
            )
