"""What ``loss.backward()`` would reach besides the operations of a lowered model."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from cnnrs.engine.losses import Loss, known_loss

_LIBRARIES = {"builtins", "torch", "torchvision", "numpy"}


def trained_elsewhere(
    reached: list[torch.Tensor], optimizer: Optimizer | None, loss_fn: Loss, watched: bool
) -> str | None:
    """What the engines would not train although the plain loop does; None where there is nothing.

    They differentiate with respect to the parameters that the output depends on and the optimizer holds. A loss that is
    called may read others, and who is called after a batch may step another optimizer.

    Args:
        reached: the parameters that the model's output depends on.
        optimizer: None for validation, which trains nothing.
        loss_fn: one that is known reads outputs and targets only.
        watched: whether there is an ``on_batch_end``, which sees gradients.
    """
    if optimizer is None:
        return None
    inside = {id(tensor) for tensor in reached}
    held = [p for group in optimizer.param_groups for p in group["params"]]
    others = inside - {id(p) for p in held}
    if watched and any(p.requires_grad and id(p) in others for p in reached):
        return "on_batch_end may use the gradients of parameters that the optimizer does not hold"
    if known_loss(loss_fn) is not None:
        return None
    outside = [p for p in held if p.requires_grad and id(p) not in inside]
    if outside:
        what = f"{len(outside)} parameters, the first of shape {tuple(outside[0].shape)},"
        return f"the optimizer holds {what} that no operation of the model reads, but loss_fn may"
    if any(p.requires_grad and id(p) not in inside for p in _read_by(loss_fn)):
        return "loss_fn has parameters of its own, which get gradients too"
    return None


def _read_by(function: Any) -> Iterator[torch.Tensor]:
    """Tensors that a function holds: as a module, a partial, a method or a closure."""
    pending, seen = [function], set()
    while pending:
        value = pending.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, nn.Module):
            yield from value.parameters()
        elif isinstance(value, partial):
            pending += [value.func, *value.args, *value.keywords.values()]
        elif isinstance(value, MethodType):
            pending += [value.__self__, value.__func__]
        elif isinstance(value, FunctionType):
            pending += [cell.cell_contents for cell in value.__closure__ or () if _is_filled(cell)]
            pending += value.__defaults__ or ()
            names = value.__code__.co_names
            pending += [value.__globals__[name] for name in names if name in value.__globals__]
        elif isinstance(value, (list, tuple)):
            pending += value
        elif isinstance(value, dict):
            pending += value.values()
        elif _is_own_object(value):
            pending += vars(value).values()


def _is_own_object(value: Any) -> bool:
    """Whether it is an object of a class that is neither Python's nor torch's."""
    whose = type(value).__module__.partition(".")[0]
    return hasattr(value, "__dict__") and not isinstance(value, ModuleType) and whose not in _LIBRARIES


def _is_filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True
