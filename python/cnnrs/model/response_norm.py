"""ConvNeXt V2's response norm as networks write it: many steps that are one operation of the graph.

``n = x.norm(p=2, dim=(1, 2), keepdim=True)``, ``n / (n.mean(dim=-1, keepdim=True) + eps)``, its product with x, times a
weight and plus a bias per channel, plus x. What lies in between is no value of the graph: here is what it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from cnnrs.model.operations import Unsupported
from cnnrs.model.tracing import Memory, Recorder, Standin, values

Step = Literal["norms", "mean", "mean + eps", "ratio", "product", "scaled", "shifted"]


@dataclass(frozen=True)
class Part:
    """A step on the way.

    Attributes:
        step: which.
        node: whose channels' norms.
        dims: of its pixels.
        channel: the dimension of its channels.
        channels: how many.
        eps: beside the mean.
        weight: factors.
        bias: summands.
    """

    step: Step
    node: int
    dims: tuple[int, int]
    channel: int
    channels: int
    eps: float = 0.0
    weight: torch.Tensor | None = None
    bias: torch.Tensor | None = None


class Responses:
    """The parts of response norms so far.

    Args:
        recorder: makes the stand-ins.
        read: the node of a value, as it is now.
        shape: the sizes of a node's value.
        is_own: whether a tensor is a parameter or buffer of the module.
    """

    def __init__(
        self, recorder: Recorder, read: Callable[[Standin], int],
        shape: Callable[[int], Sequence[int | None] | None], is_own: Callable[[Any], bool],
    ) -> None:  # fmt: skip
        self._recorder, self._read, self._shape, self._is_own = recorder, read, shape, is_own
        #: By stand-in, which is kept so that no other gets its number.
        self._made: dict[int, tuple[Standin, Part]] = {}

    def call(self, name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> Standin | tuple[Standin, Part] | None:
        """What a function makes of parts, or of a value as their first step.

        Returns:
            Another part; a value and the whole norm of it; None where it is about something else.

        Raises:
            Unsupported: a part is used otherwise.
        """
        if name in ("norm", "linalg_norm", "vector_norm", "linalg_vector_norm"):
            return self._new(self._norms(name, *args, **kwargs))
        found = [part for value in values((args, kwargs)) if (part := self._of(value)) is not None]
        if not found:
            return None
        if name == "mean" and args:
            return self._new(self._mean(found[0], *args[1:], **kwargs))
        operands = list(args)
        if not kwargs and len(operands) == 2 and name in ("add", "mul", "div", "true_divide"):
            made = self._sum(found, operands) if name == "add" else self._product(name, found, operands)
            if made is not None:
                return self._new(made) if isinstance(made, Part) else made
        if name == "addcmul" and not kwargs and len(operands) == 3:
            bias, weight = operands[0], [o for o in operands[1:] if self._of(o) is None]
            if len(weight) == 1 and found[0].step == "product" and len(found) == 1:
                scaled = self._scaled(found[0], weight[0])
                return self._new(self._shifted(scaled, bias))
        raise Unsupported(_PART)

    def _norms(self, name: str, x: Any, p: Any = 2, dim: Any = None, keepdim: bool = False, **others: Any) -> Part:
        p = others.pop("ord", p)
        is_root_of_squares = (type(p) in (int, float) and p == 2) or (p == "fro" and name == "norm")
        given = [value for value in others.values() if value is not None]
        if given or not is_root_of_squares or keepdim is not True or not isinstance(x, Standin):
            raise Unsupported("takes another norm than that of each channel's pixels")
        node = self._read(x)
        shape = self._shape(node)
        dims = [] if type(dim) not in (tuple, list) else [d for d in dim if type(d) is int and -4 <= d < 4]
        axes = sorted(d % 4 for d in dims)
        if shape is None or len(shape) != 4 or axes not in ([1, 2], [2, 3]) or len(dims) != len(dim):
            raise Unsupported("takes another norm than that of each channel's pixels")
        if name == "linalg_norm":
            # Of two dimensions it is a norm of matrices.
            raise Unsupported("takes the norm of a matrix")
        channel = 3 if axes == [1, 2] else 1
        channels = shape[channel]
        if channels is None:
            raise Unsupported(_PART)
        return Part("norms", node, (axes[0], axes[1]), channel, channels)

    @staticmethod
    def _mean(part: Part, dim: Any = None, keepdim: bool = False, **others: Any) -> Part:
        dims = dim if type(dim) in (tuple, list) else (dim,)
        along = [d % 4 for d in dims if type(d) is int and -4 <= d < 4]
        if (
            any(value is not None for value in others.values())
            or part.step != "norms"
            or keepdim is not True
            or len(dims) != 1
            or along != [part.channel]
        ):
            raise Unsupported(_PART)
        return replace(part, step="mean")

    def _sum(self, found: list[Part], operands: list[Any]) -> Part | tuple[Standin, Part] | None:
        (part,), others = found[:1], [o for o in operands if self._of(o) is None]
        if len(found) != 1 or len(others) != 1:
            return None
        other = others[0]
        if part.step == "mean" and type(other) is float and other > 0.0:
            return replace(part, step="mean + eps", eps=other)
        if part.step == "scaled" and not isinstance(other, Standin):
            return self._shifted(part, other)
        if part.step == "shifted" and isinstance(other, Standin) and self._read(other) == part.node:
            return other, part
        return None

    def _product(self, name: str, found: list[Part], operands: list[Any]) -> Part | None:
        if name != "mul":
            steps = [part.step for part in found]
            alike = steps == ["norms", "mean + eps"] and replace(found[1], step="norms", eps=0.0) == found[0]
            return replace(found[1], step="ratio") if alike else None
        others = [o for o in operands if self._of(o) is None]
        if len(found) != 1 or len(others) != 1:
            return None
        (part,), (other,) = found, others
        if part.step == "ratio" and isinstance(other, Standin) and self._read(other) == part.node:
            return replace(part, step="product")
        return self._scaled(part, other) if part.step == "product" else None

    def _scaled(self, part: Part, weight: Any) -> Part:
        return replace(part, step="scaled", weight=self._per_channel(part, weight))

    def _shifted(self, part: Part, bias: Any) -> Part:
        return replace(part, step="shifted", bias=self._per_channel(part, bias))

    def _per_channel(self, part: Part, tensor: Any) -> torch.Tensor:
        """A parameter of one number per channel."""
        if not self._is_own(tensor) or tensor.ndim > 4:
            raise Unsupported(_PART)
        shape = [1] * (4 - tensor.ndim) + list(tensor.shape)
        if shape != [part.channels if dim == part.channel else 1 for dim in range(4)]:
            raise Unsupported(_PART)
        own: torch.Tensor = tensor
        return own

    def _new(self, part: Part) -> Standin:
        made = self._recorder.value(None, Memory("norm"))
        self._made[id(made)] = (made, part)
        return made

    def _of(self, value: Any) -> Part | None:
        return self._made.get(id(value), (None, None))[1] if isinstance(value, Standin) else None


_PART = "computes with norms of channels otherwise than ConvNeXt V2's response norm"
