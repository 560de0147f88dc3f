"""Which samples go into which part of a data set: the same share of every label in each."""

from __future__ import annotations

import math
import operator
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from typing import Any, SupportsIndex

import torch

_EXAMPLES = "split(0.2), or split(0.7, 0.15, 0.15) for three parts"


def fractions_of(fraction: Any, more: Sequence[Any], seed: int) -> tuple[list[float], int]:
    """The fractions of all parts, and the seed, of what was given to ``split``.

    One number is the fraction of the second of two parts; several, or a list, are those of all parts. A whole number
    behind the fraction is the seed.

    Raises:
        ValueError: a fraction is not between 0 and 1, or those of all parts do not add up to 1.
        TypeError: it is no number.

    >>> fractions_of(0.25, (), 0), fractions_of(0.5, (0.25, 0.25), 0), fractions_of([0.5, 0.5], (), 3)
    (([0.75, 0.25], 0), ([0.5, 0.25, 0.25], 0), ([0.5, 0.5], 3))
    """
    if len(more) == 1 and isinstance(more[0], SupportsIndex):
        return fractions_of(fraction, (), operator.index(more[0]))
    # Also an array or a tensor.
    listed = isinstance(fraction, (list, tuple)) or getattr(fraction, "ndim", 0) == 1
    given = [*fraction, *more] if listed else [fraction, *more]
    for one in given:
        if isinstance(one, (str, bytes)) or not hasattr(one, "__float__"):
            raise TypeError(f"split takes the fractions of the parts, {_EXAMPLES}, got {one!r}")
        if not 0 < one < 1:
            raise ValueError(f"fraction must be between 0 and 1 (exclusive), got {one}")
    fractions = [float(one) for one in given]
    if len(fractions) == 1 and not listed:
        return [1 - fractions[0], fractions[0]], seed
    if not math.isclose(sum(fractions), 1, abs_tol=1e-6):
        raise ValueError(
            f"the fractions of all parts must add up to 1, got {', '.join(map(str, given))}, which are "
            f"{sum(fractions):g}: {_EXAMPLES}"
        )
    return fractions, seed


def stratified(
    labels: Sequence[Hashable], fractions: Sequence[float], seed: int, keys: Sequence[Hashable] | None = None
) -> list[list[int]]:
    """The numbers of the samples of each part, ascending, ``fractions[i]`` of every label in part i.

    Numbers are rounded to whole samples; a label with at least as many samples as there are parts is in all of them.
    Labels are numbers (or anything else that can be sorted), or tuples of them where a sample has several. Samples of
    equal keys stay together.

    >>> stratified(["a", "a", "b", "b"], [0.5, 0.5], seed=0)
    [[1, 2], [0, 3]]
    """
    groups: dict[Hashable, list[int]] = {}
    for i, key in enumerate(range(len(labels)) if keys is None else keys):
        groups.setdefault(key, []).append(i)
    if len(groups) < len(labels) or any(isinstance(label, tuple) for label in labels):
        every = [label if isinstance(label, tuple) else (label,) for label in labels]
        where = share_out([[every[i] for i in group] for group in groups.values()], fractions, seed)
        return [
            sorted(i for group, part in zip(groups.values(), where, strict=True) if part == number for i in group)
            for number in range(len(fractions))
        ]
    generator = torch.Generator().manual_seed(seed)
    members: dict[Any, list[int]] = {}
    for i, label in enumerate(labels):
        members.setdefault(label, []).append(i)
    parts: list[list[int]] = [[] for _ in fractions]
    for label in sorted(members):
        found = members[label]
        order = torch.randperm(len(found), generator=generator).tolist()
        start = 0
        # From the last part on: the first one has what the others leave.
        for part, count in reversed(list(enumerate(_counts(len(found), fractions)))):
            parts[part] += [found[i] for i in order[start : start + count]]
            start += count
    return [sorted(part) for part in parts]


def _counts(number: int, fractions: Sequence[float]) -> list[int]:
    """How many of ``number`` samples each part gets."""
    ends = [round(sum(fractions[i:]) * number) for i in range(1, len(fractions))]
    counts = [a - b for a, b in zip([number, *ends], [*ends, 0], strict=True)]
    while number >= len(counts) and 0 in counts:
        counts[counts.index(max(counts))] -= 1
        counts[counts.index(0)] += 1
    return counts


def share_out(groups: Sequence[Sequence[Iterable[Any]]], fractions: Sequence[float], seed: int) -> list[int]:
    """The number of the part of each group: samples that stay together, each with any number of labels.

    Iterative stratification (Sechidis, Tsoumakas, Vlahavas 2011), with groups in place of samples: the label with the
    fewest samples left is dealt first, each of its groups to the part that lacks most of that label. A part with
    fraction 0 gets nothing; a label in as many groups as there are others is in all of them.

    >>> share_out([[("a",)], [("a",), ("b",)], [("b",)], [("a",)]], [0.5, 0.5], seed=0)
    [1, 0, 1, 0]
    """
    counts = [Counter(label for sample in group for label in sample) for group in groups]
    sizes = [len(group) for group in groups]
    order = torch.randperm(len(groups), generator=torch.Generator().manual_seed(seed)).tolist()
    # Large groups first, while there is room for them everywhere.
    order.sort(key=lambda group: -sizes[group])
    holders: dict[Any, list[int]] = {}
    for group in order:
        for label in counts[group]:
            holders.setdefault(label, []).append(group)
    left = {label: sum(counts[group][label] for group in found) for label, found in holders.items()}
    wanted = {label: _wanted(left[label], len(found), fractions) for label, found in holders.items()}
    room = [sum(sizes) * fraction for fraction in fractions]
    open_parts = [part for part, fraction in enumerate(fractions) if fraction]
    placed: dict[int, int] = {}

    def place(group: int, lack: Sequence[float]) -> None:
        part = placed[group] = max(open_parts, key=lambda part: (lack[part], room[part]))
        room[part] -= sizes[group]
        for label, count in counts[group].items():
            wanted[label][part] -= count
            if label in left:
                left[label] -= count

    while left:
        rarest = min(left, key=lambda label: (left[label], label))
        for group in holders[rarest]:
            if group not in placed:
                place(group, wanted[rarest])
        del left[rarest]
    for group in order:
        # Of no label at all.
        if group not in placed:
            place(group, room)
    return [placed[group] for group in range(len(groups))]


def _wanted(samples: int, groups: int, fractions: Sequence[float]) -> list[float]:
    """How many of a label's samples each part should get: at least one where there are enough groups."""
    each = [samples * fraction for fraction in fractions]
    raised = [max(share, 1.0) if share else 0.0 for share in each]
    if groups < sum(map(bool, each)):
        return each
    # What small parts get beyond their share, the largest gives.
    raised[raised.index(max(raised))] -= sum(raised) - samples
    return raised
