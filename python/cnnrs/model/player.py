"""The reference of the lowered graph: each operation in PyTorch's own functions, in order, beside any torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from cnnrs._records import Attributes, Node, OpKind
from cnnrs.model.lowering import Lowered
from cnnrs.model.window_tables import apart, distances

#: Called with the number of a node and its value, as soon as that is there.
Visit = Callable[[int, torch.Tensor], object]


@dataclass(frozen=True)
class Group:
    """Operations that are computed together.

    Attributes:
        nodes: their numbers; only the value of the last one is there afterwards.
        sources: the nodes whose values they read, of other groups what these have read instead of it.
        run: gets these values and all tensors, and returns the value of the last node.
    """

    nodes: tuple[int, ...]
    sources: tuple[int, ...]
    run: Callable[[list[torch.Tensor], list[torch.Tensor]], torch.Tensor]


def play(
    lowered: Lowered, tensors: list[torch.Tensor], inputs: torch.Tensor, visit: Visit | None = None, start: int = 0,
    groups: Mapping[int, Group] | None = None,
) -> torch.Tensor:  # fmt: skip
    """The output of a lowered model for one batch, with autograd behind it where Python has it on.

    Batch norm in training mode updates its statistics in ``tensors``, and in-place operations their operands, as the
    layers do. A value lives until its last reader, as a local of ``forward`` would.

    Args:
        lowered: the model.
        tensors: what takes the place of ``lowered.tensors``.
        inputs: (N, ...).
        visit: sees every value before a later operation may overwrite it.
        start: the node whose value ``inputs`` are; nothing behind it may read what is in front of it.
        groups: what is computed otherwise, by the last node of each.
    """
    values: dict[int, torch.Tensor] = {}
    groups = groups or {}
    computed_at = {node: end for end, group in groups.items() for node in group.nodes}
    done = _last_read(lowered, computed_at, groups)
    # Parts of a value that are still to be handed out, by what divides it and how.
    parts: dict[tuple[int, str], Sequence[torch.Tensor]] = {}
    for number, (_, kind, sources, attributes) in enumerate(lowered.operations):
        if number < start or computed_at.get(number, number) > number:
            continue
        if number == start:
            value = inputs
        elif number in groups:
            group = groups[number]
            value = group.run([values[source] for source in group.sources], tensors)
        elif kind == "View":
            value = values[sources[0]].reshape(_sizes(attributes["dims"], values, inputs))
        elif kind == "Split":
            # One division for all parts, as in `forward`: it has one derivative.
            key = sources[0], repr((attributes["dim"], attributes["sizes"]))
            if key not in parts:
                parts[key] = _divided(values[sources[0]], attributes["dim"], attributes["sizes"])
            value = parts[key][attributes["part"]]
        else:
            value = OPERATIONS[kind](_Operation([values[source] for source in sources], attributes, tensors))
        values[number] = value
        if visit is not None:
            visit(number, value)
        del value
        for node in done[number]:
            values.pop(node, None)
            for key in [key for key in parts if key[0] == node]:
                del parts[key]
    return values[lowered.output]


def needed(operation: Node) -> list[int]:
    """The nodes whose values an operation computes with: a size of one, but the number of samples, is its value too."""
    _, _, sources, attributes = operation
    # The number of samples is that of any value.
    return [*sources, *(dim[0] for dim in attributes.get("dims", ()) if isinstance(dim, tuple) and dim[1] != 0)]


def _last_read(lowered: Lowered, computed_at: Mapping[int, int], groups: Mapping[int, Group]) -> list[list[int]]:
    """For every node, the nodes that nobody reads behind it; ``computed_at``: where that is not at the node itself."""
    readers = {number: number for number in range(len(lowered.operations))}
    for number, (_, _, sources, attributes) in enumerate(lowered.operations):
        sizes = [dim[0] for dim in attributes.get("dims", ()) if isinstance(dim, tuple)]
        for node in (*sources, *sizes):
            readers[node] = max(readers[node], computed_at.get(number, number))
    for end, group in groups.items():
        for node in group.sources:
            readers[node] = max(readers[node], end)
    done: list[list[int]] = [[] for _ in readers]
    for node, number in readers.items():
        if node != lowered.output:
            done[number].append(node)
    return done


class _Operation:
    """What one node computes with."""

    def __init__(self, values: list[torch.Tensor], attributes: Attributes, tensors: list[torch.Tensor]) -> None:
        self.values = values
        self.attributes = attributes
        self._tensors = tensors

    @property
    def x(self) -> torch.Tensor:
        return self.values[0]

    def __getitem__(self, name: str) -> Any:
        return self.attributes[name]

    def tensor(self, name: str) -> torch.Tensor | None:
        """The parameter or buffer of that name."""
        index = self.attributes[name]
        return None if index is None else self._tensors[index]

    def table(self, index: int) -> torch.Tensor:
        """One by its place."""
        return self._tensors[index]

    def weight(self, name: str = "weight") -> torch.Tensor:
        """A parameter that must be there."""
        return self._tensors[self.attributes[name]]


def _conv2d(o: _Operation) -> torch.Tensor:
    return F.conv2d(o.x, o.weight(), o.tensor("bias"), o["stride"], o["padding"], o["dilation"], o["groups"])


def _batch_norm(o: _Operation) -> torch.Tensor:
    mean, momentum = o.tensor("running_mean"), average_factor(o.attributes, o.tensor("num_batches_tracked"))
    # As nn.BatchNorm2d: without running statistics the batch's own are used in either mode.
    training = o["training"] or mean is None
    return F.batch_norm(
        o.x, mean, o.tensor("running_var"), o.tensor("weight"), o.tensor("bias"), training, momentum, o["eps"]
    )


def average_factor(attributes: Attributes, count: torch.Tensor | None) -> float:
    """How much of a batch's statistics the running ones of a batch norm take; in training mode ``count`` counts it."""
    momentum: float | None = attributes["momentum"]
    if attributes["training"] and count is not None:
        count.add_(1)
        if momentum is None:
            momentum = 1.0 / float(count)
    return momentum or 0.0


def _adaptive_avg_pool2d(o: _Operation) -> torch.Tensor:
    return F.adaptive_avg_pool2d(o.x, o["output"])


def _max_pool2d(o: _Operation) -> torch.Tensor:
    return F.max_pool2d(o.x, o["kernel"], o["stride"], o["padding"], o["dilation"], o["ceil_mode"])


def _avg_pool2d(o: _Operation) -> torch.Tensor:
    return F.avg_pool2d(
        o.x, o["kernel"], o["stride"], o["padding"], o["ceil_mode"], o["count_include_pad"], o["divisor"]
    )


def _dropout(o: _Operation) -> torch.Tensor:
    channels: Any = torch.feature_dropout_ if o["inplace"] else torch.feature_dropout
    elements: Any = torch.dropout_ if o["inplace"] else torch.dropout
    dropped: torch.Tensor = (channels if o["channels"] else elements)(o.x, o["p"], o["training"])
    return dropped


def _stochastic_depth(o: _Operation) -> torch.Tensor:
    if o["keep"] is not None:
        samples = torch.rand([len(o.x), 1, 1, 1], dtype=o.x.dtype, device=o.x.device)
        kept: torch.Tensor = o.x / o["keep"] * torch.floor(o["keep"] + samples)
        return kept
    # As torchvision.ops.stochastic_depth.
    if o["p"] == 0.0:
        return o.x
    noise = torch.empty([len(o.x) if o["rows"] else 1] + [1] * (o.x.ndim - 1), dtype=o.x.dtype, device=o.x.device)
    noise.bernoulli_(1.0 - o["p"])
    return o.x * (noise.div_(1.0 - o["p"]) if o["p"] < 1.0 else noise)


def _pad(o: _Operation) -> torch.Tensor:
    (top, left), (bottom, right) = o["before"], o["after"]
    return F.pad(o.x, (left, right, top, bottom))


def _response_norm(o: _Operation) -> torch.Tensor:
    norms = torch.linalg.vector_norm(o.x, dim=o["dims"], keepdim=True)
    (channel,) = {1, 2, 3} - set(o["dims"])
    wide = [-1 if dim == channel else 1 for dim in range(4)]
    response = norms / (norms.mean(dim=channel, keepdim=True) + o["eps"])
    responded: torch.Tensor = o.x + (o.weight().view(wide) * (o.x * response) + o.weight("bias").view(wide))
    return responded


def _scale(o: _Operation) -> torch.Tensor:
    return o.weight("factor") * o.x if o["first"] else o.x * o.weight("factor")


def _softmax(o: _Operation) -> torch.Tensor:
    return F.log_softmax(o.x, o["dim"]) if o["log"] else F.softmax(o.x, o["dim"])


def _divided(x: torch.Tensor, dim: int, sizes: list[int]) -> Sequence[torch.Tensor]:
    # What `chunk` and `split` by a size call is another function than `split` by several.
    each = sizes[0]
    alike = all(size == each for size in sizes[:-1]) and sizes[-1] <= each
    return x.split(each, dim) if alike else x.split(sizes, dim)  # type: ignore[no-untyped-call, no-any-return]


def _channel_shuffle(o: _Operation) -> torch.Tensor:
    n, c, *plane = o.x.shape
    # As torchvision's networks; the result lies in memory as theirs does.
    groups = o.x.reshape(n, o["groups"], c // o["groups"], *plane)
    return groups.transpose(1, 2).contiguous().reshape(n, c, *plane)


def _attention(o: _Operation) -> torch.Tensor:
    # Queries, keys and values; keys and values side by side, or all three.
    parts = o.x.chunk(3, -1) if len(o.values) == 1 else [o.x, *o.values[1:]]
    if len(parts) == 2:
        parts = [o.x, *parts[1].chunk(2, -1)]
    n, t, c = parts[0].shape
    q, k, v = (part.reshape(n, part.shape[1], o["heads"], -1).transpose(1, 2) for part in parts)
    if o["rotation"] is not None:
        q, k = (_turned(o, x) for x in (q, k))
    return F.scaled_dot_product_attention(q, k, v, scale=o["scale"]).transpose(1, 2).reshape(n, t, c)


def _window_attention(o: _Operation) -> torch.Tensor:
    n, height, width, wide = o.x.shape
    (high, across), heads = o["window"], o["heads"]
    down, right = -height % high, -width % across
    fill = o.tensor("fill")
    # Padding has the summand of the linear layer.
    x = o.x if fill is None else o.x - fill
    x = F.pad(x, (0, 0, 0, right, 0, down))
    x = x if fill is None else x + fill
    padded = height + down, width + right
    shift = [0 if side <= window else by for side, window, by in zip(padded, o["window"], o["shift"], strict=True)]
    x = x.roll((-shift[0], -shift[1]), (1, 2))
    rows, columns = padded[0] // high, padded[1] // across
    # Row and column of the window, of the token: a grid has them the other way round.
    sides = (high, rows, across, columns) if o["grid"] else (rows, high, columns, across)
    order = (2, 4, 1, 3) if o["grid"] else (1, 3, 2, 4)
    windows = x.reshape(n, *sides, wide).permute(0, *order, 5).reshape(n * rows * columns, high * across, 3, heads, -1)
    q, k, v = windows.permute(2, 0, 3, 1, 4)
    logit = o.tensor("logit")
    if logit is None:
        scores = q * o["scale"] @ k.transpose(-2, -1)
    else:
        scores = (
            F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1) * logit.clamp(max=math.log(100)).exp()
        )
    scores = scores + _distance_bias(o)
    if any(shift):
        mask = apart(padded, o["window"], shift)[:, None]
        scores = (scores.view(n, -1, *scores.shape[1:]) + mask).view_as(scores)
    x = (scores.softmax(-1) @ v).transpose(1, 2).reshape(n, rows, columns, high, across, -1)
    back = (0, 3, 1, 4, 2, 5) if o["grid"] else (0, 1, 3, 2, 4, 5)
    x = x.permute(back).reshape(n, *padded, -1).roll((shift[0], shift[1]), (1, 2))
    result: torch.Tensor = x[:, :height, :width].contiguous()
    return result


def _distance_bias(o: _Operation) -> torch.Tensor:
    table = o.tensor("table")
    if table is None:
        hidden = F.linear(o.weight("distances").view(-1, 2), o.weight("hidden"), o.weight("hidden_bias"))
        table = 16 * F.linear(hidden.relu(), o.weight("output")).sigmoid()
    bias: torch.Tensor = table[distances(o["window"])].permute(2, 0, 1)
    return bias


def _patch_merging(o: _Operation) -> torch.Tensor:
    x = F.pad(o.x, (0, 0, 0, o.x.shape[2] % 2, 0, o.x.shape[1] % 2))
    return torch.cat([x[:, y::2, z::2] for z in (0, 1) for y in (0, 1)], -1)


def _turned(o: _Operation, x: torch.Tensor) -> torch.Tensor:
    index, first, half = o["rotation"]
    (factors, others), late = o.table(index), x[:, :, first:]
    channels = torch.arange(x.shape[-1], device=x.device)
    partner = late[..., (channels + x.shape[-1] // 2) % x.shape[-1] if half else channels ^ 1]
    return torch.cat([x[:, :, :first], late * factors + partner * others], dim=2)


def _add(o: _Operation) -> torch.Tensor:
    return o.x.add_(o.values[1]) if o["inplace"] else o.x + o.values[1]


def _sizes(dims: list[Any], values: dict[int, torch.Tensor], inputs: torch.Tensor) -> list[int]:
    # In front of the start there are samples only, and as many.
    return [dim if isinstance(dim, int) else values.get(dim[0], inputs).shape[dim[1]] for dim in dims]


#: Kind of a node -> its function; ``Input``, ``View`` and ``Split`` are :func:`play`'s own.
OPERATIONS: dict[OpKind, Callable[[_Operation], torch.Tensor]] = {
    "Conv2d": _conv2d,
    "BatchNorm2d": _batch_norm,
    "Linear": lambda o: F.linear(o.x, o.weight(), o.tensor("bias")),
    "LayerNorm": lambda o: F.layer_norm(o.x, o["shape"], o.tensor("weight"), o.tensor("bias"), o["eps"]),
    "ReLU": lambda o: F.relu(o.x, o["inplace"]),
    "ReLU6": lambda o: F.relu6(o.x, o["inplace"]),
    "LeakyReLU": lambda o: F.leaky_relu(o.x, o["negative_slope"], o["inplace"]),
    "SiLU": lambda o: F.silu(o.x, o["inplace"]),
    "GELU": lambda o: F.gelu(o.x, approximate="tanh" if o["tanh"] else "none"),
    "Hardswish": lambda o: F.hardswish(o.x, o["inplace"]),
    "Hardsigmoid": lambda o: F.hardsigmoid(o.x, o["inplace"]),
    "Sigmoid": lambda o: torch.sigmoid(o.x),
    "Tanh": lambda o: torch.tanh(o.x),
    "MaxPool2d": _max_pool2d,
    "AvgPool2d": _avg_pool2d,
    "AdaptiveAvgPool2d": _adaptive_avg_pool2d,
    "Dropout": _dropout,
    "StochasticDepth": _stochastic_depth,
    "Flatten": lambda o: torch.flatten(o.x, o["start"], o["end"]),
    "ZeroPad2d": _pad,
    "GroupNorm": lambda o: F.group_norm(o.x, o["groups"], o.tensor("weight"), o.tensor("bias"), o["eps"]),
    "ResponseNorm": _response_norm,
    "Upsample": lambda o: F.interpolate(o.x, scale_factor=o["scale"]),
    "Permute": lambda o: o.x.permute(o["dims"]),
    "Scale": _scale,
    "Softmax": _softmax,
    "Mean": lambda o: o.x.mean(o["dims"], o["keepdim"]),
    "Add": _add,
    "Mul": lambda o: o.x * o.values[1],
    "Cat": lambda o: torch.cat(o.values, o["dim"]),
    "ChannelShuffle": _channel_shuffle,
    "Attention": _attention,
    "WindowAttention": _window_attention,
    "PatchMerging": _patch_merging,
    "Expand": lambda o: o.weight("tensor").expand(len(o.x), -1, -1),
    "Shift": lambda o: o.x + o.weight("summand"),
}
