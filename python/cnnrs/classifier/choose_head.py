"""Which head: every kind is trained on some rows, the loss on others chooses; how good that is, folds say."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cnnrs.classifier.split import VALID, folds, hold_out
from cnnrs.classifier.train_head import HeadOptions, Tell, Trained, scores_of, train_head
from cnnrs.data.feature_dataset import FeatureDataset

#: Of what ``head="auto"`` chooses: layers that any PyTorch reads. Neighbours bring their rows along.
AUTO = ("linear", "mlp", "logistic", "ridge")
#: Trained beside the chosen one, for the table in the report: seconds each.
COMPARED = ("linear", "logistic", "ridge", "knn")
#: How many parts the photos are dealt into where they are too few to hold some back.
FOLDS = 5

Makers = Mapping[str, Callable[[], nn.Module]]
# Called with the kind of head before it is trained; what it returns hears of its epochs.
Announce = Callable[[str], Tell | None]


@dataclass(frozen=True)
class Choice:
    """Heads that were trained on the same rows.

    Attributes:
        chosen: the one with the least loss on the validation rows, of those that were to be chosen from.
        tried: all of them.
    """

    chosen: Trained
    tried: list[Trained]


def choose(
    kinds: Sequence[str], makers: Makers, data: FeatureDataset, train: Tensor, valid: Tensor, options: HeadOptions,
    announce: Announce, also: Sequence[str] = (),
) -> Choice:  # fmt: skip
    """Train heads of ``kinds`` and take the one with the least validation loss; ``also`` are trained for comparison."""
    tried = [
        train_head(kind, makers[kind], data, train, valid, options, announce(kind))
        for kind in dict.fromkeys((*kinds, *also))
    ]
    return Choice(min((one for one in tried if one.kind in kinds), key=lambda one: one.loss), tried)


@dataclass(frozen=True)
class Folded:
    """What ``choose`` does on rows that it has not seen, each row once.

    Attributes:
        scores: (N, C) of every row, by the head that was chosen without its fold.
        fold: (N,) the fold of each row.
        choices: of each fold.
        chose: the rows that chose in each fold.
    """

    scores: Tensor
    fold: Tensor
    choices: list[Choice]
    chose: list[Tensor]

    @property
    def kind(self) -> str:
        """The head that most folds chose; the first among equals in the order of the folds."""
        return statistics.mode(choice.chosen.kind for choice in self.choices)

    def tried(self, kind: str) -> list[Trained]:
        """The heads of this kind, one of each fold."""
        return [one for choice in self.choices for one in choice.tried if one.kind == kind]


def fold(
    kinds: Sequence[str], makers: Makers, data: FeatureDataset, groups: Sequence[int], options: HeadOptions,
    announce: Announce, also: Sequence[str] = (), k: int = FOLDS, valid: float = VALID,
) -> Folded:  # fmt: skip
    """Measure by ``k`` folds: each is classified by what was trained, and chosen, on the others only."""
    which = folds(data.labels, groups, k, options.seed)
    scores = torch.zeros(len(data), options.classes)
    choices, chose = [], []
    for number in range(k):
        rest = (which != number).nonzero().squeeze(1)
        train, held_out = hold_out(data.labels[rest], [groups[row] for row in rest.tolist()], valid, options.seed)
        choice = choose(kinds, makers, data, rest[train], rest[held_out], options, announce, also)
        held = (which == number).nonzero().squeeze(1)
        scores[held] = scores_of(choice.chosen.module, data.features, held)
        choices.append(choice)
        chose.append(rest[held_out])
    return Folded(scores, which, choices, chose)


def on_all(kind: str, makers: Makers, data: FeatureDataset, folded: Folded, options: HeadOptions) -> Trained:
    """The head for use: trained on every row, for as many epochs or with the penalty that the folds chose (median)."""
    rows, tried = torch.arange(len(data)), folded.tried(kind)
    chosen = [one.strength for one in tried if one.strength is not None]
    return train_head(
        kind, makers[kind], data, rows, rows[:0], options, most=round(statistics.median(one.best + 1 for one in tried)),
        strength=statistics.median_low(chosen) if chosen else None,
    )  # fmt: skip
