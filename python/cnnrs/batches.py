"""What a loader yields, as the engines of :func:`cnnrs.fit` take it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

import torch
from torch import nn

from cnnrs._progress import progress as bar
from cnnrs.engines import to_device


def to_channels_last(model: nn.Module) -> None:
    """Put the 4-D weights into that order of memory, in place; the numbers stay."""
    for tensor in chain(model.parameters(), model.buffers()):
        if tensor.dim() == 4:
            # As `model.to` does; what has the order already stays where it is.
            tensor.data = tensor.data.to(memory_format=torch.channels_last)


def on_device(
    loader: Iterable[Any], device: torch.device, channels_last: bool, description: str, progress: bool
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The loader's pairs on the model's device, under a progress bar.

    Raises:
        TypeError: the loader does not yield pairs.
        RuntimeError: a batch is on another accelerator than the model.
    """
    for batch in bar(loader, description, verbose=progress):
        if not (isinstance(batch, (tuple, list)) and len(batch) == 2):
            raise TypeError(f"the loader must yield pairs (inputs, targets), got {_describe(batch)}")
        inputs, targets = (_moved(torch.as_tensor(part), device) for part in batch)
        if channels_last and inputs.dim() == 4:
            inputs = inputs.to(memory_format=torch.channels_last)
        yield inputs, targets


def _moved(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    if device.type == "cuda" and tensor.device.type == "cpu" and not tensor.is_pinned():
        # A copy out of pageable memory waits until the device has done all that is queued before it.
        tensor = tensor.pin_memory()
    return to_device(tensor, device)


def _describe(batch: Any) -> str:
    size = f" of length {len(batch)}" if isinstance(batch, (tuple, list, dict)) else ""
    return f"a {type(batch).__name__}{size}"
