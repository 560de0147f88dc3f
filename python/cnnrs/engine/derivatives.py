"""Whether two results have the same derivatives, by what autograd has written down of them: no backward pass is needed.

A node of autograd computes with what it has saved and with nothing else. So two graphs of the same nodes, over the same
leaves, that have saved the same numbers make the same of any gradient.
"""

from __future__ import annotations

import re
from typing import Any

import torch

#: PyTorch's own nodes. Others, those of Python's functions and of copies in place, do not show all that they hold.
_SHOWN = re.compile(r"\w+Backward\d+")
_LEAF = "torch::autograd::AccumulateGrad"
#: All make the gradient a view of other sizes, which they have saved.
_VIEWS = {"ViewBackward0", "ReshapeAliasBackward0", "UnsafeViewBackward0"}


def same_derivatives(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether both depend on the same leaves in the same way, to the last bit; False where that does not show."""
    try:
        return _same_graphs(one, other)
    except RuntimeError:
        # What a derivative needs has been overwritten.
        return False


def _same_graphs(one: torch.Tensor, other: torch.Tensor) -> bool:
    partner: dict[Any, Any] = {}
    seen: set[Any] = set()
    left: list[tuple[tuple[Any, int], tuple[Any, int]]] = [
        ((one.grad_fn, one.output_nr), (other.grad_fn, other.output_nr))
    ]
    saved = _Saved()
    while left:
        (mine, number), (its, its_number) = left.pop()
        if number != its_number or (mine is None) != (its is None):
            return False
        if mine is None:
            continue
        if mine in partner:
            if partner[mine] is not its:
                return False
            continue
        partner[mine] = its
        if its in seen or not _same_nodes(mine, its, saved):
            return False
        seen.add(its)
        left.extend(zip(mine.next_functions, its.next_functions, strict=True))
    return one.requires_grad == other.requires_grad


def _same_nodes(one: Any, other: Any, saved: _Saved) -> bool:
    name, its_name = one.name(), other.name()
    if name == _LEAF:
        return its_name == _LEAF and one.variable is other.variable
    if name != its_name and not {name, its_name} <= _VIEWS:
        return False
    if not _SHOWN.fullmatch(name) or len(one.next_functions) != len(other.next_functions):
        return False
    if [_form(made) for made in one._input_metadata] != [_form(made) for made in other._input_metadata]:
        return False
    fields = {*_fields(one), *_fields(other)}
    return all(saved.same(getattr(one, field), getattr(other, field)) for field in fields)


def _form(made: Any) -> Any:
    return made.shape, made.dtype, made.device


def _fields(node: Any) -> list[str]:
    """What it shows of what it has saved."""
    return [name for name in dir(node) if name.startswith("_saved_")]


class _Saved:
    """Compares what nodes have saved; of two tensors once, since what one node makes the next one reads."""

    def __init__(self) -> None:
        self._known: set[Any] = set()

    def same(self, one: Any, other: Any) -> bool:
        if isinstance(one, (tuple, list)):
            return (
                isinstance(other, (tuple, list))
                and len(one) == len(other)
                and all(self.same(*both) for both in zip(one, other, strict=True))
            )
        if isinstance(one, torch.Tensor):
            return isinstance(other, torch.Tensor) and self._same_tensors(one.detach(), other.detach())
        return bool(one == other)

    def _same_tensors(self, one: torch.Tensor, other: torch.Tensor) -> bool:
        if (one.shape, one.dtype, one.device) != (other.shape, other.dtype, other.device):
            return False
        # The graphs keep both alive: no other tensor comes to lie there meanwhile.
        place = (one.data_ptr(), other.data_ptr(), one.shape, one.stride(), other.stride())
        if place in self._known:
            return True
        if one.data_ptr() == other.data_ptr() and one.stride() == other.stride():
            return True
        if not torch.equal(one, other):
            return False
        self._known.add(place)
        return True
