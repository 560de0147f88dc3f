"""Labels that have travelled to a device: the host keeps what it sent, and looks at that without waiting."""

from __future__ import annotations

import torch
from torch.utils.weak import WeakTensorKeyDictionary

_SENT = WeakTensorKeyDictionary()


def sent(moved: torch.Tensor, host: torch.Tensor) -> None:
    """Remember the labels on the host, integers of any shape, as long as ``moved`` lives."""
    if moved is not host and not host.is_floating_point():
        _SENT[moved] = host


def on_host(labels: object) -> torch.Tensor | None:
    """What these labels are on the host; None where they never were there, or never left."""
    return _SENT.get(labels) if isinstance(labels, torch.Tensor) else None  # type: ignore[no-untyped-call]
