"""A module is run on weights that are not its own: who would write into them is stopped, and its products are kept."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from cnnrs._util.generators import Drawing
from cnnrs.engine.twins import WithoutDropout
from cnnrs.model.tracing import values


class Touched(Exception):
    """The module is about to do what only a copy of the weights may see."""


class Guarded(Drawing):  # type: ignore[no-untyped-call]
    """Sees draws as ever, stops whoever is about to write into some memory, and keeps what takes long to compute.

    Args:
        tensors: what lies in that memory.

    Attributes:
        products: of matrices and filters, in order.
        touched: somebody was stopped, whatever became of the exception.
    """

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        super().__init__()
        self.products: deque[_Product] = deque()
        self.touched = False
        self._memory = {_memory(tensor) for tensor in tensors}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for place, name in _overwritten(func):
            value = args[place] if place < len(args) else kwargs.get(name)
            if any(_memory(tensor) in self._memory for tensor in _tensors(value)):
                self.touched = True
                raise Touched
        # Copies of what may be overwritten later.
        given = [self._kept(value) for value in args] if func in _PRODUCTS and not kwargs else None
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if given is not None:
            self.products.append(_Product(func, given, result.clone()))
        return result

    def _kept(self, value: Any) -> Any:
        return value.clone() if isinstance(value, torch.Tensor) and _memory(value) not in self._memory else value


class Again(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Whoever asks for a product of the same numbers, in the same order, gets it without computing it."""

    def __init__(self, products: deque[_Product]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._products = products

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _PRODUCTS and self._products and not kwargs:
            product = self._products.popleft()
            if product.is_of(func, args):
                return product.result
        return func(*args, **(kwargs or {}))


class _Product:
    """A call, and what came out."""

    def __init__(self, func: Any, args: Sequence[Any], result: torch.Tensor) -> None:
        self._func, self._args = func, args
        self.result = result

    def is_of(self, func: Any, args: Sequence[Any]) -> bool:
        """Whether another call computes the same."""
        return func is self._func and len(args) == len(self._args) and all(map(_alike, args, self._args))


def _alike(one: Any, other: Any) -> bool:
    if not isinstance(one, torch.Tensor) or not isinstance(other, torch.Tensor):
        return type(one) is type(other) and bool(one == other)
    if (one.shape, one.stride(), one.dtype) != (other.shape, other.stride(), other.dtype):
        return False
    return one.data_ptr() == other.data_ptr() or torch.equal(one, other)


_PRODUCTS = frozenset({
    torch.ops.aten.convolution.default, torch.ops.aten.addmm.default, torch.ops.aten.mm.default,
    torch.ops.aten.bmm.default,
})  # fmt: skip


@lru_cache(maxsize=1024)
def _overwritten(operation: Any) -> tuple[tuple[int, str], ...]:
    """Places and names of the arguments that an operation of PyTorch's writes into."""
    return tuple(
        (place, argument.name)
        for place, argument in enumerate(operation._schema.arguments)
        # Batch norm does not say what becomes of its statistics.
        if (argument.alias_info is not None and argument.alias_info.is_write) or argument.name.startswith("running_")
    )


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    return (entry for entry in values(value) if isinstance(entry, torch.Tensor))


def _memory(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class Closed(WithoutDropout):
    """Stops whoever asks for memory itself, in which it could write unseen, or for the graph of autograd.

    Attributes:
        touched: somebody was stopped, whatever became of the exception.
    """

    def __init__(self) -> None:
        super().__init__()
        self.touched = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        names = getattr(func, "__name__", ""), getattr(getattr(func, "__self__", None), "__name__", "")
        if not _OPENING.isdisjoint(names):
            self.touched = True
            raise Touched
        return super().__torch_function__(func, types, args, kwargs)


_OPENING = frozenset({
    "numpy", "__array__", "__dlpack__", "data_ptr", "storage", "untyped_storage", "_typed_storage", "apply_", "map_",
    "map2_", "grad_fn", "register_hook", "_backward_hooks",
})  # fmt: skip


def looks(parameters: Sequence[nn.Parameter]) -> list[Any]:
    """What shows of weights that somebody has replaced, or written into past the modes.

    Other threads, C code and operations that do not say what they write into are not seen by a mode.
    """
    return [(p.data_ptr(), p.shape, p.stride(), p.dtype, _sum(p)) for p in parameters]


def _sum(parameter: nn.Parameter) -> Any:
    """Of the bits: other numbers have another one."""
    numbers = parameter.detach().reshape(-1).view(torch.uint8).numpy()
    whole = numbers.size // 8 * 8
    return int(np.add.reduce(numbers[:whole].view(np.int64))), numbers[whole:].tobytes()
