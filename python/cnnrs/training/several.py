"""How good predictions of several labels per sample are: one class at a time, and together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cnnrs._util.text import left, shown, width
from cnnrs.training.ranking import curve


@dataclass(frozen=True)
class ClassFound:
    """One class of several.

    Attributes:
        name: of the class.
        samples: how many have it.
        recall: of these, percent that were found; NaN without any.
        precision: of the samples it was found on, percent that have it; NaN where it was found on none.
        f1: harmonic mean of the two, percent; NaN without samples.
        average_precision: area under precision over recall, percent; NaN without samples.
        threshold: probability from which on it counts as found, 0 to 1.
    """

    name: str
    samples: int
    recall: float
    precision: float
    f1: float
    average_precision: float
    threshold: float


@dataclass(frozen=True)
class SeveralLabels:
    """Predictions of several labels per sample; prints as a table.

    Attributes:
        classes: one entry per class.
        exact: percent of the samples whose labels are all right.
    """

    classes: list[ClassFound]
    exact: float

    @property
    def missed(self) -> list[ClassFound]:
        """Classes that have samples and were found on none of them."""
        return [one for one in self.classes if one.samples and not one.recall]

    @property
    def mean_average_precision(self) -> float:
        """Over the classes that have samples, percent."""
        return _mean([one.average_precision for one in self.classes])

    @property
    def macro_f1(self) -> float:
        """Over the classes that have samples, percent."""
        return _mean([one.f1 for one in self.classes])

    def __str__(self) -> str:
        first = max((width(shown(one.name)) for one in self.classes), default=5)
        first = max(first, 5)
        lines = [f"{left('class', first)}  samples  recall  precision     AP  from"]
        for one in self.classes:
            lines.append(
                f"{left(shown(one.name), first)}  {one.samples:>7,}  {one.recall:>6.1f}  {one.precision:>9.1f}"
                f"  {one.average_precision:>5.1f}  {one.threshold:.2f}"
            )
        return "\n".join(
            [f"mean average precision {self.mean_average_precision:.2f} %, all labels right {self.exact:.2f} %", *lines]
        )

    __repr__ = __str__


def several_labels(
    scores: Tensor, labels: Tensor, classes: Sequence[str] | None = None, thresholds: Tensor | None = None
) -> SeveralLabels:
    """Compare predictions with labels.

    Args:
        scores: (N, C) before the sigmoid.
        labels: (N, C) 0/1.
        classes: C names; numbers without them.
        thresholds: (C,) or (N, C) probabilities, 0 to 1, from which on a class counts as found; None: 0.5.

    Raises:
        ValueError: the shapes differ.

    >>> import torch
    >>> several_labels(torch.tensor([[2.0, -1.0], [-1.0, 3.0]]), torch.tensor([[1, 0], [1, 1]]), ["sky", "sea"]).exact
    50.0
    """
    if scores.shape != labels.shape or scores.dim() != 2:
        raise ValueError(f"scores and labels must both be (N, C), got {tuple(scores.shape)} and {tuple(labels.shape)}")
    limits = torch.full((scores.shape[1],), 0.5) if thresholds is None else thresholds
    probabilities = scores.float().sigmoid()
    found, there = probabilities >= limits, labels > 0
    listed = limits if limits.dim() == 1 else limits.median(dim=0).values
    rows = []
    for i, name in enumerate(classes if classes is not None else map(str, range(scores.shape[1]))):
        hits, all_there, all_found = (int(x.sum()) for x in (found[:, i] & there[:, i], there[:, i], found[:, i]))
        rows.append(
            ClassFound(
                name, all_there, 100 * hits / all_there if all_there else math.nan,
                100 * hits / all_found if all_found else math.nan,
                200 * hits / (all_there + all_found) if all_there else math.nan,
                100 * curve(probabilities[:, i], there[:, i]).average_precision, float(listed[i]),
            )
        )  # fmt: skip
    return SeveralLabels(rows, 100 * float((found == there).all(dim=1).float().mean()))


def thresholds_of(scores: Tensor, labels: Tensor) -> Tensor:
    """(C,) probabilities from which on each class has the best F1 on (N, C) scores; 0.5 without samples."""
    probabilities = scores.float().sigmoid()
    best = [curve(probabilities[:, i], labels[:, i] > 0).best_f1()[0] for i in range(scores.shape[1])]
    return torch.tensor([0.5 if math.isnan(one) else one for one in best])


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan
