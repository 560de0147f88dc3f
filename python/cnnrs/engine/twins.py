"""Copies of a module to run instead of it, and what its forward might do besides computing."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from cnnrs import _cnnrs
from cnnrs._records import Attributes, OpKind
from cnnrs.model import draws
from cnnrs.model.lowering import Lowered
from cnnrs.model.stochastic_depth import is_stochastic_depth


def copied(model: nn.Module, parameters: Mapping[int, nn.Parameter] | None = None) -> nn.Module:
    """A copy that shares nothing with the module, its weights in the usual order of memory: that is no operation.

    Stochastic depth, which is a function of torchvision's and so not seen by a mode, drops nothing in it.

    Args:
        model: stays as it is.
        parameters: what takes the place of its parameters, by their id; None: copies of them.
    """
    twin = copy.deepcopy(model, dict(parameters or {}))
    for module in filter(is_stochastic_depth, twin.modules()):
        module.p = 0.0  # type: ignore[assignment]
    for tensor in [*twin.parameters(), *twin.buffers()]:
        if not tensor.is_contiguous():
            tensor.data = tensor.data.contiguous()
    return twin


def written(lowered: Lowered) -> frozenset[int]:
    """The tensors, by id, into which its operations write: statistics that move."""
    names = ("running_mean", "running_var", "num_batches_tracked")
    norms = [attributes for _, kind, _, attributes in lowered.operations if kind == "BatchNorm2d"]
    moving = {attributes[name] for attributes in norms for name in names} - {None}
    return frozenset(id(lowered.tensors[index]) for index in moving)


def attributes(model: nn.Module) -> dict[str, Any]:
    """What forward might change besides buffers; of containers, what they hold."""
    found: dict[str, Any] = {}
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        for name, value in vars(module).items():
            if name in ("_buffers", "_modules"):
                continue
            items = value.items() if isinstance(value, dict) else enumerate(value) if _is_list(value) else ()
            found[prefix + name] = (value, None)
            for key, item in items:
                label = str(key) if name == "_parameters" else f"{name}[{key!r}]"
                found[prefix + label] = (item, _trace(item) if isinstance(item, torch.Tensor) else None)
            if isinstance(value, torch.Tensor):
                found[prefix + name] = (value, _trace(value))
    return found


def _trace(tensor: torch.Tensor) -> Any:
    """What changes with a tensor."""
    if not isinstance(tensor, nn.Parameter):
        return tensor._version
    grad, hooks = tensor.grad, bool(tensor._backward_hooks)
    after = bool(getattr(tensor, "_post_accumulate_grad_hooks", None))
    return tensor._version, tensor.requires_grad, id(grad), None if grad is None else grad._version, hooks, after


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple, set))


def changed(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """The names of those of :func:`attributes` that are not what they were."""
    return [name for name in {**before, **after} if not _same(before.get(name), after.get(name))]


def _same(before: Any, after: Any) -> bool:
    return before is not None and after is not None and before[0] is after[0] and before[1] == after[1]


class WithoutDropout(TorchFunctionMode):
    """Whatever drops values at random gives them back as they are."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if "dropout" in getattr(func, "__name__", "") and func.__name__ != "native_dropout":
            p = args[1] if len(args) > 1 else kwargs.get("p", 0.5)
            if 0 <= p <= 1:
                return args[0] if args else kwargs["input"]
        return func(*args, **kwargs)


def draws_itself(lowered: Lowered) -> bool:
    """Whether forward draws in its own code, which nothing keeps from it: its operations draw the same then."""
    return any(draws.is_own(kind, attributes) for _, kind, _, attributes in lowered.operations)


def _quiet(kind: OpKind, attributes: Attributes) -> Attributes:
    drops = kind in ("Dropout", "StochasticDepth") and not draws.is_own(kind, attributes)
    return {**attributes, "p": 0.0} if drops else attributes


def without_dropout(lowered: Lowered) -> Lowered:
    """The same operations, none of which draws but where :func:`draws_itself` says so."""
    operations = [
        (name, kind, inputs, _quiet(kind, attributes)) for name, kind, inputs, attributes in lowered.operations
    ]
    if operations == lowered.operations:
        return lowered
    graph = _cnnrs.Graph(operations, lowered.output, [list(t.shape) for t in lowered.tensors])
    return replace(lowered, graph=graph, operations=operations)
