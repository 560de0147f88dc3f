"""Sequences of tokens (N, T, C): which of them are taken, what is put in front of them, and how they attend."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from cnnrs.model import attention
from cnnrs.model.heads import Heads, Rotation
from cnnrs.model.operations import Unsupported, _linear
from cnnrs.model.rotation import Mixed
from cnnrs.model.shapes import Size
from cnnrs.model.tracing import MULTIHEAD, Memory, Standin, values
from cnnrs.model.values import Values


def taken(shape: Sequence[int | None] | None, index: Any) -> tuple[list[int], int, bool]:
    """What ``x[:, i]`` and ``x[:, i:j]`` take of tokens (N, T, C), and ``x[:, i:j]`` of channels (N, C, H, W).

    Args:
        shape: of the value; None for what the batch decides, or where nothing is known.
        index: in brackets.

    Returns:
        The sizes of the parts before, of what is taken, and behind, without empty ones; the number of the part that is
        taken; whether it is one token without a dimension of its own.

    Raises:
        Unsupported: it is something else.
    """
    all_of = slice(None)
    if not isinstance(index, tuple) or shape is None or len(shape) not in (3, 4) or shape[1] is None:
        raise Unsupported(_OTHERS)
    count = shape[1]
    whole: tuple[Any, ...] = (*index, all_of)
    batch, tokens, *rest = whole
    if batch != all_of or len(rest) >= len(shape) or any(part is not Ellipsis and part != all_of for part in rest):
        raise Unsupported(_OTHERS)
    one = type(tokens) is int and -count <= tokens < count and len(shape) == 3
    if one:
        start, end = tokens % count, tokens % count + 1
    elif isinstance(tokens, slice) and all(part is None or type(part) is int for part in _parts(tokens)):
        start, end, each = tokens.indices(count)
        if each != 1 or end <= start:
            raise Unsupported(_OTHERS)
    else:
        raise Unsupported(_OTHERS)
    sizes = [size for size in (start, end - start, count - end) if size > 0]
    return sizes, int(start > 0), one


_OTHERS = "takes something else than some tokens or channels of every sample"


def _parts(tokens: slice) -> tuple[Any, Any, Any]:
    return tokens.start, tokens.stop, tokens.step


def is_sequence(tensor: torch.Tensor, sizes: Sequence[Any]) -> bool:
    """Whether ``tensor.expand(sizes)`` repeats one sequence of tokens (1, T, C), as it is, per sample."""
    if tensor.ndim != 3 or len(sizes) != 3 or tensor.shape[0] != 1:
        return False
    kept = zip(sizes[1:], tensor.shape[1:], strict=True)
    return all(type(size) is int and size in (-1, own) for size, own in kept)


class Tokens(Values):
    """What steps on tokens make of the values of a graph for images of one size."""

    def _expanded(self, args: tuple[Any, ...]) -> Standin:
        """A parameter (1, T, C), once per sample."""
        tensor, *given = args
        sizes = given[0] if len(given) == 1 and isinstance(given[0], (tuple, list)) else given
        if not self._is_constant(tensor) or not is_sequence(tensor, sizes):
            raise Unsupported("repeats something else than a parameter or buffer (1, T, C) per sample")
        batch = sizes[0]
        self.shape(len(self.nodes) - 1)  # It tells what the batch's sizes are.
        if not isinstance(batch, Size) or batch.of is None or not self._is_batch((batch.of, batch.dim)):
            raise Unsupported("repeats a parameter otherwise than per sample")
        x = self._recorder.value(batch.of, Memory("Expand"))
        name = self._own_name(tensor) or self._unique("expand")
        return self._apply(name, "Expand", [x], {"tensor": self._tensor_index(tensor)})

    def _shift(self, name: str, operands: list[Any], first: bool) -> Standin:
        x, summand = reversed(operands) if first else operands
        if not isinstance(x, Standin):
            raise Unsupported("only a tensor of the graph can be added to a parameter")
        unique = self._own_name(summand) or self._unique(name)
        return self._apply(unique, "Shift", [x], {"summand": self._tensor_index(summand)})

    def _of_constant(self, name: str, x: Standin, layer: nn.Linear) -> Standin | None:
        """A linear layer of what is the same for every sample: so is its result. None for other values."""
        _, kind, sources, attributes = self.nodes[self._read(x)]
        if kind != "Expand" or self.image is None:
            return None
        made = nn.functional.linear(self.tensors[attributes["tensor"]], layer.weight, layer.bias)
        self._recorder.made(made, (layer.weight, layer.bias, self.tensors[attributes["tensor"]]))
        if not self._is_constant(made):
            return None
        batch = self._recorder.value(sources[0], Memory("Expand"))
        return self._apply(name, "Expand", [batch], {"tensor": self._tensor_index(made)})

    def _item(self, x: Standin, index: Any) -> Standin:
        """``x[:, i]`` and ``x[:, i:j]`` of tokens, ``x[:, i:j]`` of channels."""
        sizes, part, one = taken(self.shape(self._read(x)), index)
        if len(sizes) == 1 and not one:
            return self._again(x)
        some = self._apply(self._unique("tokens"), "Split", [x], {"dim": 1, "sizes": sizes, "part": part})
        return self._apply(self._unique("token"), "Flatten", [some], {"start": 1, "end": -1}) if one else some

    def _divided(self, x: Standin, dims: list[Any]) -> Heads | None:
        shape = self.shape(self._read(x))
        return None if shape is None or not dims or not self._is_batch(dims[0]) else attention.divided(shape, dims)

    def _heads(self, x: Standin, value: attention.Taken) -> Standin:
        """A value that is on its way to an attention, or from one."""
        made = self._recorder.value(value[0], x.memory)
        made.version, made.heads = x.version, value[1]
        return made

    def _of_heads(self, target: Any, name: str, args: list[Any], kwargs: dict[str, Any]) -> Any:
        given = [value for value in values((args, kwargs)) if isinstance(value, Standin) and value.heads is not None]
        for x in given:
            self._check_version(x)
        for value in values((args, kwargs)):
            plain = isinstance(value, torch.Tensor) and not isinstance(value, Standin)
            if plain and not self._recorder.has_made(value):
                self._recorder.sources.setdefault(id(value), value)
        if name in ("reshape", "view"):
            dims = self._view_dims(args[1:], kwargs)
            self.shape(len(self.nodes) - 1)  # It tells what the batch's sizes are.
            if not dims or not self._is_batch(dims[0]):
                raise Unsupported("puts heads together to another shape")
            args, kwargs = [args[0], [-1 if dims.count(-1) == 0 else dims[0], *dims[1:]]], {}

        def of(argument: Any) -> attention.Taken | None:
            if not isinstance(argument, Standin) or argument.heads is None or argument.node is None:
                return None
            return argument.node, argument.heads

        made = attention.step(target, name, args, kwargs, of)
        if isinstance(made, attention.Attention):
            read = [self._recorder.value(node, Memory("")) for node in made.nodes]
            arguments = {"heads": made.heads, "scale": made.scale, "rotation": self._rotation(made.rotation)}
            x = self._apply(self._unique("attention"), "Attention", read, arguments)
            return self._heads(x, (self._read(x), made.result))
        if type(made) is int:
            x = self._recorder.value(made, given[0].memory)
            x.version = given[0].version
            return x
        if isinstance(made, Mixed):
            return self._heads(given[0], (made.node, made))
        if len(made) == 2 and type(made[0]) is int:
            return self._heads(given[0], made)
        return tuple(self._heads(given[0], (one.node, one) if isinstance(one, Mixed) else one) for one in made)

    def _rotation(self, turn: Rotation | None) -> tuple[int | None, int, bool] | None:
        if turn is None:
            return None
        self._recorder.made(turn.table)
        return self._tensor_index(turn.table), turn.first, turn.half

    def _multihead(
        self, name: str, module: nn.MultiheadAttention, args: tuple[Any, ...]
    ) -> tuple[Standin, Standin | None]:
        given = dict(zip(MULTIHEAD, args, strict=True))
        attention.check_layer(module, given)
        weights = None
        if given["need_weights"]:
            weights = self._recorder.value(None, Memory(""))
            weights.reason = "reads the weights of an attention, which the graph does not keep"
        x = self._tensor(args[0])
        if len(self.shape(self._read(x)) or ()) != 3:
            raise Unsupported("is called with something else than tokens (N, T, C)")
        projection = _linear(self._tensor_index, module.in_proj_weight, module.in_proj_bias)
        x = self._apply(f"{name}.in_proj", "Linear", [x], projection)
        # Of the channels that there are: the layer does not read its `head_dim` either.
        scale = 1.0 / math.sqrt(module.embed_dim // module.num_heads)
        x = self._apply(name, "Attention", [x], {"heads": module.num_heads, "scale": scale, "rotation": None})
        out = module.out_proj
        x = self._apply(f"{name}.out_proj", "Linear", [x], _linear(self._tensor_index, out.weight, out.bias))
        return x, weights

    def _encoder(self, name: str, module: nn.Module, args: tuple[Any, ...]) -> Standin:
        """Torch's ``TransformerEncoderLayer``, and several of them."""
        if any(argument is not None for argument in args[1:]):
            raise Unsupported("is called with a mask")
        x = self._tensor(args[0])
        if type(module) is nn.TransformerEncoder:
            for number, layer in enumerate(module.layers):
                if type(layer) is not nn.TransformerEncoderLayer:
                    raise Unsupported("has layers of another class")
                x = self._encoder(f"{name}.layers.{number}", layer, (x,))
            return x if module.norm is None else self._part(f"{name}.norm", module.norm, x)
        if not isinstance(module, nn.TransformerEncoderLayer) or type(module.self_attn) is not nn.MultiheadAttention:
            raise Unsupported("has an attention of another class")
        for part, own in ((self._attended, module.norm1), (self._fed_forward, module.norm2)):
            norm = name + (".norm1" if own is module.norm1 else ".norm2")
            y = part(name, module, self._part(norm, own, x) if module.norm_first else x)
            x = self._apply(self._unique("add"), "Add", [x, y], {"inplace": False})
            x = x if module.norm_first else self._part(norm, own, x)
        return x

    def _attended(self, name: str, module: nn.TransformerEncoderLayer, x: Standin) -> Standin:
        y, _ = self._multihead(f"{name}.self_attn", module.self_attn, (x, x, x, None, False, None, True, False))
        return self._part(f"{name}.dropout1", module.dropout1, y)

    def _fed_forward(self, name: str, module: nn.TransformerEncoderLayer, x: Standin) -> Standin:
        y, activation = self._part(f"{name}.linear1", module.linear1, x), module.activation
        if isinstance(activation, nn.Module):
            y = self._part(f"{name}.activation", activation, y)
        else:
            y = self._call(activation, getattr(activation, "__name__", ""), [y], {})
        y = self._part(f"{name}.dropout", module.dropout, y)
        return self._part(f"{name}.dropout2", module.dropout2, self._part(f"{name}.linear2", module.linear2, y))

    def _part(self, name: str, module: nn.Module, x: Standin) -> Standin:
        made: Standin = self._layer(name, module, (x,))
        return made

    def _layer(self, name: str, module: nn.Module, args: tuple[Any, ...]) -> Any:
        raise NotImplementedError

    def _call(self, target: Any, name: str, args: list[Any], kwargs: dict[str, Any]) -> Any:
        raise NotImplementedError
