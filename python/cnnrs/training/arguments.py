"""What :func:`cnnrs.fit` accepts, and what it says to the rest."""

from __future__ import annotations

import inspect
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from cnnrs._records import Clip

Amp = Literal["bf16", "fp16"]
#: What :func:`cnnrs.preconv` calls the same.
Precision = Literal["exact"]
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def clip(norm: float | None, value: float | None) -> Clip | None:
    """Both kinds of clipping as one."""
    if norm is not None and value is not None:
        raise ValueError("clip_grad_norm and clip_grad_value exclude each other: give one of them")
    for name, limit in (("clip_grad_norm", norm), ("clip_grad_value", value)):
        if limit is not None and not limit > 0:
            raise ValueError(f"{name} must be positive, got {limit}")
    if norm is not None:
        return {"kind": "norm", "most": float(norm)}
    return None if value is None else {"kind": "value", "most": float(value)}


def accumulate(batches: int) -> int:
    """Batches per step."""
    if batches < 1:
        raise ValueError(f"accumulate is a number of batches, at least 1, got {batches}")
    return batches


def amp_dtype(amp: Amp | None) -> torch.dtype | None:
    """What the layers compute in."""
    if amp is not None and amp not in _DTYPES:
        raise ValueError(f"amp must be None, 'bf16' or 'fp16', got {amp!r}")
    return None if amp is None else _DTYPES[amp]


def is_exact(precision: Precision | None) -> bool:
    """Whether no convolution is Winograd's."""
    if precision not in (None, "exact"):
        raise ValueError(f"precision must be None or 'exact', got {precision!r}: mixed precision is amp")
    return precision is not None


def is_channels_last(memory_format: torch.memory_format | None) -> bool:
    """Whether images and weights change their order in memory."""
    if memory_format not in (None, torch.channels_last):
        raise ValueError(f"memory_format must be None or torch.channels_last, got {memory_format!r}")
    return memory_format is not None


def check_is_optimizer(optimizer: Any) -> None:
    """Raises TypeError, with what to write instead, for anything that has no groups of parameters and no step."""
    if optimizer is None:
        raise TypeError("training needs optimizer=..., for example torch.optim.SGD(model.parameters(), lr=0.01)")
    if isinstance(optimizer, str):
        names = {name.lower(): name for name, kind in vars(torch.optim).items() if _is_optimizer_class(kind)}
        example = names.get(optimizer.lower(), "SGD")
        raise TypeError(
            f"optimizer must be an optimizer, got the name {optimizer!r}: give it as "
            f"torch.optim.{example}(model.parameters(), lr=...)"
        )
    if _is_optimizer_class(optimizer):
        raise TypeError(
            f"optimizer must be an optimizer, got the class {optimizer.__name__}: make one, "
            f"{optimizer.__name__}(model.parameters(), lr=...)"
        )
    if isinstance(optimizer, LRScheduler):
        raise TypeError(
            f"optimizer must be an optimizer, got the scheduler {type(optimizer).__name__}: give its optimizer, and "
            "call the scheduler's step() yourself, after the epoch or in on_batch_end"
        )
    if isinstance(optimizer, (list, tuple, dict)):
        raise TypeError(
            f"fit steps one optimizer, got a {type(optimizer).__name__} of {len(optimizer)}: give one whose groups "
            "hold the parameters with their options, torch.optim.SGD([{'params': ..., 'lr': ...}, ...])"
        )
    if not isinstance(optimizer, Optimizer) and not all(
        hasattr(optimizer, name) for name in ("param_groups", "zero_grad", "step")
    ):
        raise TypeError(
            f"optimizer must be an optimizer, got a {type(optimizer).__name__}: for example "
            "torch.optim.SGD(model.parameters(), lr=0.01)"
        )


def check_optimizer(optimizer: Any, model: nn.Module) -> None:
    """Raises for what cannot train this model.

    Raises:
        TypeError: no optimizer, or one whose ``step`` asks for what fit does not have.
        ValueError: it holds none of the model's parameters.
    """
    check_is_optimizer(optimizer)
    more = [name for name in _required(optimizer) if name != "closure"]
    if more:
        raise TypeError(
            f"{type(optimizer).__name__}.step() needs {', '.join(more)}, and fit calls step() or, where it must, "
            "step(closure): write the loop yourself, or a subclass whose step() needs nothing"
        )
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if not any(id(p) in held for p in model.parameters()):
        raise ValueError(
            "the optimizer holds none of the model's parameters: it was made for another model, or before the layers "
            "were replaced"
        )


def needs_closure(optimizer: Any) -> bool:
    """Whether ``step`` must be given what evaluates the model again, as LBFGS's."""
    return "closure" in _required(optimizer)


def _required(optimizer: Any) -> list[str]:
    """Arguments of ``step`` without a default."""
    try:
        # Of the class: a scheduler's wrapper on the instance hides that it is bound.
        _, *parameters = inspect.signature(type(optimizer).step).parameters.values()
    except (AttributeError, TypeError, ValueError):
        return []
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [p.name for p in parameters if p.default is p.empty and p.kind not in variadic]


def _is_optimizer_class(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Optimizer)
