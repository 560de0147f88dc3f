"""Labels that are probably wrong, by heads that have not seen the photo and by the photos that resemble it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cnnrs.classifier.labelled import Targets, as_rows
from cnnrs.classifier.neighbours import unit
from cnnrs.classifier.probe import Probe
from cnnrs.classifier.split import folds as deal
from cnnrs.features.features import Features
from cnnrs.features.resemblance import nearest

_NEIGHBOURS = 10
# Stronger than what predicts best: a head that bends to every photo believes wrong labels, and takes longer.
PENALTY = 1e-3


class Suspect(NamedTuple):
    """A photo whose label is probably wrong.

    Attributes:
        row: its number.
        path: its file, None where unknown.
        given: the class it is in.
        proposed: the class it seems to be of.
        probability: of the given class, 0 to 1, by a head that was trained without the photo.
        agreement: the share of the most similar other photos that are in the given class, 0 to 1.
    """

    row: int
    path: str | None
    given: str
    proposed: str
    probability: float
    agreement: float


def suspects(
    features: Any,
    labels: Any,
    classes: Sequence[str] | None = None,
    groups: Sequence[int] | None = None,
    folds: int = 5,
    seed: int = 0,
    most: int | None = None,
) -> list[Suspect]:
    """Photos whose label is probably wrong, the most suspicious first.

    Each photo is judged by a logistic regression that was trained without it and without its group, and by
    the labels of the ten photos most similar to it. Those are listed for which one of the two prefers another class.

    Args:
        features: (N, ...) rows as a tensor, an array or :class:`cnnrs.Features`.
        labels: (N,) class numbers; None of ``Features``: theirs.
        classes: C names; numbers without them.
        groups: N numbers: rows of one group do not judge each other.
        folds: how often a head is trained, each time without one share of the photos.
        seed: who is in which share.
        most: at most so many; None: all.

    Raises:
        ValueError: the lengths differ, or there are fewer than two classes.
    """
    rows = as_rows(features)
    targets = Targets.of(features.labels if labels is None else labels, len(rows))
    own = torch.arange(len(rows)) if groups is None else torch.as_tensor(groups)
    if targets.several:
        raise ValueError("suspects are looked for where every photo has one label, these have several")
    if len(targets.classes) < 2:
        raise ValueError(f"at least two classes are needed, all {len(rows):,} labels are {targets.classes[0]!r}")
    if folds < 2:
        raise ValueError(f"folds must be at least 2, got {folds}")
    if own.shape != (len(rows),):
        raise ValueError(f"every row needs one group: got {len(rows):,} rows and {len(own):,} groups")
    if len(set(own.tolist())) < 2:
        raise ValueError("all rows are of one group: none is left to judge them")
    probabilities = _judge(rows, targets, deal(targets.values, own.tolist(), folds, seed), seed)
    same, own = unit(rows), own.to(rows.device)
    cosines, places = nearest(same, same, min(_NEIGHBOURS, len(rows) - 1), (own, own))
    votes = torch.nn.functional.one_hot(targets.values[places.cpu()], len(targets.classes)).double()
    votes *= cosines.isfinite().cpu().unsqueeze(2)
    shares = votes.sum(dim=1) / votes.sum(dim=(1, 2)).clamp(min=1).unsqueeze(1)
    given = targets.values.unsqueeze(1)
    both = (probabilities + shares) / 2
    doubt = both.gather(1, given).squeeze(1)
    rest = both.scatter(1, given, -1.0)
    proposed = rest.argmax(dim=1)
    listed = (probabilities.argmax(dim=1) != targets.values) | (shares.argmax(dim=1) != targets.values)
    order = doubt.argsort(stable=True)
    order = order[listed[order]][:most]
    names = [str(classes[int(number)]) if classes is not None else str(number) for number in targets.classes]
    paths = features.paths if isinstance(features, Features) else None
    return [
        Suspect(
            row, None if paths is None else paths[row], names[int(targets.values[row])], names[int(proposed[row])],
            float(probabilities[row, targets.values[row]]), float(shares[row, targets.values[row]]),
        )
        for row in order.tolist()
    ]  # fmt: skip


def _judge(rows: Tensor, targets: Targets, share: Tensor, seed: int) -> Tensor:
    """(N, C) probabilities of every row by a head that was trained on the other shares."""
    found = torch.zeros((len(rows), len(targets.classes)), dtype=torch.float64)
    classes = range(len(targets.classes))
    for number in sorted(set(share.tolist())):
        inside, outside = (share == number).nonzero()[:, 0], (share != number).nonzero()[:, 0]
        seen, held = ((rows[part.to(rows.device)], targets.values[part]) for part in (outside, inside))
        head = Probe(penalty=PENALTY, seed=seed).fit(*seen, classes=classes)
        found[inside] = torch.from_numpy(head.predict_proba(held[0])).double()
    return found
