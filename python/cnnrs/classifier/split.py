"""Which rows train, which choose, which measure: every class in every part, rows that belong together on one side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cnnrs.data.parts import share_out

#: Shares of the rows that choose (epoch, head, penalty) and that measure; the rest trains.
VALID, TEST = 0.15, 0.15


class Split(NamedTuple):
    """Row numbers, int64, ascending; no row is in two parts."""

    train: Tensor
    valid: Tensor
    test: Tensor


def three_ways(labels: Tensor, groups: Sequence[int], valid: float = VALID, test: float = TEST, seed: int = 0) -> Split:
    """Rows for training, for choosing and for measuring.

    Args:
        labels: (N,) class numbers, or (N, C) 0/1.
        groups: N numbers; rows of one number stay in one part.
        valid: share of the rows, 0 to below 1; 0: no such part.
        test: as ``valid``.
        seed: the same seed gives the same parts.
    """
    part = _deal(labels, groups, [1 - valid - test, valid, test], seed)
    return Split(*((part == number).nonzero().squeeze(1) for number in range(3)))


def hold_out(labels: Tensor, groups: Sequence[int], valid: float = VALID, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Rows for training and for choosing; where groups are too few for that, without them: no row measures here."""
    split = three_ways(labels, groups, valid, 0.0, seed)
    if not len(split.valid):
        split = three_ways(labels, range(len(labels)), valid, 0.0, seed)
    return split.train, split.valid


def folds(labels: Tensor, groups: Sequence[int], k: int, seed: int = 0) -> Tensor:
    """(N,) fold numbers from 0 to ``k - 1``, each class spread over all of them as evenly as its groups allow."""
    return _deal(labels, groups, [1 / k] * k, seed)


def _deal(labels: Tensor, groups: Sequence[int], shares: Sequence[float], seed: int) -> Tensor:
    """(N,) number of the part of each row."""
    several = labels.dim() == 2
    members: dict[int, list[int]] = {}
    for row, group in enumerate(groups):
        members.setdefault(group, []).append(row)
    kinds = [tuple(row.nonzero().flatten().tolist()) for row in labels] if several else [(x,) for x in labels.tolist()]
    where = share_out([[kinds[row] for row in rows] for rows in members.values()], shares, seed)
    part = torch.zeros(len(labels), dtype=torch.int64)
    for rows, number in zip(members.values(), where, strict=True):
        part[rows] = number
    return part
