"""Multi-head attention as networks write it: many steps that are one operation of the graph.

``qkv.reshape(n, t, 3, heads, -1).permute(2, 0, 3, 1, 4).unbind(0)``, ``scaled_dot_product_attention`` or its two
products and the softmax in between, ``transpose(1, 2).reshape(n, t, c)``. What lies in between is no value of the
graph: here is what each step has made of the channels of a value (N, T, C). Queries and keys may be turned in between
(:mod:`~cnnrs.model.rotation`), and there may be fewer queries than keys.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from cnnrs.model import rotation
from cnnrs.model.heads import Axes, Heads, Rotation
from cnnrs.model.operations import Unsupported
from cnnrs.model.rotation import Mixed


@dataclass(frozen=True)
class Attention:
    """The operation: the nodes that it reads, and its arguments."""

    nodes: list[int]
    heads: int
    scale: float
    rotation: Rotation | None
    result: Heads


#: A value: the node that it is taken from, and what has become of it.
Value = tuple[int, Heads]
#: The same, where its channels may have been taken apart.
Taken = tuple[int, Heads | Mixed]
#: Of scores, and of weights.
_SCORES: Axes = ("n", "h", "t", "k")


def divided(shape: Sequence[int | None], dims: Sequence[Any]) -> Heads | None:
    """What a view of these sizes makes of tokens (N, T, C); None where it is something else.

    Args:
        shape: of the tokens, None where the batch decides.
        dims: of the view; the first one is the batch's.
    """
    if len(shape) != 3 or len(dims) not in (4, 5) or dims.count(-1) > 1 or shape[1] is None or shape[2] is None:
        return None
    _, tokens, *rest = dims
    sizes = [size for size in rest if type(size) is int and size != -1]
    if tokens != shape[1] or len(sizes) + rest.count(-1) != len(rest) or not all(size > 0 for size in sizes):
        return None
    each = shape[2] // math.prod(sizes)
    rest = [each if size == -1 else size for size in rest]
    if math.prod(rest) != shape[2]:
        return None
    parts, heads, depth = rest if len(rest) == 3 else (1, *rest)
    axes = ("n", "t", "p", "h", "d") if len(rest) == 3 else ("n", "t", "h", "d")
    return Heads(axes, shape[1], parts, heads, depth)


def step(target: Any, name: str, args: list[Any], kwargs: dict[str, Any], of: Callable[[Any], Taken | None]) -> Any:
    """What a call makes of heads.

    Args:
        target: the function, or the name of the method.
        name: of the function.
        args: of the call.
        kwargs: of the call.
        of: what an argument is, None where it is no heads.

    Returns:
        A value, a tuple of them, an :class:`Attention`, or the number of a node whose value it is again.

    Raises:
        Unsupported: the call has no counterpart.
    """
    first = of(args[0]) if args else None
    if first is not None and name in _CONVERSIONS:
        return _converted(first, of, *args[1:], **kwargs)
    if first is not None and name == "contiguous":
        return first
    try:
        is_scores = first is not None and isinstance(first[1], Heads) and first[1].of is not None
        if not is_scores and rotation.takes(name, first is not None and isinstance(first[1], Mixed), args, kwargs):
            return rotation.step(name, lambda argument: _mixed(of(argument)), args, kwargs)
        if target is F.scaled_dot_product_attention:
            return _fused(lambda argument: _settled(of(argument)), *args, **kwargs)
        make = _STEPS.get(name)
        if first is None or make is None:
            raise Unsupported(_NONE)
        return make(_settled(first), lambda argument: _settled(of(argument)), *args[1:], **kwargs)
    except TypeError as error:
        raise Unsupported(f"its arguments have no counterpart: {error}") from error


def _mixed(value: Taken | None) -> Mixed | None:
    if value is None:
        return None
    node, heads = value
    return heads if isinstance(heads, Mixed) else rotation.begun(node, heads)


def _settled(value: Taken | None) -> Value | None:
    if value is None:
        return None
    node, heads = value
    return node, rotation.settled(heads) if isinstance(heads, Mixed) else heads


def _converted(value: Taken, of: Callable[[Any], Taken | None], *args: Any, **kwargs: Any) -> Taken:
    """To the type that it has: values are float32 wherever engine ``cpu`` computes them."""
    given = [*args, *kwargs.values()]
    if any(argument not in (torch.float32, torch.device("cpu")) and of(argument) is None for argument in given):
        raise Unsupported("makes another type of the heads of an attention")
    return value


_NONE = "is applied to the heads of an attention, which has no counterpart yet"
_CONVERSIONS = ("to", "type", "type_as", "float")


def _fused(
    of: Callable[[Any], Value | None], query: Any, key: Any, value: Any, attn_mask: Any = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Attention:  # fmt: skip
    if attn_mask is not None or dropout_p or is_causal or enable_gqa:
        raise Unsupported("has a mask, dropout or groups of heads")
    q, k, v = of(query), of(key), of(value)
    if q is None or k is None or v is None:
        raise Unsupported("reads something else than heads of tokens")
    return _attention(q, k, v, 1.0 / math.sqrt(q[1].depth) if scale is None else scale)


def _attention(q: Value, k: Value, v: Value, scale: float) -> Attention:
    if any(one.axes != ("n", "h", "t", "d") or one.of is not None for _, one in (q, k, v)) or v[1].factor != 1.0:
        raise Unsupported("reads heads in another order than (N, heads, T, channels)")
    sizes = {(one.heads, one.depth) for _, one in (q, k, v)}
    if len(sizes) > 1 or k[1].tokens != v[1].tokens:
        raise Unsupported("reads queries, keys and values of different sizes")
    nodes = [node for node, _ in (q, k, v)]
    parts = [(one.parts, one.part if one.parts > 1 else None) for _, one in (q, k, v)]
    if parts == [(3, 0), (3, 1), (3, 2)] and len(set(nodes)) == 1:
        nodes = nodes[:1]
    elif parts == [(1, None), (2, 0), (2, 1)] and nodes[1] == nodes[2]:
        nodes = nodes[:2]
    elif parts != [(1, None)] * 3:
        raise Unsupported("reads queries, keys and values in another order")
    turn = q[1].rotation
    if v[1].rotation is not None:
        raise Unsupported("turns values, too")
    if (turn is not None or k[1].rotation is not None) and (turn is None or not turn.is_same(k[1].rotation)):
        raise Unsupported("turns queries otherwise than keys")
    scale *= q[1].factor * k[1].factor
    result = replace(q[1], parts=1, part=None, factor=1.0, rotation=None)
    return Attention(nodes, q[1].heads, scale, turn, result)


def _ordered(found: Value, order: Sequence[int]) -> Value:
    node, heads = found
    rank = len(heads.axes)
    if sorted(d % rank for d in order) != list(range(rank)) or not all(-rank <= d < rank for d in order):
        raise Unsupported(f"{tuple(order)} is no order of {rank} dimensions")
    return node, replace(heads, axes=tuple(heads.axes[d] for d in order))


def _permute(found: Value, _: Any, *dims: Any) -> Value:
    return _ordered(found, list(dims[0] if len(dims) == 1 and not isinstance(dims[0], int) else dims))


def _transpose(found: Value, _: Any, dim0: int, dim1: int) -> Value:
    rank = len(found[1].axes)
    order = list(range(rank))
    if not all(-rank <= dim < rank for dim in (dim0, dim1)):
        raise Unsupported("swaps dimensions that there are not")
    order[dim0], order[dim1] = order[dim1], order[dim0]
    return _ordered(found, order)


def _unbind(found: Value, _: Any, dim: int = 0) -> tuple[Value, ...]:
    node, heads = found
    if not -len(heads.axes) <= dim < len(heads.axes) or heads.axes[dim] != "p":
        raise Unsupported(_NONE)
    axes = tuple(axis for axis in heads.axes if axis != "p")
    return tuple((node, replace(heads, axes=axes, part=part)) for part in range(heads.parts))


def _item(found: Value, of: Any, index: Any) -> Value:
    if type(index) is not int:
        raise Unsupported(_NONE)
    parts = _unbind(found, of)
    if not -len(parts) <= index < len(parts):
        raise Unsupported(f"there is no part {index}")
    return parts[index]


def _scaled(found: Value, _: Any, by: Any) -> Value:
    node, heads = found
    if type(by) not in (int, float) or heads.weights:
        raise Unsupported(_NONE)
    return node, replace(heads, factor=heads.factor * by)


def _divided_by(found: Value, of: Any, by: Any) -> Value:
    if type(by) not in (int, float) or by == 0:
        raise Unsupported(_NONE)
    return _scaled(found, of, 1.0 / by)


def _product(found: Value, of: Callable[[Any], Value | None], other: Any) -> Value | Attention:
    second = of(other)
    if second is None:
        raise Unsupported(_NONE)
    node, heads = found
    if heads.of is not None:
        if not heads.weights or heads.axes != _SCORES:
            raise Unsupported("multiplies scores without softmax, or in another order than (N, heads, T, T)")
        return _attention(*heads.of, second, heads.factor)
    if second[1].axes != ("n", "h", "d", "t") or second[1].of is not None:
        raise Unsupported("multiplies heads in another order than (N, heads, channels, T)")
    keys = _transpose(second, of, -1, -2)
    return node, replace(heads, axes=_SCORES, factor=1.0, of=((node, heads), keys), rotation=None)


def _softmax(found: Value, _: Any, dim: int, dtype: Any = None, _stacklevel: int = 3) -> Value:
    node, heads = found
    if heads.of is None or heads.axes != _SCORES or heads.weights or dtype is not None or dim not in (-1, 3):
        raise Unsupported(_NONE)
    return node, replace(heads, weights=True)


def _merged(found: Value, sizes: Sequence[Any]) -> int:
    node, heads = found
    if heads.axes != ("n", "t", "h", "d") or heads.parts != 1 or heads.factor != 1.0 or heads.of is not None:
        raise Unsupported("puts heads together in another order")
    if heads.rotation is not None:
        raise Unsupported("puts heads together that have been turned")
    channels = heads.heads * heads.depth
    known = len(sizes) == 3 and sizes[1] in (heads.tokens, -1) and sizes[2] in (channels, -1)
    if not known or list(sizes).count(-1) > 1 or (type(sizes[0]) is int and sizes[0] != -1):
        raise Unsupported("puts heads together to another shape")
    return node


def _reshape(found: Value, _: Any, *sizes: Any, shape: Any = None) -> int:
    if shape is not None:
        sizes = tuple(shape)
    return _merged(found, sizes[0] if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)) else sizes)


def _flatten(found: Value, _: Any, start_dim: int = 0, end_dim: int = -1) -> int:
    if start_dim not in (2, -2) or end_dim not in (-1, 3):
        raise Unsupported(_NONE)
    return _merged(found, (-1, found[1].tokens, found[1].heads * found[1].depth))


_STEPS: dict[str, Callable[..., Any]] = {
    "permute": _permute, "transpose": _transpose, "swapaxes": _transpose, "unbind": _unbind, "__getitem__": _item,
    "mul": _scaled, "div": _divided_by, "true_divide": _divided_by, "__truediv__": _divided_by, "matmul": _product,
    "softmax": _softmax, "reshape": _reshape, "view": _reshape, "flatten": _flatten,
}  # fmt: skip

# -- nn.MultiheadAttention -----------------------------------------------------------------------------------


def check_layer(module: nn.MultiheadAttention, given: dict[str, Any]) -> None:
    """Whether a call of the layer is that of tokens to themselves, all to all.

    Raises:
        Unsupported: it is not.
    """
    if given["key"] is not given["query"] or given["value"] is not given["query"]:
        raise Unsupported("is called with keys and values that are not the queries")
    if given["key_padding_mask"] is not None or given["attn_mask"] is not None or given["is_causal"]:
        raise Unsupported("is called with a mask")
    if not module.batch_first:
        raise Unsupported("has the batch as its second dimension: batch_first=False")
    if not module._qkv_same_embed_dim or module.bias_k is not None or module.add_zero_attn:
        raise Unsupported("has keys or values of its own")
    if module.training and module.dropout > 0.0:
        raise Unsupported("drops values in training mode; call eval()")
