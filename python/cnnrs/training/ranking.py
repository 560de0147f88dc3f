"""How well scores rank: curves over all thresholds, average precision, the threshold that suits a class best."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Curve:
    """One class against the rest, at every threshold from the highest score down.

    Attributes:
        thresholds: (T,) float64, falling; a row counts as found when its score is at least that.
        recall: (T,) share of the class's rows that are found, 0 to 1, rising.
        precision: (T,) share of the found rows that are of the class, 0 to 1.
        false_alarms: (T,) share of the other rows that are found, 0 to 1, rising (the false positive rate).
    """

    thresholds: Tensor
    recall: Tensor
    precision: Tensor
    false_alarms: Tensor

    @property
    def average_precision(self) -> float:
        """Area under precision over recall, as steps (no interpolation), 0 to 1; NaN without rows of the class."""
        rises = torch.diff(self.recall, prepend=self.recall.new_zeros(1))
        return float((rises * self.precision).sum()) if len(self.recall) else math.nan

    @property
    def area(self) -> float:
        """Area under recall over false alarms (ROC), 0 to 1: how often a row of the class outranks another row."""
        if not len(self.recall) or bool(self.false_alarms.isnan().any()):
            return math.nan
        zero = self.recall.new_zeros(1)
        return float(torch.trapezoid(torch.cat([zero, self.recall]), torch.cat([zero, self.false_alarms])))

    def best_f1(self) -> tuple[float, float]:
        """(threshold, F1 from 0 to 1) where the harmonic mean of recall and precision is largest."""
        if not len(self.recall):
            return math.nan, math.nan
        f1 = 2 * self.recall * self.precision / (self.recall + self.precision).clamp(min=1e-12)
        best = int(f1.argmax())
        return float(self.thresholds[best]), float(f1[best])


def curve(scores: Tensor, is_class: Tensor) -> Curve:
    """The curve of one class.

    Args:
        scores: (N,) larger for rows that are rather of the class.
        is_class: (N,) bool or 0/1.

    Returns:
        One point per different score; empty without rows of the class.

    >>> import torch
    >>> curve(torch.tensor([0.9, 0.8, 0.7, 0.1]), torch.tensor([1, 0, 1, 0])).average_precision
    0.8333333333333333
    """
    hits = is_class.double()
    if not bool(hits.any()):
        nothing = scores.new_zeros(0, dtype=torch.float64)
        return Curve(nothing, nothing, nothing, nothing)
    order = scores.argsort(descending=True, stable=True)
    ranked, hits = scores[order].double(), hits[order]
    # Rows of equal scores are found together.
    last = torch.cat([ranked[1:] != ranked[:-1], torch.tensor([True])])
    found = hits.cumsum(0)[last]
    taken = torch.arange(1, len(ranked) + 1, dtype=torch.float64)[last]
    others = len(ranked) - float(hits.sum())
    return Curve(
        ranked[last], found / hits.sum(), found / taken, (taken - found) / others if others else (taken - found) / 0.0
    )


def average_precision(scores: Tensor, labels: Tensor) -> list[float]:
    """Of every class, 0 to 1; NaN for a class without rows.

    Args:
        scores: (N, C), larger means rather of the class.
        labels: (N,) class numbers, or (N, C) 0/1.
    """
    hot = labels if labels.dim() == 2 else torch.nn.functional.one_hot(labels.long(), scores.shape[1])
    return [curve(scores[:, i], hot[:, i]).average_precision for i in range(scores.shape[1])]
