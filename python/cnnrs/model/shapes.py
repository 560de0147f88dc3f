"""What ``forward`` is told of the sizes of a value: numbers that every batch has, else what only ``view`` takes.

Where the graph is for images of one size, the number of samples is all that is open.
"""

from __future__ import annotations

import dis
import sys
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import Any, Protocol

import torch

from cnnrs.model.operations import Unsupported


class Asked(Protocol):
    """Who knows sizes, and what it means that somebody asks for more."""

    def stop(self, reason: str) -> Unsupported:
        """The exception to raise where ``forward`` cannot go on."""

    def size(self, node: int | None, dim: int) -> Size | int:
        """One size of a value."""

    def unpacked(self, node: int | None, count: int) -> None:
        """``forward`` goes on only where a value has so many dimensions."""


class Size(torch.SymInt):
    """``x.size(dim)`` where the batch decides: it can be given to ``view`` and nothing else."""

    def __init__(self, recorder: Asked, node: int | None, dim: int) -> None:
        self.recorder, self.of, self.dim = recorder, node, dim

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return int

    def __repr__(self) -> str:
        return f"size({self.dim})"

    __str__ = __repr__


class Shape:
    """``x.shape``, where samples may have any size: it can be indexed and unpacked, and nothing else."""

    def __init__(self, recorder: Asked, node: int | None) -> None:
        self.recorder, self.of = recorder, node

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return torch.Size

    def __getitem__(self, dim: Any) -> Size | int:
        if type(dim) is not int:
            raise self.recorder.stop(_COMPUTES)
        return self.recorder.size(self.of, dim)

    def __iter__(self) -> Iterator[Size | int]:
        count = _unpacked(sys._getframe(1))
        if count is None:
            raise self.recorder.stop(_COMPUTES)
        self.recorder.unpacked(self.of, count)
        return iter([self[dim] for dim in range(count)])

    def __getattr__(self, name: str) -> Any:
        raise self.recorder.stop(f"forward asks for the {name} of a tensor's shape")

    __repr__ = object.__repr__


class Sizes(tuple[Any, ...]):
    """``x.shape``, or a part of it, where only the number of samples is open.

    What computes with that meets a :class:`Size`, which refuses.
    """

    recorder: Asked

    @classmethod
    def of(cls, recorder: Asked, sizes: Iterable[Size | int]) -> Sizes | torch.Size:
        """Sizes one after the other: plain numbers, where the batch decides on none of them."""
        made = cls(sizes)
        made.recorder = recorder
        return torch.Size(made) if all(type(size) is int for size in made) else made

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return torch.Size

    def __getitem__(self, dim: Any) -> Any:
        found = super().__getitem__(dim)
        return Sizes.of(self.recorder, found) if type(found) is tuple else found

    def __add__(self, other: Any) -> Any:
        return Sizes.of(self.recorder, (*self, *other))

    def __radd__(self, other: Any) -> Any:
        return Sizes.of(self.recorder, (*other, *self))

    def numel(self) -> Any:
        """The product of all."""
        raise self.recorder.stop(_COMPUTES)


_COMPUTES = "forward computes with the shape of a tensor"


def _unpacked(frame: FrameType) -> int | None:
    """How many names ``frame`` wants where it stands at ``a, b, c = x.shape``; only the code tells."""
    for instruction in dis.get_instructions(frame.f_code):
        if instruction.offset == frame.f_lasti:
            return instruction.argval if instruction.opname == "UNPACK_SEQUENCE" else None
    return None


def _refusing(what: str) -> Callable[..., Any]:
    def refuse(self: Any, *_: Any, **__: Any) -> Any:
        raise self.recorder.stop(f"forward computes with the {what} of a tensor")

    return refuse


_BINARY = ("add", "and", "divmod", "floordiv", "lshift", "matmul", "mod", "mul", "or", "pow", "rshift", "sub",
           "truediv", "xor")  # fmt: skip
_COMPARED = ("eq", "ge", "gt", "hash", "le", "lt", "ne")
_UNARY = ("abs", "bool", "ceil", "float", "floor", "index", "int", "invert", "neg", "pos", "round", "trunc")
for _name in (*_BINARY, *(f"r{name}" for name in _BINARY), *_COMPARED, *_UNARY):
    setattr(Size, f"__{_name}__", _refusing("size"))
for _name in (*_COMPARED, "add", "bool", "contains", "len", "mul", "radd", "reversed", "rmul"):
    setattr(Shape, f"__{_name}__", _refusing("shape"))
for _name in (*_COMPARED, "contains", "mul", "rmul"):
    setattr(Sizes, f"__{_name}__", _refusing("shape"))
