"""Which rows train, choose and measure: folders first, the rest is dealt; what is alike stays on one side."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from cnnrs._util.text import shown
from cnnrs.app.jobs.photos import Part
from cnnrs.classifier.alike import THRESHOLD, Pair, alike, components
from cnnrs.classifier.split import Split, hold_out, three_ways
from cnnrs.features.features import Features

#: Below so many photos a share of them says too little: all are measured, each by what was trained on the others.
FEW = 300
# Or so many groups, of which 15 % are three.
FEW_GROUPS = 20
# Rows that differ by no more than rounding: copies of one file.
_COPIES = 0.99999
# Where more than this share of the photos (of few a third) is one chain of near-duplicates, the threshold does not fit.
_LARGEST_SHARE, _LEAST_LARGE = 0.1, 20


def join(features: Features, said: Sequence[str] | None) -> tuple[list[int], list[Pair], list[str]]:
    """Groups of rows that belong together: what the user says, copies, and near-duplicates.

    Returns:
        (group number per row, pairs of near-duplicates with the most alike first, warnings).
    """
    pairs = alike(features.features, THRESHOLD)
    warnings: list[str] = []
    together = _joined(len(features), pairs, said)
    if pairs:
        largest = max(Counter(_joined(len(features), pairs, None)).values())
        if largest > max(min(_LEAST_LARGE, len(features) / 3), _LARGEST_SHARE * len(features)):
            warnings.append(
                f"{largest:,} of {len(features):,} photos are so alike that they form one chain: only copies were kept "
                "together, not near-duplicates; say what belongs together with --groups"
            )
            pairs = [pair for pair in pairs if pair.similarity >= _COPIES]
            together = _joined(len(features), pairs, said)
    return together, pairs, warnings


def contradictions(rows: Features, pairs: Sequence[Pair], classes: Sequence[str]) -> list[str]:
    """A warning where photos that look the same are in different classes."""
    if rows.labels.dim() != 1 or rows.paths is None:
        return []
    found = [pair for pair in pairs if rows.labels[pair.first_row] != rows.labels[pair.second_row]]
    if not found:
        return []
    first, second = (
        f"{shown(rows.paths[row])} ({shown(classes[int(rows.labels[row])])})"
        for row in (found[0].first_row, found[0].second_row)
    )
    pair = "1 pair of photos looks" if len(found) == 1 else f"{len(found):,} pairs of photos look"
    are = "is" if len(found) == 1 else "are"
    return [f"{pair} alike and {are} in different classes, for example {first} and {second}"]


def _joined(size: int, pairs: Sequence[Pair], said: Sequence[str] | None) -> list[int]:
    first: dict[str, int] = {}
    # An empty name is none.
    same = [Pair(first.setdefault(name, row), row, 1.0) for row, name in enumerate(said or ()) if name]
    return components(size, [*pairs, *same])


def deal(
    labels: Tensor, parts: Sequence[Part | None], groups: Sequence[int], valid: float, test: float, seed: int
) -> Split:
    """Rows by part: folders as they are, the others by shares; a share of ``train`` where no folder chooses."""
    rows: dict[str, list[int]] = {"train": [], "valid": [], "test": []}
    said: dict[str | None, list[int]] = {"train": [], "valid": [], "test": [], None: []}
    for row, part in enumerate(parts):
        said[part].append(row)

    def put(chosen: Sequence[int], **dealt: Tensor) -> None:
        for part, numbers in dealt.items():
            rows[part] += [chosen[number] for number in numbers.tolist()]

    if chosen := said[None]:
        put(chosen, **three_ways(labels[chosen], [groups[row] for row in chosen], valid, test, seed)._asdict())
    if chosen := said["train"]:
        learn, choose = torch.arange(len(chosen)), torch.arange(0)
        if not said["valid"]:
            learn, choose = hold_out(labels[chosen], [groups[row] for row in chosen], valid, seed)
        put(chosen, train=learn, valid=choose)
    rows["valid"] += said["valid"]
    rows["test"] += said["test"]
    return Split(*(torch.tensor(sorted(rows[part]), dtype=torch.int64) for part in ("train", "valid", "test")))


def apart(split: Split, labels: Tensor, groups: Sequence[int]) -> tuple[Split, str]:
    """The same parts, where folders said which is which: what is alike to a row of ``test`` neither trains nor chooses.

    Returns:
        The parts, and a sentence about it; "" where nothing is alike.
    """
    tested = {groups[row] for row in split.test.tolist()}
    train, valid = (
        torch.tensor([row for row in part.tolist() if groups[row] not in tested], dtype=torch.int64)
        for part in (split.train, split.valid)
    )
    alike = len(split.train) + len(split.valid) - len(train) - len(valid)
    if not alike:
        return split, ""
    photos = "1 photo is" if alike == 1 else f"{alike:,} photos are"
    known, left = (_kinds(labels[rows]) for rows in (split.train, train))
    if left < known or not len(valid):
        text = "alike to photos that measure, too many to leave them out: the accuracy looks better than it is"
        return split, f"{photos} {text}"
    return Split(train, valid, split.test), f"{photos} left out of training: alike to photos that measure"


def _kinds(labels: Tensor) -> int:
    """How many classes have rows."""
    return int(labels.any(dim=0).sum()) if labels.dim() == 2 else len(set(labels.tolist()))


def spread(labels: Tensor, groups: Sequence[int]) -> tuple[list[int], str]:
    """Groups for folds, in which every class has two or more; a sentence where that means to give up groups."""
    hot = labels > 0 if labels.dim() == 2 else torch.nn.functional.one_hot(labels) > 0
    numbers = torch.as_tensor(groups)
    if all(len(set(numbers[rows].tolist())) > 1 for rows in hot.T if int(rows.sum()) > 1):
        return list(groups), ""
    return list(range(len(groups))), (
        "all photos of a class are alike or belong together: they are measured by what was trained on the others, and "
        "the accuracy looks better than it is"
    )
