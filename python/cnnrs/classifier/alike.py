"""Photos that show the same: copies that were saved again, resized or cropped a little, found by their features."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cnnrs.classifier.labelled import CHUNK, as_rows, chunks
from cnnrs.classifier.neighbours import unit
from cnnrs.classifier.ridge import Factor

#: Similarity from which on two rows count as the same photo; benches/heads.py measures it.
THRESHOLD = 0.7
# Rows that are compared with as many others at a time: bounds memory.
_BLOCK = 2048
# So many rows, evenly chosen, tell how rows differ; of fewer than that many directions too little is known.
_SAMPLE, _DIRECTIONS = 2048, 500
# Rows that differ by this part of what rows usually do (a quantile of all differences) are one photo there: a burst.
_NEAR, _USUAL = 0.15, 0.9
# N² / (N² + this) of the mean of N rows is taken off: around the whole of it each of two would be minus the other.
_FEW = 10


class Pair(NamedTuple):
    """Two rows that are alike: `similarity` is at most 1."""

    first_row: int
    second_row: int
    similarity: float


def alike(features: Any, threshold: float = THRESHOLD) -> list[Pair]:
    """Pairs of rows that are alike, as many as it takes to connect all that are, most similar first.

    Similarity is the cosine of two rows after whitening: what many photos have in common counts little, so that one
    threshold serves any network, and different photos of one kind are not taken for copies. Rows that are the same have
    similarity 1 in any company.

    All pairs are compared. Where many rows are alike, each is paired with what it resembles most, not with every other
    one: there are fewer pairs than rows, however many copies there are. Memory: the rows once more as float32.

    Args:
        features: (N, ...) rows as a tensor, an array or :class:`cnnrs.Features`.
        threshold: similarity from which on rows are alike, from -1 to 1.

    Raises:
        ValueError: the threshold is not between -1 and 1, or a row is not finite.

    >>> import torch
    >>> rows = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.1]])
    >>> [(pair.first_row, pair.second_row) for pair in alike(rows)], components(3, alike(rows))
    ([(1, 2)], [0, 1, 1])
    """
    if not -1 <= threshold <= 1:
        raise ValueError(f"threshold must be a cosine, from -1 to 1, got {threshold}")
    rows = white(as_rows(features))
    group = torch.arange(len(rows))
    pairs: list[Pair] = []
    for right in range(0, len(rows), _BLOCK):
        second = rows[right : right + _BLOCK]
        for left in range(0, right + 1, _BLOCK):
            cosines = (rows[left : left + _BLOCK] @ second.T).cpu()
            pairs += _connect(cosines, left, right, group, threshold)
    return sorted(pairs, key=lambda pair: (-pair.similarity, pair.first_row, pair.second_row))


def white(rows: Tensor) -> Tensor:
    """(N, D) float32 rows of length 1 whose directions vary about equally, but for those of which little is known."""
    some = torch.linspace(0, len(rows) - 1, min(len(rows), _SAMPLE)).round().long().to(rows.device)
    sample = rows[some].float()
    # A burst counts as one photo: otherwise, where it is half of a set, its differences are those that photos have.
    weights = 1 / _alike_in(unit(rows, some)).double()
    count = float(weights.sum())
    mean = (weights @ sample.double() * count / (count**2 + _FEW)).float()
    sample -= mean
    factor = Factor.of(sample, weights)
    variance = factor.spectrum / count
    total = float((weights @ sample.double().square()).sum()) / count
    least = total / min(count, sample.shape[1], _DIRECTIONS) or 1.0
    less = (least / (variance + least)).sqrt().sub(1).float()
    out = torch.empty((len(rows), rows.shape[1]), device=rows.device)
    for start, part in chunks(rows):
        around = part - mean
        out[start : start + CHUNK] = around + (around @ factor.basis * less) @ factor.basis.T
    return unit(out)


def _alike_in(rows: Tensor) -> Tensor:
    """(n,) for each of (n, D) float32 rows of length 1 how many are about the same, itself included."""
    apart = 1 - rows @ rows.T
    # Most pairs are of different photos, even where most photos are of one burst.
    usual = apart.flatten().kthvalue(1 + int(_USUAL * (apart.numel() - 1))).values
    near = apart <= _NEAR * usual
    near.fill_diagonal_(True)
    return near.sum(dim=1)


def _connect(cosines: torch.Tensor, left: int, right: int, group: torch.Tensor, threshold: float) -> list[Pair]:
    """Join groups of rows of a block; every row with its most similar one of another group, until none is alike."""
    found: list[Pair] = []
    while True:
        # Rows of one group need no further pair; nor has a row one with itself.
        one, other = group[left : left + len(cosines)], group[right : right + cosines.shape[1]]
        cosines.masked_fill_(one[:, None] == other, -2)
        if not len(cosines) or cosines.max() < threshold:
            return found
        edges = []
        for side in (0, 1):
            best, which = cosines.max(dim=side)
            mine = (best >= threshold).nonzero()[:, 0]
            ends = (which[mine], mine) if side == 0 else (mine, which[mine])
            edges += list(zip(best[mine].tolist(), *(end.tolist() for end in ends), strict=True))
        for similarity, i, j in sorted(edges, key=lambda edge: (-edge[0], *edge[1:])):
            a, b = left + i, right + j
            if group[a] != group[b]:
                low, high = sorted((int(group[a]), int(group[b])))
                group[group == high] = low
                found.append(Pair(min(a, b), max(a, b), min(similarity, 1.0)))


def components(n: int, pairs: Iterable[Pair]) -> list[int]:
    """For each of ``n`` rows the number of its group, 0, 1, ... by first row: rows that pairs connect share one.

    Raises:
        IndexError: a pair names a row that is not among them.
    """
    parent = list(range(n))

    def root(row: int) -> int:
        while parent[row] != row:
            parent[row] = parent[parent[row]]
            row = parent[row]
        return row

    for first, second, _ in pairs:
        if not 0 <= min(first, second) <= max(first, second) < n:
            raise IndexError(f"there are {n} rows, a pair names {first} and {second}")
        low, high = sorted((root(first), root(second)))
        parent[high] = low
    numbers: dict[int, int] = {}
    return [numbers.setdefault(root(row), len(numbers)) for row in range(n)]
