"""What the report shows of a measurement."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from cnnrs.app.jobs.judge import Verdict
from cnnrs.app.jobs.measure import Measured, Tried
from cnnrs.app.jobs.photos import Photos
from cnnrs.app.report.evidence import Curve, Evidence, HeadRow, Neighbour, Twins, Unknown
from cnnrs.classifier.alike import Pair
from cnnrs.classifier.neighbours import unit
from cnnrs.classifier.novelty import Novelty
from cnnrs.classifier.suspects import Suspect, suspects
from cnnrs.features.features import Features
from cnnrs.features.resemblance import nearest
from cnnrs.training.history import History
from cnnrs.training.ranking import curve

_POINTS = 200
_NEIGHBOURS = 3
# Of many suspects the first ones are worth a look.
_MOST_SUSPECTS = 60
# 25,000 photos of 4,096 numbers and a little more: 0.6 GB.
_MOST_NUMBERS = 150_000_000


def curves(scores: Tensor, labels: Tensor, classes: Sequence[str]) -> tuple[list[Curve], list[Curve]]:
    """(ROC, precision over recall) of the classes; of two classes those of the second."""
    several = labels.dim() == 2
    probabilities = scores.sigmoid() if several else scores.softmax(dim=1)
    numbers = [1] if len(classes) == 2 and not several else list(range(len(classes)))
    hits = [labels[:, number] > 0 if several else labels == number for number in numbers]
    found = [(number, curve(probabilities[:, number], hit)) for number, hit in zip(numbers, hits, strict=True)]
    found = [(number, one) for number, one in found if len(one.recall) and not math.isnan(one.area)]
    roc, ranked = [], []
    for number, one in found:
        used = int((one.thresholds >= 0.5).sum()) - 1
        at = None if used < 0 or len(numbers) > 1 else (float(one.false_alarms[used]), float(one.recall[used]))
        roc.append(Curve(classes[number], [0.0, *_few(one.false_alarms)], [0.0, *_few(one.recall)], one.area, at))
        at = None if at is None else (float(one.recall[used]), float(one.precision[used]))
        ranked.append(Curve(classes[number], _few(one.recall), _few(one.precision), one.average_precision, at))
    return roc, ranked


def _few(values: Tensor) -> list[float]:
    """At most so many points, the first and the last among them."""
    if len(values) <= _POINTS:
        return [float(value) for value in values]
    return [float(values[i]) for i in torch.linspace(0, len(values) - 1, _POINTS).round().long()]


def neighbours(
    rows: Features, wrong: Tensor, train: Tensor, groups: Sequence[int], classes: Sequence[str]
) -> dict[int, list[Neighbour]]:
    """For each of the rows ``wrong`` the training photos most like it, none of its own group."""
    if not len(wrong) or rows.paths is None or rows.features[0].numel() * len(train) > _MOST_NUMBERS:
        return {}
    group = torch.as_tensor(groups)
    flat = rows.features.flatten(1)
    cosines, places = nearest(
        unit(flat[wrong]), unit(flat, train), min(_NEIGHBOURS, len(train)), (group[wrong], group[train])
    )
    found = {}
    for row, some, where in zip(wrong.tolist(), cosines.tolist(), places.tolist(), strict=True):
        numbers = [int(train[i]) for i in where]
        found[row] = [
            Neighbour(rows.paths[number], classes[int(rows.labels[number])], value)
            for number, value in zip(numbers, some, strict=True)
            if value > -1
        ]
    return found


def twins(rows: Features, pairs: Sequence[Pair], classes: Sequence[str], parts: Mapping[int, str]) -> list[Twins]:
    """Pairs of near-duplicates, with their classes and the parts that folders put them in."""
    if rows.paths is None:
        return []
    found = []
    for first, second, similarity in pairs:
        labels = classes[int(rows.labels[first])], classes[int(rows.labels[second])]
        place = parts.get(first, ""), parts.get(second, "")
        found.append(Twins((rows.paths[first], rows.paths[second]), labels, similarity, place if all(place) else None))
    return found


def of_scores(
    scores: Tensor, labels: Tensor, paths: list[str] | None, classes: list[str], verdict: Verdict,
    skipped: Sequence[tuple[str, str]] = (),
) -> Evidence:  # fmt: skip
    """What scores alone show, of photos that trained nothing."""
    roc, ranked = curves(scores, labels, classes)
    return Evidence(
        History(), 0, scores, labels, paths, classes, "new photos", True, roc=roc, precision_recall=ranked,
        skipped=skipped, several=verdict.several,
    )  # fmt: skip


def _suspects(rows: Features, classes: Sequence[str], groups: Sequence[int]) -> list[Suspect]:
    """Labels that are probably wrong; not looked for where the copy of the features that it takes is too large."""
    if rows.features.numel() > _MOST_NUMBERS or len(set(groups)) < 2:
        return []
    return suspects(rows, rows.labels, classes, groups, most=_MOST_SUSPECTS)


def _head(tried: Tried, chosen: bool) -> HeadRow:
    return HeadRow(tried.kind, tried.loss, tried.accuracy, tried.seconds, chosen)


def gather(
    rows: Features, measured: Measured, verdict: Verdict, photos: Photos, numbers: Sequence[int],
    groups: Sequence[int], pairs: Sequence[Pair], novelty: Novelty, warnings: Sequence[str], pretrained: Features,
) -> Evidence:  # fmt: skip
    """Everything that a training shows.

    Args:
        rows: features of all photos by the network that is used.
        measured: the head, and what measured it.
        verdict: its numbers.
        photos: what was trained on.
        numbers: of the photo of each row.
        groups: rows that belong together.
        pairs: of near-duplicates.
        novelty: how far photos are from those that trained.
        warnings: to be said first.
        pretrained: features by a network that saw no label: a fine-tuned one has learnt the wrong ones, too.
    """
    split, trained, classes = measured.split, measured.trained, photos.classes
    labels = rows.labels[measured.rows]
    paths = None if rows.paths is None else [rows.paths[row] for row in measured.rows.tolist()]
    scored = of_scores(measured.scores, labels, paths, classes, verdict, photos.skipped)
    far = novelty.score(rows.features[measured.rows]) > novelty.threshold
    # Rows that are remembered themselves say nothing.
    share = 100 * float(far.float().mean()) if len(split.test) else math.nan
    parts = zip(("training", "validation", "test"), split, strict=True)
    scored = replace(
        scored, history=trained.history, best=trained.best, measured=measured.how, untouched=measured.untouched,
        parts={name: len(part) for name, part in parts if len(part)}, why_stopped=trained.stopped, warnings=warnings,
        heads=[_head(one, one.kind == trained.kind) for one in measured.tried],
        unknown=Unknown(novelty.threshold, share),
    )  # fmt: skip
    if verdict.several is not None:
        return scored
    wrong = (measured.scores.argmax(dim=1) != labels).nonzero().squeeze(1)
    like = neighbours(rows, measured.rows[wrong], split.train, groups, classes)
    return replace(
        scored, suspects=_suspects(pretrained, classes, groups),
        twins=twins(rows, pairs, classes, {row: photos.parts[number] or "" for row, number in enumerate(numbers)}),
        neighbours={int(number): like[row] for number, row in zip(wrong, measured.rows[wrong].tolist(), strict=True)},
    )  # fmt: skip
