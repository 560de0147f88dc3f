"""The module's own parameters and buffers, and what ``forward`` makes of them: other shapes of the same memory."""

from __future__ import annotations

from functools import lru_cache
from weakref import WeakValueDictionary

import torch
from torch import nn

from cnnrs._util import plain
from cnnrs.model.operations import Unsupported

#: Where it lies, its shape and type.
_Memory = tuple[int, torch.Size, torch.dtype, torch.device]
#: Of each shape one tensor, so that two graphs of a module are seen to read the same.
_SHAPED: WeakValueDictionary[_Memory, torch.Tensor] = WeakValueDictionary()


class Owned:
    """The tensors of a module by their memory.

    Args:
        model: whose they are.
        reshaped: whether other shapes of theirs are looked for; for a graph without gradients, which tensors of their
            own would not get.

    Attributes:
        reshaped: those that a graph reads in another shape: what replaces their memory is not seen in that.
        is_float32: whether all of them are, on the CPU; of those that are floating-point numbers.
    """

    def __init__(self, model: nn.Module, reshaped: bool) -> None:
        own = [*model.named_parameters(), *model.named_buffers()]
        self.reshaped: list[torch.Tensor] = []
        self._named = {id(tensor): (name, tensor) for name, tensor in own}
        floats = [tensor for _, tensor in own if tensor.is_floating_point()]
        self.is_float32 = all(tensor.dtype is torch.float32 and tensor.device.type == "cpu" for tensor in floats)
        self._lie = {_memory(tensor): (name, tensor) for name, tensor in own if reshaped and _is_plain(tensor)}

    def name(self, tensor: torch.Tensor) -> str | None:
        """Of a tensor that is one of them, or has all the numbers of one in their order."""
        name, _ = self._named.get(id(tensor), (None, None))
        return name if name is not None or not _is_plain(tensor) else self._lie.get(_memory(tensor), (None, None))[0]

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """``tensor``, or what stands for all tensors of its shape over the same memory."""
        if id(tensor) in self._named or not _is_plain(tensor) or _memory(tensor) not in self._lie:
            return tensor
        _, own = self._lie[_memory(tensor)]
        self.reshaped.append(own)
        return shaped(own, tensor.shape)

    def flat(self, tensor: torch.Tensor) -> torch.Tensor:
        """One of them, in one dimension.

        Raises:
            Unsupported: its numbers do not lie side by side.
        """
        if not tensor.is_contiguous():
            raise Unsupported("has weights that are not contiguous")
        return tensor if tensor.ndim == 1 else self.of(tensor.detach().view(-1))


def shaped(tensor: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """The numbers of a contiguous tensor in another shape, the same object as long as somebody has it."""
    key = tensor.data_ptr(), shape, tensor.dtype, tensor.device
    found = _SHAPED.get(key)
    if found is None or found.data_ptr() != tensor.data_ptr():
        # Of nobody yet, or of somebody whose memory has moved since.
        found = _SHAPED[key] = tensor.detach().view(shape)
    return found


@lru_cache(maxsize=256)
def number(value: float) -> torch.Tensor:
    """(1,) float32: a number of Python's beside a tensor."""
    return torch.full((1,), value, dtype=torch.float32, device="cpu")


def _memory(tensor: torch.Tensor) -> tuple[int, int, torch.dtype, torch.device]:
    return tensor.data_ptr(), tensor.numel(), tensor.dtype, tensor.device


def _is_plain(tensor: torch.Tensor) -> bool:
    return plain.is_plain(tensor) and tensor.is_contiguous() and tensor.numel() > 0 and not tensor.is_meta
