"""Which engine runs a model, and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import nn

from cnnrs import _cnnrs, cpu_engine
from cnnrs.errors import UnsupportedModelError
from cnnrs.graph import Lowered, lower
from cnnrs.operations import Unsupported

Engine = Literal["auto", "cpu", "torch", "python"]


def choose(model: nn.Module, engine: Engine) -> Lowered | None:
    """The lowered model for engines ``torch`` and ``cpu``, or None for engine ``python``.

    Args:
        model: the module, in the mode it will run in.
        engine: "auto" takes ``torch`` where the model can be lowered.

    Raises:
        UnsupportedModelError: engine is "torch" or "cpu" and the model cannot be lowered; the message says why.
        ValueError: engine is not one of the four.
        TypeError: model is no ``nn.Module``.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if engine not in get_args(Engine):
        raise ValueError(f"engine must be one of {', '.join(map(repr, get_args(Engine)))}, got {engine!r}")
    if engine == "python":
        return None
    try:
        return lower(model)
    except Unsupported as reasons:
        if engine != "auto":
            raise UnsupportedModelError(f"engine {engine!r} cannot run this model:\n{reasons}") from None
        return None


def slow_on_cpu(lowered: Lowered) -> list[str]:
    """Operations that libtorch trains at least as fast as engine ``cpu``, where they are most of a model's work.

    Convolutions with a max-pool behind them, and linear layers, have kernels of their own in engine ``cpu``: several
    times as fast. All others become matrix products, in which libtorch is as good. Where these hold more than half of
    the convolutions' weights, "auto" takes ``torch``.
    """
    return [
        f"{lowered.names[node]} (Conv2d): no faster kernel than libtorch's (not 3x3 or 5x5, stride 1, then a max-pool)"
        for node in _cnnrs.cpu_slow(lowered.graph)
    ]


@dataclass(frozen=True)
class Explanation:
    """Why a model takes the engine it takes; prints as text.

    Attributes:
        engine: what ``engine="auto"`` picks for :func:`cnnrs.fit`: "cpu", "torch" or "python".
        operations: number of operations of the lowered graph, 0 for engine "python".
        reasons: what keeps the model from a faster engine, with the names of the layers; empty for engine "cpu".
    """

    engine: str
    operations: int
    reasons: tuple[str, ...]

    def __str__(self) -> str:
        if self.engine == "python":
            first = "engine 'python': the model is called as it is, once per batch, because"
        elif self.engine == "torch":
            first = (
                f"engine 'torch': all {self.operations} operations run in libtorch without Python, with the bits of "
                "the plain loop on the CPU; not engine 'cpu', because"
            )
        else:
            return (
                f"engine 'cpu': all {self.operations} operations are compiled to native code; equal to the plain loop "
                "up to float rounding, without .grad. A loss or optimizer that it does not know, batches that are not "
                "float32, and amp take engine 'torch', which has the plain loop's bits"
            )
        return "\n".join([first, *listed(self.reasons)])

    __repr__ = __str__


def listed(reasons: Sequence[str], most: int = 8) -> list[str]:
    """Reasons as lines of text; of many the first few and how many more there are."""
    lines = [f"  - {reason}" for reason in reasons[:most]]
    return lines if len(reasons) <= most else [*lines, f"  ... and {len(reasons) - most} more"]


def explain(model: nn.Module) -> Explanation:
    """Say in words which engine :func:`cnnrs.fit` picks for ``model``, and why.

    Args:
        model: any module; it is looked at in its present mode (train or eval) and not changed.

    Returns:
        An object that prints as the explanation, with ``engine``, ``operations`` and ``reasons``.

    Raises:
        TypeError: model is no ``nn.Module``.

    >>> import cnnrs
    >>> cnnrs.explain(cnnrs.models.MnistNet()).engine
    'cpu'
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    try:
        lowered = lower(model)
    except Unsupported as reasons:
        return Explanation("python", 0, tuple(str(reasons).split("\n")))
    slow = cpu_engine.tensor_obstacles(lowered) or slow_on_cpu(lowered)
    return Explanation("torch" if slow else "cpu", len(lowered.graph) - 1, tuple(slow))


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
