"""What becomes of the channels of tokens on their way to an attention."""

from __future__ import annotations

from dataclasses import dataclass

import torch

#: Of samples, tokens, parts (queries, keys and values), heads and the channels of a head; of keys behind a product.
Axes = tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Rotation:
    """Queries or keys times ``table[0]``, plus their channels' partners times ``table[1]``.

    Attributes:
        table: (2, tokens, channels of a head), of the tokens behind the first ones.
        first: how many tokens are as they were.
        half: a channel's partner is half a head away, not its neighbour.
    """

    table: torch.Tensor
    first: int
    half: bool

    def is_same(self, other: Rotation | None) -> bool:
        return other is not None and (self.first, self.half) == (other.first, other.half) and torch.equal(
            self.table, other.table
        )  # fmt: skip


@dataclass(frozen=True)
class Heads:
    """Channels of tokens, divided among heads.

    Attributes:
        axes: the dimensions, in order.
        tokens: how many.
        parts: how many values lie side by side: three, or one.
        heads: how many.
        depth: channels of each.
        part: which of the parts, behind their separation.
        factor: what it has been multiplied by.
        of: of scores and weights, queries and keys with the numbers of their nodes.
        weights: whether they have been through softmax.
        rotation: how queries or keys have been turned.
    """

    axes: Axes
    tokens: int
    parts: int
    heads: int
    depth: int
    part: int | None = None
    factor: float = 1.0
    of: tuple[tuple[int, Heads], tuple[int, Heads]] | None = None
    weights: bool = False
    rotation: Rotation | None = None

    @property
    def sizes(self) -> list[int | None]:
        """Of the dimensions; None for that of the batch."""
        keys = self.tokens if self.of is None else self.of[1][1].tokens
        known = {"n": None, "t": self.tokens, "p": self.parts, "h": self.heads, "d": self.depth, "k": keys}
        return [known[axis] for axis in self.axes]
