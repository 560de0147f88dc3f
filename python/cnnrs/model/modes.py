"""The mode a model is in and the device it is on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Eval mode for the time being; every layer gets its own flag back."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training


@contextmanager
def on_device(model: nn.Module, device: torch.device | None) -> Iterator[None]:
    """Parameters and buffers on ``device`` for the time being, in the module's own tensors; None: where they are.

    Afterwards they have their own memory again, and what the model has written to its buffers.
    """
    if device is None:
        yield
        return
    before: list[tuple[torch.Tensor, torch.Tensor]] = []
    try:
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.device != device:
                before.append((tensor, tensor.data))
                tensor.data = tensor.data.to(device)
        versions = [tensor._version for tensor, _ in before]
        yield
        for (tensor, data), version in zip(before, versions, strict=True):
            if tensor._version != version:
                data.copy_(tensor.data)
    finally:
        for tensor, data in before:
            tensor.data = data


def device_of(model: nn.Module) -> torch.device:
    """The one device that all parameters and buffers of ``model`` are on (CPU for a model without any).

    Raises:
        RuntimeError: they are on several devices, or on "meta", where there are no numbers.
    """
    places: dict[torch.device, str] = {}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        places.setdefault(tensor.device, name)
    if len(places) > 1:
        found = ", ".join(f"{name} on {device}" for device, name in places.items())
        raise RuntimeError(f"Expected all tensors of the model to be on the same device, but found {found}")
    device = next(iter(places), torch.device("cpu"))
    if device.type == "meta":
        raise RuntimeError(f"the model is on device meta, which holds no numbers ({places[device]})")
    return device


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """``tensor`` on the model's device; CPU batches are moved, anything else must be there already.

    Raises:
        RuntimeError: the batch is on another accelerator than the model.
    """
    if tensor.device == device:
        return tensor
    if tensor.device.type != "cpu":
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but the model is on {device} and the data on "
            f"{tensor.device}: move one of them, for example model.to({str(tensor.device)!r})"
        )
    return tensor.to(device, non_blocking=True)
