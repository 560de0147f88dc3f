"""A batch of images on its way from the sampler to the consumer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass
class Batch:
    """What is known of a batch so far; lists have one entry per sample."""

    indices: list[int] = field(default_factory=list)
    # Places in the sampler's order.
    positions: Sequence[int] = ()
    targets: Any = field(default_factory=list)
    # One tensor, or one value per sample, once they are there.
    values: Any = None
    # Indices that are no numbers of samples: the data set is called with them.
    asked: Any = None
    # What the sampler or the look-up of the samples raised: it is due when the batches before it are delivered.
    error: Exception | None = None
    # By which the threads' loader knows it; None when they have nothing to do.
    ticket: int | None = None

    def drop(self, places: Sequence[int]) -> list[int]:
        """Does without these samples, whose values are not there yet; returns the places of those that are left."""
        gone = set(places)
        left = [i for i in range(len(self.indices)) if i not in gone]
        self.indices = [self.indices[i] for i in left]
        self.positions = [self.positions[i] for i in left]
        self.targets = [self.targets[i] for i in left]
        return left

    def cut(self, start: int, end: int) -> Batch:
        """The samples from ``start`` to ``end``, whose values are there."""
        part = slice(start, end)
        return Batch(self.indices[part], self.positions[part], self.targets[part], self.values[part])


def join(parts: list[Batch]) -> Batch:
    """One batch of the samples of several, whose values are there."""

    def all_of(name: str) -> list[Any]:
        return [one for part in parts for one in getattr(part, name)]

    tensors = [part.values for part in parts]
    whole = all(isinstance(one, torch.Tensor) for one in tensors) and len({one.shape[1:] for one in tensors}) == 1
    values: Any = torch.cat(tensors) if whole else all_of("values")
    return Batch(all_of("indices"), all_of("positions"), all_of("targets"), values)
