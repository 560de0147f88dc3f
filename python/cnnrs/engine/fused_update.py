"""PyTorch's fused kernels for a step of SGD, Adam or AdamW on the CPU: one pass over the weights instead of several.

``torch.optim`` takes them only where ``fused=True`` asks, so they are switched on for the time of a step. They round
otherwise: SGD at the ends of tensors only.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch.autograd.graph import increment_version
from torch.optim import SGD, Adam, AdamW, Optimizer

from cnnrs._util.plain import is_plain
from cnnrs.engine.optimizers import is_hooked

#: Numbers per tensor from which on one pass is faster: a fused kernel begins later (43 instead of 13 us), but takes 0.3
#: instead of 0.5 ns for a number of SGD with momentum, of 2 ns and more with weight decay, Nesterov's momentum, or Adam
#: (2 threads, AMD, threads that sleep meanwhile: the worst case; those that spin begin sooner).
_LEAST_OF_MOMENTUM, _LEAST = 200_000, 16_000


@contextmanager
def fused(optimizer: Optimizer) -> Iterator[None]:
    """Inside, a step takes the fused kernels where they are faster and do the same, but for rounding."""
    groups = [group for group in optimizer.param_groups if _may(optimizer, group)] if _is_known(optimizer) else []
    try:
        for group in groups:
            group["fused"] = True
        yield
        # The kernels do not say that they write: who needs the old weights for a derivative is to be refused, as ever.
        for p in [p for group in groups for p in group["params"] if p.grad is not None]:
            increment_version(p)
    finally:
        for group in groups:
            group["fused"] = None


def _is_known(optimizer: Optimizer) -> bool:
    if torch.are_deterministic_algorithms_enabled():
        return False  # Who asks for them gets the bits of the plain loop.
    kind: Any = type(optimizer)
    if kind is not SGD and torch.get_default_dtype() is not torch.float32:
        return False  # Adam counts its steps in the default type, the fused kernels in float32.
    # Hooks see the options of a step.
    return kind in (SGD, Adam, AdamW) and not is_hooked(optimizer) and _are_there(kind)


@lru_cache(maxsize=3)
def _are_there(kind: Any) -> bool:
    """Whether this torch has them for the CPU, as those of 2.4 and later do."""
    weight = torch.nn.Parameter(torch.ones(1, device="cpu"))
    weight.grad = torch.ones_like(weight)
    try:
        kind([weight], lr=0.5, fused=True).step()
    except (RuntimeError, TypeError):
        return False
    return bool(weight.item() != 1.0)


def _may(optimizer: Optimizer, group: dict[str, Any]) -> bool:
    """Whether a group of options is stepped by fused kernels; the user has not said how then."""
    if group.get("fused", False) is not None or any(group.get(name) for name in ("foreach", "differentiable")):
        return False
    if group.get("capturable") or isinstance(group["lr"], torch.Tensor):
        return False
    trained = [p for p in group["params"] if p.grad is not None]
    if sum(p.numel() for p in trained) < _least(group) * max(1, len(trained)):
        return False
    if len({id(p) for p in trained}) < len(trained):
        return False  # All steps of a weight that is there twice would be counted before the first.
    states = [_averages(optimizer, p) for p in trained]
    # Some, but not all: the kernels have no word for it.
    if len(set(map(len, states))) > 1:
        return False
    return all(_are_alike(p, p.grad, *state) for p, state in zip(trained, states, strict=True))


def _least(group: dict[str, Any]) -> float:
    """Numbers per tensor."""
    if "momentum" not in group or group["weight_decay"] or group["nesterov"]:
        return _LEAST
    return _LEAST_OF_MOMENTUM if group["momentum"] else float("inf")


def _averages(optimizer: Optimizer, p: torch.Tensor) -> list[Any]:
    """What is kept of a parameter from step to step, as large as itself."""
    state = optimizer.state.get(p, {})
    return [value for name, value in state.items() if name != "step" and value is not None]


def _are_alike(*tensors: Any) -> bool:
    """Whether the kernels may walk through them together: they do not look at strides."""
    first = tensors[0]
    return all(
        isinstance(t, torch.Tensor)
        and is_plain(t)
        and t.dtype is torch.float32
        and t.device.type == "cpu"
        and t.layout is torch.strided
        and t.shape == first.shape
        and _steps(t) == _steps(first)
        for t in tensors
    ) and (first.is_contiguous() or first.is_contiguous(memory_format=torch.channels_last))


def _steps(t: torch.Tensor) -> list[int]:
    """Strides along which there is somewhere to go: 1 x 1 filters get gradients with others along their one pixel."""
    return [stride for stride, size in zip(t.stride(), t.shape, strict=True) if size != 1]
