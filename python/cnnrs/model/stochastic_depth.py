"""Stochastic depth: torchvision's layer, and what networks write themselves, ``x / keep * floor(keep + rand)``.

The second is found while ``forward`` is traced, call by call. Each draw must be all that happens between ``rand`` and
the product, and be used once: a network that does anything else with it is not taken apart.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from cnnrs._records import Node
from cnnrs.model.operations import Unsupported
from cnnrs.model.shapes import Size
from cnnrs.model.tracing import Memory, Recorder, Standin, values


def is_stochastic_depth(module: nn.Module) -> bool:
    """Whether it is torchvision's layer, which is no torch layer."""
    return type(module).__module__.startswith("torchvision.ops") and type(module).__name__ == "StochasticDepth"


_CPU = torch.device("cpu")


@dataclass
class _Draw:
    """One uniform number per sample, or what has been made of it.

    Attributes:
        samples: the node as many as whose samples they are; another one may have others, the mean of a batch one.
        at: how many operations there were.
        keep: what has been added to it; None: nothing yet.
        is_mask: it has been rounded down to 0 or 1.
        is_used: a value has been multiplied by it.
    """

    samples: int
    at: int
    keep: float | None = None
    is_mask: bool = False
    is_used: bool = False


@dataclass
class _Quotient:
    """A value divided by the probability with which it is kept."""

    of: Standin
    at: int
    keep: float


class Draws:
    """What ``forward`` has drawn for stochastic depth.

    Args:
        recorder: makes the stand-ins.
        nodes: the operations so far.
    """

    def __init__(self, recorder: Recorder, nodes: list[Node]) -> None:
        self._recorder = recorder
        self._nodes = nodes
        self._draws: list[_Draw] = []
        #: By stand-in, which is kept so that no other gets its number.
        self._made: dict[int, tuple[Standin, _Draw | _Quotient]] = {}

    def drawn(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Standin | None:
        """``torch.rand`` of shape (N, 1, 1, 1) in float32; None for anything else."""
        shape = args[0] if len(args) == 1 and isinstance(args[0], (list, tuple)) else args
        # A generator of its own, or a tensor to write into, is something else.
        if target is not torch.rand or kwargs != {"dtype": torch.float32, "device": _CPU} or len(shape) != 4:
            return None
        samples, *ones = shape
        if not isinstance(samples, Size) or samples.of is None or samples.dim != 0:
            return None
        if any(type(size) is not int or size != 1 for size in ones):
            return None
        self._draws.append(_Draw(samples.of, len(self._nodes)))
        return self._new(self._draws[-1])

    def call(self, name: str, args: list[Any], kwargs: dict[str, Any]) -> Standin | tuple[Standin, float] | None:
        """What a function makes of a draw or for one: another stand-in, or (value, keep) of a whole stochastic depth.

        Returns:
            None where that is no part of stochastic depth.

        Raises:
            Unsupported: a draw is used for anything else.
        """
        found = self._part(name, args) if args and isinstance(args[0], Standin) and not kwargs else None
        if found is None:
            self.refuse((args, kwargs))
        return found

    def _part(self, name: str, args: list[Any]) -> Standin | tuple[Standin, float] | None:
        first, other = self._of(args[0]), args[1] if len(args) == 2 else None
        if name in ("add", "add_") and isinstance(first, _Draw) and type(other) is float and first.keep is None:
            if 0.0 < other <= 1.0:
                return self._changed(args[0], first, name, _Draw(first.samples, first.at, other))
        elif name in ("floor", "floor_") and isinstance(first, _Draw) and len(args) == 1:
            if first.keep is not None and not first.is_mask:
                return self._changed(args[0], first, name, _Draw(first.samples, first.at, first.keep, True))
        elif name == "div" and first is None and args[0].node is not None and type(other) is float and other > 0.0:
            return self._new(_Quotient(args[0], len(self._nodes), other))
        elif name == "mul" and isinstance(other, Standin):
            # The product is the same in either order.
            second = self._of(other)
            draw, quotient = (first, second) if isinstance(first, _Draw) else (second, first)
            if isinstance(draw, _Draw) and isinstance(quotient, _Quotient) and self._is_whole(draw, quotient):
                draw.is_used = True
                return quotient.of, quotient.keep
        return None

    def check(self) -> None:
        """Every draw has been used: others would be left out.

        Raises:
            Unsupported: one has not.
        """
        if not all(draw.is_used for draw in self._draws):
            raise Unsupported("it draws random numbers of the batch's size itself, otherwise than stochastic depth")

    def refuse(self, tree: Any) -> None:
        """Where anything else is computed with a draw.

        Raises:
            Unsupported: that is so.
        """
        for value in values(tree):
            of = self._of(value) if isinstance(value, Standin) else None
            if isinstance(of, _Draw):
                raise Unsupported("computes with random numbers of the batch's size, otherwise than stochastic depth")
            if isinstance(of, _Quotient):
                raise Unsupported("divides by a number, which has no counterpart yet")

    def _is_whole(self, draw: _Draw, quotient: _Quotient) -> bool:
        # Nothing else draws, or overwrites the value, in between.
        alone = draw.at == quotient.at == len(self._nodes) and self._draws[-1] is draw
        fits = draw.samples == quotient.of.node and draw.keep == quotient.keep
        return alone and fits and draw.is_mask and not draw.is_used

    def _changed(self, given: Standin, before: _Draw, name: str, after: _Draw) -> Standin | None:
        if before is not self._draws[-1]:
            return None
        # What it was cannot be used any more: each draw is used once.
        self._draws[-1] = after
        if not name.endswith("_"):
            return self._new(after)
        self._made[id(given)] = (given, after)
        return given

    def _new(self, of: _Draw | _Quotient) -> Standin:
        made = self._recorder.value(None, Memory("rand"))
        self._made[id(made)] = (made, of)
        return made

    def _of(self, value: Standin) -> _Draw | _Quotient | None:
        return self._made.get(id(value), (None, None))[1]
