"""Sizes that follow from weights and arguments, whatever the batch: the rank of a value, the channels of images."""

from __future__ import annotations

from typing import Any

import torch

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
    """

    def __init__(self) -> None:
        self._ranks: list[int | None] = [None]
        self._channels: list[int | None] = [None]

    def rank(self, node: int) -> int | None:
        """How many dimensions a value has."""
        return self._ranks[node]

    def channels(self, node: int) -> int | None:
        """How many channels images have."""
        return self._channels[node] if self._ranks[node] == 4 else None

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
