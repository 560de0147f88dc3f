"""The user's ``on_batch_end`` beside a compiled engine: what it may read there, and what it has changed."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import nn

from cnnrs.engine.fused_step import FusedStep
from cnnrs.engine.losses import known_loss
from cnnrs.engine.optimizers import Step
from cnnrs.training.batches import Stream
from cnnrs.training.job import Job


class Watch:
    """Calls the user after a batch; an engine whose model, loss or optimizer has become another one is stopped.

    Learning rates and the like are handed on to the engine instead.

    Args:
        job: the epoch.
        stream: where the engine gets its batches.
    """

    def __init__(self, job: Job, stream: Stream) -> None:
        self._job = job
        self._stream = stream
        self._before = self._compiled()

    def __call__(self, batch: int, mean: float, step: Step | FusedStep | None) -> list[tuple[float, ...]] | None:
        """Returns the optimizer's new numbers if the user has changed them."""
        numbers: list[tuple[float, ...]] = []
        held: list[Any] = []
        if step is not None:
            step.publish((batch + 1) // self._job.loop.accumulate)
            numbers, held = step.numbers(), step.held()
        self._job.call_user(batch, mean)
        if self._compiled() != self._before or (step is not None and step.held() != held):
            self._stream.stop()
        now = [] if step is None else step.numbers()
        return now if now != numbers else None

    def _compiled(self) -> list[Any]:
        """What the engine has taken for granted."""
        known: Mapping[str, Any] = known_loss(self._job.loss_fn) or {}
        loss = [(_identity(part), getattr(part, "_version", 0)) for part in known.values()]
        return [loss, *modules_as_they_are(self._job.model)]


def modules_as_they_are(model: nn.Module) -> list[Any]:
    """Equal as long as no layer, parameter or setting has been replaced; weights may have other numbers."""
    return [(id(module), _identity(vars(module))) for module in model.modules()]


_NO_SETTINGS = (nn.Module, type, ModuleType, FunctionType, MethodType)
#: Whose objects are no settings.
_LIBRARIES = frozenset({"builtins", "torch", "collections", "threading", "_thread"})
#: Compared by value.
_PLAIN = frozenset({type(None), bool, int, float, str})
_DICTIONARIES = frozenset({dict, OrderedDict})


def _identity(value: Any, depth: int = 2) -> Any:
    """Equal as long as nothing has been replaced; the numbers in a tensor may change.

    ``depth``: of dictionaries, lists and objects. The attributes of a module are one; parameters, buffers, children and
    hooks lie in more.
    """
    kind = type(value)
    if kind in _PLAIN:
        return value
    if kind in _DICTIONARIES and depth > 0:
        return [_identity(item, depth - 1) for item in value.values()] if value else None
    if kind is tuple:
        return [_identity(item, depth) for item in value]
    if isinstance(value, torch.Tensor):
        return (id(value), value.data_ptr() if value.layout is torch.strided else 0, value.requires_grad)
    if depth > 0 and (kind is list or _holds_settings(kind, value)):
        return [id(value), *(_identity(item, depth - 1) for item in (value if kind is list else vars(value).values()))]
    return id(value)


def _holds_settings(kind: type, value: Any) -> bool:
    """Whether layers may read numbers from its attributes."""
    return not issubclass(kind, _NO_SETTINGS) and kind.__module__ not in _LIBRARIES and hasattr(value, "__dict__")
