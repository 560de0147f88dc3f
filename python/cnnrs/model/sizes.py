"""Sizes that follow from weights and arguments, whatever the batch: the rank of a value, the channels of images."""

from __future__ import annotations

from typing import Any

import torch

from cnnrs import _cnnrs
from cnnrs._records import Node, OpKind

#: Operations whose result has the dimensions and the channels of their (first) input.
_LIKE_THEIR_INPUT: frozenset[OpKind] = frozenset({
    "MaxPool2d", "AvgPool2d", "AdaptiveAvgPool2d", "Dropout", "StochasticDepth", "LayerNorm",
    "ZeroPad2d", "Softmax", "ChannelShuffle", "ReLU", "ReLU6", "LeakyReLU", "SiLU", "GELU", "Hardswish", "Hardsigmoid",
    "Sigmoid", "Tanh",
})  # fmt: skip


class Sizes:
    """What is known of the values of a graph that is being put together.

    A convolution takes a single image without a batch, too, whose second dimension is its height. So a number of
    channels counts only where four dimensions are known: behind a layer, or at an assignment, that takes no other.

    Args:
        image: the shape of the samples, without the batch, where the graph is for such only.
    """

    def __init__(self, image: tuple[int, ...] | None = None) -> None:
        self._image = image
        #: Of every operation so far, for two samples and for three.
        self._known: list[list[list[int]]] = [[], []]
        self._ranks: list[int | None] = [None]
        self._channels: list[int | None] = [None]

    def rank(self, node: int) -> int | None:
        """How many dimensions a value has."""
        return self._ranks[node]

    def channels(self, node: int) -> int | None:
        """How many channels images have."""
        return self._channels[node] if self._ranks[node] == 4 else None

    def shape(self, node: int, nodes: list[Node], tensors: list[torch.Tensor]) -> list[int | None] | None:
        """The sizes of a value, None for those that the number of samples decides; None where nothing is known."""
        if self._image is None:
            return None
        if node >= len(self._known[0]):
            try:
                graph = _cnnrs.Graph(nodes, node, [list(t.shape) for t in tensors])
                self._known = [graph.shapes([samples, *self._image]) for samples in (2, 3)]
            except (TypeError, ValueError, OverflowError, RuntimeError):
                return None
        two, three = (known[node] for known in self._known)
        return [a if a == b else None for a, b in zip(two, three, strict=True)] if len(two) == len(three) else None

    def has_batch(self, node: int) -> bool:
        """Whether the first dimension of a value is the batch's, of which :meth:`shape` has been asked."""
        return [known[node][:1] for known in self._known if node < len(known)] == [[2], [3]]

    def has_rank(self, node: int, rank: int) -> None:
        """``forward`` goes on with values of so many dimensions only."""
        self._ranks[node] = rank

    def add(self, operation: Node, tensors: list[torch.Tensor]) -> None:
        """One more operation, behind those so far."""
        rank, channels = self._of(operation, tensors)
        self._ranks.append(rank)
        self._channels.append(channels)

    def _of(self, operation: Node, tensors: list[torch.Tensor]) -> tuple[int | None, int | None]:
        _, kind, sources, attributes = operation
        first = sources[0]
        rank, channels = self._ranks[first], self._channels[first]
        if kind in _LIKE_THEIR_INPUT:
            return rank, channels
        if kind == "BatchNorm2d":
            own = [attributes[name] for name in ("weight", "running_mean") if attributes[name] is not None]
            return rank, len(tensors[own[0]]) if own else channels
        if kind == "Conv2d":
            return rank, len(tensors[attributes["weight"]])
        if kind == "View":
            return _of_view(attributes["dims"])
        if kind == "Permute":
            return len(attributes["dims"]), None
        if kind == "Split" and rank == 4:
            sizes: list[int] = attributes["sizes"]
            return rank, sizes[attributes["part"]] if attributes["dim"] == 1 else channels
        if kind == "Cat" and all(self._ranks[source] == 4 for source in sources):
            all_of = [self._channels[source] for source in sources]
            joined = attributes["dim"] in (1, -3)
            return 4, sum(c for c in all_of if c is not None) if joined and None not in all_of else None
        if kind in ("Add", "Mul") and rank is not None and rank == self._ranks[sources[1]]:
            return rank, _broadcast(channels, self._channels[sources[1]])
        if kind == "Scale" and rank == 4:
            factor = tensors[attributes["factor"]]
            wide = factor.shape[-3] if factor.dim() >= 3 else 1
            return (4, _broadcast(channels, wide)) if factor.dim() <= 4 else (None, None)
        return None, None


def _of_view(dims: list[Any]) -> tuple[int, int | None]:
    channels = dims[1] if len(dims) == 4 else None
    return len(dims), channels if type(channels) is int and channels > 0 else None


def _broadcast(one: int | None, other: int | None) -> int | None:
    if one is None or other is None or 1 not in (one, other, int(one == other)):
        return None
    return max(one, other)
