"""A module's buffers as they were before a step that may come to nothing."""

from __future__ import annotations

import torch
from torch import nn


class Buffers:
    """What forward passes change: the buffers of modules in training mode, each with a copy.

    Args:
        model: its modules are listed once, their buffers before every step.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = [module for module in model.modules() if module._buffers]
        self._slots: list[tuple[nn.Module, str, torch.Tensor]] = []
        self._copies: list[torch.Tensor] = []
        self._kept = False

    def keep(self) -> None:
        """At the beginning of a step; does nothing within one."""
        if self._kept:
            return
        slots = [
            (module, name, buffer)
            for module in self._modules
            if module.training
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]
        buffers = [buffer.detach() for *_, buffer in slots]
        same = len(slots) == len(self._slots) and all(a[2] is b[2] for a, b in zip(slots, self._slots, strict=True))
        if same and all(a.shape == b.shape for a, b in zip(self._copies, buffers, strict=True)):
            if buffers:
                torch._foreach_copy_(self._copies, buffers)
        else:
            self._copies = [buffer.clone() for buffer in buffers]
        self._slots, self._kept = slots, True

    def accept(self) -> None:
        """The step is whole."""
        self._kept = False

    def put_back(self) -> None:
        """Undo a step that is not."""
        if not self._kept:
            return
        self._kept = False
        with torch.no_grad():
            for (module, name, buffer), copy in zip(self._slots, self._copies, strict=True):
                module._buffers[name] = buffer
                if buffer.shape != copy.shape:
                    module._buffers[name] = copy.clone()
                elif not torch.equal(buffer, copy):
                    # What has not changed may be memory that cannot be written, such as an expanded mask.
                    buffer.copy_(copy)
