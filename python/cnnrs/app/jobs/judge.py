"""The verdict on a classifier: numbers for its card, and what has to be said aloud beside the headline."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from cnnrs.app.report.headline import alarms, alarms_of_several
from cnnrs.training.metrics import Confusion, confusion
from cnnrs.training.ranking import average_precision
from cnnrs.training.several import SeveralLabels, several_labels


@dataclass(frozen=True)
class Verdict:
    """How good a classifier is.

    Attributes:
        facts: for the card and ``--json``.
        warnings: sentences, the most important first.
        confusion: of classes that exclude each other.
        several: of several labels per photo.
    """

    facts: dict[str, Any]
    warnings: list[str]
    confusion: Confusion | None = None
    several: SeveralLabels | None = None


def judge(scores: Tensor, labels: Tensor, classes: Sequence[str], thresholds: Tensor | None = None) -> Verdict:
    """Numbers of what was measured.

    Args:
        scores: (M, C).
        labels: (M,) class numbers, or (M, C) 0/1.
        classes: C names.
        thresholds: (C,) or (M, C) probabilities from which on one of several labels counts.
    """
    if labels.dim() == 2:
        return _of_several(several_labels(scores, labels, classes, thresholds))
    found = confusion(labels, scores, classes)
    precisions = [one for one in average_precision(scores.softmax(dim=1), labels) if not math.isnan(one)]
    low, high = found.interval
    facts = {
        "accuracy": _rounded(found.accuracy), "interval": [_rounded(low), _rounded(high)],
        "baseline": _rounded(found.baseline), "balanced_accuracy": _rounded(found.balanced_accuracy),
        "macro_f1": _rounded(found.macro_f1),
        "mean_average_precision": _rounded(100 * sum(precisions) / len(precisions)),
    }  # fmt: skip
    return Verdict(facts, alarms(found), found)


def _of_several(found: SeveralLabels) -> Verdict:
    facts = {
        "mean_average_precision": _rounded(found.mean_average_precision), "macro_f1": _rounded(found.macro_f1),
        "exact": _rounded(found.exact), "thresholds": [round(one.threshold, 6) for one in found.classes],
    }  # fmt: skip
    return Verdict(facts, alarms_of_several(found), several=found)


def _rounded(value: float) -> float | None:
    return None if math.isnan(value) else round(value, 4)


def headline(facts: dict[str, Any]) -> str:
    """One line for the terminal."""
    photos = f"{facts['measured_photos']:,} {facts['measured']}"
    if "accuracy" not in facts:
        return f"mean average precision {facts['mean_average_precision']:.2f} % on {photos}"
    low, high = facts["interval"]
    return (
        f"{facts['accuracy']:.2f} % of {photos} are right (as many others: {low:.1f} to {high:.1f} %, "
        f"19 times in 20; always the most frequent class: {facts['baseline']:.1f} %)"
    )
