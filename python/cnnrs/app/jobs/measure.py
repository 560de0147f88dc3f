"""How good heads are on rows that had no say in them, and the head for use."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from cnnrs.app.jobs import deal
from cnnrs.app.jobs.clock import Clock
from cnnrs.app.jobs.photos import Part
from cnnrs.classifier.choose_head import FOLDS, Choice, Folded, Makers, choose, fold, on_all
from cnnrs.classifier.split import TEST, VALID, Split
from cnnrs.classifier.train_head import HeadOptions, Tell, Trained, scores_of
from cnnrs.data.feature_dataset import FeatureDataset
from cnnrs.training.several import thresholds_of


@dataclass(frozen=True)
class Tried:
    """A kind of head and how it did on photos that chose it: on the validation rows, or in the mean of the folds.

    Attributes:
        kind: one of ``names.HEADS``.
        loss: mean (binary) cross entropy.
        accuracy: percent; of several labels percent of all decisions.
        seconds: that training took.
    """

    kind: str
    loss: float
    accuracy: float
    seconds: float


@dataclass(frozen=True)
class Measured:
    """A head for use, and what rows say that had no part in it.

    Attributes:
        trained: the head for use.
        rows: (M,) numbers of the measured rows.
        scores: (M, C) float32 of them.
        how: with what was measured, in words that follow a number.
        untouched: whether nothing was chosen by the measured rows.
        tried: all kinds of heads that were trained.
        split: rows by part; where folds measure, all rows train.
        thresholds: probabilities from which on one of several labels counts, where F1 was best on the rows that chose:
            (C,), or (M, C) in folds.
        note: a sentence about rows that were left out; "" without.
    """

    trained: Trained
    rows: Tensor
    scores: Tensor
    how: str
    untouched: bool
    tried: list[Tried]
    split: Split
    thresholds: Tensor | None = None
    note: str = ""


def measure(
    data: FeatureDataset, parts: Sequence[Part | None], groups: Sequence[int], kinds: Sequence[str], makers: Makers,
    options: HeadOptions, valid: float | None, test: float | None, clock: Clock, say: Callable[[str], None],
    also: Sequence[str],
) -> Measured:  # fmt: skip
    """Train, choose and measure.

    Args:
        data: features and labels of all rows.
        parts: what folders say a row is for.
        groups: rows of one number stay on one side.
        kinds: heads to choose from.
        makers: of new heads, by kind.
        options: how they are trained.
        valid: share that chooses; None: 15 %.
        test: share that measures; None: 15 %, or folds where rows are few.
        clock: gets the seconds.
        say: hears of the epochs.
        also: heads to train for comparison.
    """
    if in_folds(parts, groups, test):
        return _by_folds(data, groups, kinds, makers, options, VALID if valid is None else valid, clock, say, also)
    split = deal.deal(
        data.labels, parts, groups, VALID if valid is None else valid, TEST if test is None else test, options.seed
    )
    if not len(split.valid) or (test and not len(split.test)):
        raise ValueError(
            f"{len(set(groups)):,} groups are too few to be shared out: without --test all photos measure, in folds"
        )
    split, note = deal.apart(split, data.labels, groups)
    say(f"{len(split.train):,} photos train, {len(split.valid):,} choose, {len(split.test):,} measure")
    with clock.stage("training"):
        choice = choose(kinds, makers, data, split.train, split.valid, options, teller(say), also)
    with clock.stage("result"):
        rows, how = (split.test, "test photos") if len(split.test) else (split.valid, "validation photos")
        scores = scores_of(choice.chosen.module, data.features, rows)
        tried = _tried([choice])
        limits = None
        if data.labels.dim() == 2:
            limits = thresholds_of(
                scores_of(choice.chosen.module, data.features, split.valid), data.labels[split.valid]
            )
    return Measured(choice.chosen, rows, scores, how, bool(len(split.test)), tried, split, limits, note)


def in_folds(parts: Sequence[Part | None], groups: Sequence[int | str], test: float | Path | None) -> bool:
    """Whether rows, each of a part and a group, are so few that all of them measure, in folds."""
    few = len(parts) < deal.FEW or len(set(groups)) < deal.FEW_GROUPS
    return test is None and "test" not in parts and few


def _by_folds(
    data: FeatureDataset, groups: Sequence[int], kinds: Sequence[str], makers: Makers, options: HeadOptions,
    valid: float, clock: Clock, say: Callable[[str], None], also: Sequence[str],
) -> Measured:  # fmt: skip
    groups, note = deal.spread(data.labels, groups)
    k = min(FOLDS, len(set(groups)))
    what = f"{len(data):,} photos" if len(data) < deal.FEW else f"{len(set(groups)):,} groups"
    say(f"{what} are few: all of them measure, in {k} folds, and all of them train in the end")
    with clock.stage("training"):
        folded = fold(kinds, makers, data, groups, options, lambda kind: None, also, k, valid)
        trained = on_all(folded.kind, makers, data, folded, options)
    with clock.stage("result"):
        tried = _tried(folded.choices)
        limits = _limits_of(folded, data) if data.labels.dim() == 2 else None
    every = torch.arange(len(data))
    how = f"photos, each by a classifier that had not seen it ({k} folds)"
    split = Split(every, every[:0], every[:0])
    return Measured(trained, every, folded.scores, how, True, tried, split, limits, note)


def _limits_of(folded: Folded, data: FeatureDataset) -> Tensor:
    """(N, C): of each row the thresholds that the photos chose that chose in its fold."""
    limits = torch.zeros_like(folded.scores)
    for number, (choice, rows) in enumerate(zip(folded.choices, folded.chose, strict=True)):
        limits[folded.fold == number] = thresholds_of(
            scores_of(choice.chosen.module, data.features, rows), data.labels[rows]
        )
    return limits


def _tried(choices: Sequence[Choice]) -> list[Tried]:
    """Every kind, the least loss first; over all choices."""
    found = []
    for heads in zip(*(choice.tried for choice in choices), strict=True):
        loss, accuracy = (
            sum(values) / len(heads) for values in zip(*((h.loss, h.accuracy) for h in heads), strict=True)
        )
        found.append(Tried(heads[0].kind, loss, accuracy, sum(one.seconds for one in heads)))
    return sorted(found, key=lambda one: one.loss)


def teller(say: Callable[[str], None]) -> Callable[[str], Tell]:
    """By what is trained: what says how its epochs go."""

    def announce(kind: str) -> Tell:
        def tell(epoch: int, most: int, trained: tuple[float, float], checked: tuple[float, float] | None) -> None:
            # Every one of the first ten, then ten of each power of ten.
            number = epoch + 1
            if number % 10 ** (len(str(number)) - 1) and number != most:
                return
            held = "" if checked is None else f"   validation: loss {checked[0]:.4f}, {checked[1]:6.2f} %"
            say(f"{kind}: epoch {number}/{most}   training: loss {trained[0]:.4f}, {trained[1]:6.2f} %{held}")

        return tell

    return announce
